/* The drain: one thread that empties the per-CPU BPF rings into spool files.
 *
 * It sorts records by kind into files of fixed-size rows (numpy reads them in one call), gives each distinct call
 * stack a number, and keeps count of everything that it could not write. Files come in segments: Python rotates,
 * converts finished segments to Parquet, and removes them; after a crash the segments that are left are
 * converted by `recover`.
 *
 * Rejected: wake-ups by the kernel (each costs an irq_work in the recorded program's fault path; polling every
 * few milliseconds costs it nothing); writing Parquet here (a C++ dependency).
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../bpf/record.h"
#include "../pagelens.h"
#include "drain.h"
#include "spool.h"

#define PAGE 4096UL
#define RB_BUSY (1U << 31)
#define RB_DISCARD (1U << 30)

struct ring {
	_Atomic unsigned long *consumer;
	_Atomic unsigned long *producer;
	const unsigned char *data;
	void *map_rw, *map_ro;
};

struct pl_drain {
	unsigned int ncpu;
	size_t ring_size;
	struct ring *rings;
	struct pl_spool spool;
	struct pl_stacks *stacks;
	pthread_t thread;
	pthread_mutex_t lock;   /* held for a pass, and by rotate */
	_Atomic int stop;
	int running;
	struct pl_drain_stats stats;
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ULL + (uint64_t)t.tv_nsec;
}

/* Two faults have the same stack if instruction, stack and frame pointer and the whole copy are equal: the other
 * registers hardly ever lead to a frame. */
static int64_t take_raw(struct pl_drain *d, const struct pl_head *h, const uint64_t *words)
{
	struct pl_spool_raw row = { 0 };
	uint64_t key[4 + PL_RAW_STACK / 8];
	unsigned int n = h->nframes > PL_RAW_REGS ? h->nframes - PL_RAW_REGS : 0;
	int64_t stack;
	int fresh;

	if (h->nframes < PL_RAW_REGS || n > PL_RAW_STACK / 8)
		return -1;
	memcpy(row.regs, words, sizeof(row.regs));
	memcpy(row.stack, words + PL_RAW_REGS, n * 8UL);
	key[0] = h->mm;
	key[1] = row.regs[16];
	key[2] = row.regs[7];
	key[3] = row.regs[6];
	memcpy(key + 4, row.stack, n * 8UL);
	stack = pl_stacks_number(d->stacks, key, 4 + n, &fresh);
	if (fresh) {
		row.stack_id = stack;
		row.mm = h->mm;
		row.pid = h->pid;
		row.length = n * 8;
		pl_spool_put(&d->spool, PL_OUT_RAW, &row, sizeof(row));
	}
	return stack;
}

/* Each fault of a batch becomes a row of its own. */
static void take_faults(struct pl_drain *d, const struct pl_head *h, size_t size)
{
	const struct pl_batch *b = (const void *)h;
	struct pl_spool_fault row = { .r.h = *h, .stack_id = -1 };
	const uint64_t address = (1ULL << PL_SHORT_ADDR) - 1;

	if (h->nframes > PL_BATCH || size < sizeof(*h) + h->nframes * sizeof(b->faults[0])) {
		d->stats.damaged++;
		return;
	}
	d->stats.taken[PL_FAULT] += h->nframes;
	if (d->spool.error) {
		d->stats.dropped_faults += h->nframes;
		return;
	}
	row.r.h.kind = PL_FAULT;
	row.r.h.nframes = 0;
	for (unsigned int i = 0; i < h->nframes; i++) {
		const struct pl_short_fault *f = &b->faults[i];

		uint64_t high = f->ip_time_flags >> PL_SHORT_ADDR; /* 14 bits of the time, 2 flags */

		row.r.h.flags = (unsigned char)(high >> 14);
		row.r.h.time_ns = h->time_ns + (f->addr_time >> PL_SHORT_ADDR | (high & 0x3fff) << 16);
		row.r.h.ip = f->ip_time_flags & address;
		row.r.addr = f->addr_time & address;
		pl_spool_put(&d->spool, PL_OUT_FAULTS, &row, sizeof(row));
	}
	d->stats.faults += h->nframes;
}

static void take(struct pl_drain *d, const unsigned char *p, size_t size)
{
	const struct pl_head *h = (const void *)p;
	int small = h->kind == PL_FAULT || h->kind == PL_SWITCH;
	size_t fixed = small ? sizeof(struct pl_rec_fault) : sizeof(struct pl_rec_call);
	int64_t stack = -1;

	if (h->kind == PL_FAULT_BATCH) {
		take_faults(d, h, size);
		return;
	}
	if (size < fixed + h->nframes * 8UL + h->ntext || h->kind >= PL_KINDS) {
		d->stats.damaged++;
		return;
	}
	d->stats.taken[h->kind]++;
	if (d->spool.error) {
		if (h->kind == PL_FAULT && !(h->flags & PL_F_FAILED))
			d->stats.dropped_faults++;
		else
			d->stats.dropped_others++;
		return;
	}
	if (h->kind == PL_FAULT && h->flags & PL_F_RAW) {
		stack = take_raw(d, h, (const uint64_t *)(const void *)(p + fixed));
	} else if (h->nframes) {
		uint64_t frames[256];
		int fresh;

		memcpy(frames, p + fixed, h->nframes * 8UL);
		stack = pl_stacks_number(d->stacks, frames, h->nframes, &fresh);
		if (fresh) {
			uint64_t row[2] = { (uint64_t)stack, h->nframes };

			pl_spool_put(&d->spool, PL_OUT_STACKS, row, sizeof(row));
			pl_spool_put(&d->spool, PL_OUT_STACKS, frames, h->nframes * 8UL);
		}
	}
	if (small) {
		struct pl_spool_fault row;

		memcpy(&row.r, p, sizeof(row.r));
		if (h->kind == PL_FAULT)
			row.r.h.flags &= (unsigned char)~PL_F_RAW;
		row.stack_id = stack;
		pl_spool_put(&d->spool, h->kind == PL_FAULT ? PL_OUT_FAULTS : PL_OUT_SWITCHES, &row, sizeof(row));
		if (h->kind == PL_FAULT && !(h->flags & PL_F_FAILED))
			d->stats.faults++;
	} else {
		struct pl_spool_call row;

		memcpy(&row.r, p, sizeof(row.r));
		row.stack_id = stack;
		row.text_offset = d->spool.out[PL_OUT_TEXT].bytes;
		if (h->ntext)
			pl_spool_put(&d->spool, PL_OUT_TEXT, p + fixed + h->nframes * 8UL, h->ntext);
		pl_spool_put(&d->spool, PL_OUT_CALLS, &row, sizeof(row));
	}
}

void pl_drain_batch(struct pl_drain *d, const void *records, size_t size)
{
	const unsigned char *at = records, *end = at + size;

	pthread_mutex_lock(&d->lock);
	while (at < end) {
		const struct pl_head *h = (const void *)at;
		size_t fixed = h->kind == PL_FAULT || h->kind == PL_SWITCH ? sizeof(struct pl_rec_fault)
									   : sizeof(struct pl_rec_call);
		size_t length = fixed + h->nframes * 8UL + h->ntext;

		take(d, at, length);
		at += length;
	}
	d->stats.watermark_ns = now_ns();
	pthread_mutex_unlock(&d->lock);
}

/* Empties one ring once; returns the bytes taken. */
static size_t empty_ring(struct pl_drain *d, struct ring *r)
{
	unsigned long pos = atomic_load_explicit(r->consumer, memory_order_relaxed), begin = pos;
	unsigned long end = atomic_load_explicit(r->producer, memory_order_acquire);
	unsigned int batch = 0;

	while (pos < end) {
		const unsigned char *at = r->data + (pos & (d->ring_size - 1));
		uint32_t len = atomic_load_explicit((_Atomic uint32_t *)(uintptr_t)at, memory_order_acquire);
		uint32_t size = len & ~(RB_BUSY | RB_DISCARD);

		if (len & RB_BUSY)
			break;
		if (size + 8UL > end - pos) {   /* longer than what was written: nothing behind it can be found */
			d->stats.damaged++;
			pos = end;
			break;
		}
		if (!(len & RB_DISCARD))
			take(d, at + 8, size);
		pos += (size + 8UL + 7) & ~7UL;
		if (++batch % 512 == 0)
			atomic_store_explicit(r->consumer, pos, memory_order_release);
	}
	atomic_store_explicit(r->consumer, pos, memory_order_release);
	return pos - begin;
}

static size_t pass(struct pl_drain *d)
{
	uint64_t begin = now_ns();
	size_t most = 0;

	for (unsigned int i = 0; i < d->ncpu; i++) {
		size_t n;

		if (!d->rings[i].data)
			continue;
		n = empty_ring(d, &d->rings[i]);
		if (n > most)
			most = n;
	}
	d->stats.passes++;
	d->stats.watermark_ns = begin;
	if (most > d->stats.high_water)
		d->stats.high_water = most;
	return most;
}

static void *run(void *arg)
{
	struct pl_drain *d = arg;

	/* The rings must not overflow while the recorded program has all CPUs. Refused without privilege: no harm. */
	setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), -10);
	while (!atomic_load(&d->stop)) {
		struct timespec nap = { 0, 10 * 1000 * 1000 };
		size_t n;

		pthread_mutex_lock(&d->lock);
		n = pass(d);
		pthread_mutex_unlock(&d->lock);
		if (n > d->ring_size / 4)
			continue;
		if (n > d->ring_size / 16)
			nap.tv_nsec = 1000 * 1000;
		nanosleep(&nap, NULL);
	}
	return NULL;
}

static void unmap_ring(struct ring *r, size_t ring_size)
{
	if (r->map_rw)
		munmap(r->map_rw, PAGE);
	if (r->map_ro)
		munmap(r->map_ro, PAGE + 2 * ring_size);
}

/* 0 or errno; on failure nothing is mapped. */
static int map_ring(struct ring *r, int fd, size_t ring_size)
{
	void *rw = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), *ro;

	if (rw == MAP_FAILED)
		return errno;
	ro = mmap(NULL, PAGE + 2 * ring_size, PROT_READ, MAP_SHARED, fd, PAGE);
	if (ro == MAP_FAILED) {
		int error = errno;

		munmap(rw, PAGE);
		return error;
	}
	*r = (struct ring){ .consumer = rw, .producer = ro, .data = (const unsigned char *)ro + PAGE,
			    .map_rw = rw, .map_ro = ro };
	return 0;
}

/* NULL: errno says why, and nothing is left of it but the files that it made. */
PL_EXPORT struct pl_drain *pl_drain_open(unsigned int ncpu, const int *fds, size_t ring_size, const char *dir);
PL_EXPORT void pl_drain_free(struct pl_drain *d);
PL_EXPORT struct pl_drain *pl_drain_open(unsigned int ncpu, const int *fds, size_t ring_size, const char *dir)
{
	struct pl_drain *d = calloc(1, sizeof(*d));
	int error;

	if (!d)
		return NULL;
	pthread_mutex_init(&d->lock, NULL);
	d->ring_size = ring_size;
	d->rings = calloc(ncpu ? ncpu : 1, sizeof(*d->rings));
	d->stacks = pl_stacks_new();
	error = pl_spool_init(&d->spool, dir);
	if (!d->rings || !d->stacks)
		error = ENOMEM;
	for (; !error && d->ncpu < ncpu; d->ncpu++)
		if (fds[d->ncpu] >= 0)
			error = map_ring(&d->rings[d->ncpu], fds[d->ncpu], ring_size);
	if (!error)
		error = pl_spool_open(&d->spool);
	if (!error)
		return d;
	pl_drain_free(d);
	errno = error;
	return NULL;
}

PL_EXPORT int pl_drain_start(struct pl_drain *d);
PL_EXPORT int pl_drain_start(struct pl_drain *d)
{
	int error = pthread_create(&d->thread, NULL, run, d);

	d->running = !error;
	return error;
}

/* Empties the rings, closes the segment and begins the next; returns the number of the closed one. All records that were made before
 * stats.watermark_ns are in closed segments. */
PL_EXPORT uint64_t pl_drain_rotate(struct pl_drain *d);
PL_EXPORT uint64_t pl_drain_rotate(struct pl_drain *d)
{
	uint64_t closed;

	pthread_mutex_lock(&d->lock);
	pass(d);
	closed = d->spool.segment;
	pl_spool_close(&d->spool);
	d->spool.segment++;
	if (!d->spool.error)
		d->spool.error = pl_spool_open(&d->spool);
	pthread_mutex_unlock(&d->lock);
	return closed;
}

PL_EXPORT void pl_drain_stats(struct pl_drain *d, struct pl_drain_stats *to);
PL_EXPORT void pl_drain_stats(struct pl_drain *d, struct pl_drain_stats *to)
{
	pthread_mutex_lock(&d->lock);
	*to = d->stats;
	to->segment = d->spool.segment;
	to->error = d->spool.error;
	to->segment_bytes = 0;
	for (int i = 0; i < PL_OUTS; i++)
		to->segment_bytes += d->spool.out[i].bytes;
	pthread_mutex_unlock(&d->lock);
}

/* Stops the thread, empties the rings for the last time, closes the segment; returns its number. */
PL_EXPORT uint64_t pl_drain_stop(struct pl_drain *d);
PL_EXPORT uint64_t pl_drain_stop(struct pl_drain *d)
{
	if (d->running) {
		atomic_store(&d->stop, 1);
		pthread_join(d->thread, NULL);
		d->running = 0;
	}
	pass(d);
	pl_spool_close(&d->spool);
	return d->spool.segment;
}

PL_EXPORT void pl_drain_free(struct pl_drain *d)
{
	for (unsigned int i = 0; i < d->ncpu; i++)
		unmap_ring(&d->rings[i], d->ring_size);
	pl_spool_free(&d->spool);
	pl_stacks_free(d->stacks);
	pthread_mutex_destroy(&d->lock);
	free(d->rings);
	free(d);
}

PL_EXPORT void pl_record_sizes(uint64_t *sizes);
PL_EXPORT void pl_record_sizes(uint64_t *sizes)
{
	sizes[0] = sizeof(struct pl_spool_fault);
	sizes[1] = sizeof(struct pl_spool_call);
	sizes[2] = sizeof(struct pl_task);
	sizes[3] = sizeof(struct pl_totals);
	sizes[4] = sizeof(struct pl_drain_stats);
	sizes[5] = sizeof(struct pl_spool_raw);
	sizes[6] = sizeof(struct pl_batch);
}
