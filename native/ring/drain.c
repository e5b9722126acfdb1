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
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
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

#define PAGE 4096UL
#define RB_BUSY (1U << 31)
#define RB_DISCARD (1U << 30)
#define BUFFER (256 * 1024)

struct ring {
	_Atomic unsigned long *consumer;
	_Atomic unsigned long *producer;
	const unsigned char *data;
	void *map_rw, *map_ro;
};

struct out {
	int fd;
	size_t used;
	uint64_t bytes;         /* in the segment, written or buffered */
	unsigned char *buffer;
};

struct pl_drain {
	char dir[4000];
	unsigned int ncpu;
	size_t ring_size;
	struct ring *rings;
	struct out out[PL_OUTS];
	struct pl_stacks *stacks;
	pthread_t thread;
	pthread_mutex_t lock;   /* held for a pass, and by rotate */
	_Atomic int stop;
	int running;
	struct pl_drain_stats stats;
};

static const char *const out_names[PL_OUTS] = { "faults", "calls", "switches", "stacks", "text", "raw" };

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ULL + (uint64_t)t.tv_nsec;
}

static void flush_out(struct pl_drain *d, struct out *o)
{
	size_t done = 0;

	while (done < o->used && !d->stats.error) {
		ssize_t n = write(o->fd, o->buffer + done, o->used - done);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			d->stats.error = n < 0 ? errno : EIO;
			break;
		}
		done += (size_t)n;
	}
	o->used = 0;
}

static void put(struct pl_drain *d, int which, const void *data, size_t size)
{
	struct out *o = &d->out[which];

	if (o->used + size > BUFFER)
		flush_out(d, o);
	memcpy(o->buffer + o->used, data, size);
	o->used += size;
	o->bytes += size;
}

static int open_segment(struct pl_drain *d)
{
	char name[4096];

	for (int i = 0; i < PL_OUTS; i++) {
		snprintf(name, sizeof(name), "%s/%08llu.%s", d->dir, (unsigned long long)d->stats.segment,
			 out_names[i]);
		d->out[i].fd = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
		if (d->out[i].fd < 0)
			return errno;
		d->out[i].bytes = 0;
		d->out[i].used = 0;
	}
	return 0;
}

static void close_segment(struct pl_drain *d)
{
	for (int i = 0; i < PL_OUTS; i++) {
		if (d->out[i].fd < 0)
			continue;
		flush_out(d, &d->out[i]);
		close(d->out[i].fd);
		d->out[i].fd = -1;
	}
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
		put(d, PL_OUT_RAW, &row, sizeof(row));
	}
	return stack;
}

static void take(struct pl_drain *d, const unsigned char *p, size_t size)
{
	const struct pl_head *h = (const void *)p;
	int small = h->kind == PL_FAULT || h->kind == PL_SWITCH;
	size_t fixed = small ? sizeof(struct pl_rec_fault) : sizeof(struct pl_rec_call);
	int64_t stack = -1;

	if (size < fixed + h->nframes * 8UL + h->ntext || h->kind >= PL_KINDS) {
		d->stats.damaged++;
		return;
	}
	d->stats.taken[h->kind]++;
	if (d->stats.error) {
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

			put(d, PL_OUT_STACKS, row, sizeof(row));
			put(d, PL_OUT_STACKS, frames, h->nframes * 8UL);
		}
	}
	if (small) {
		struct pl_spool_fault row;

		memcpy(&row.r, p, sizeof(row.r));
		if (h->kind == PL_FAULT)
			row.r.h.flags &= (unsigned char)~PL_F_RAW;
		row.stack_id = stack;
		put(d, h->kind == PL_FAULT ? PL_OUT_FAULTS : PL_OUT_SWITCHES, &row, sizeof(row));
		if (h->kind == PL_FAULT && !(h->flags & PL_F_FAILED))
			d->stats.faults++;
	} else {
		struct pl_spool_call row;

		memcpy(&row.r, p, sizeof(row.r));
		row.stack_id = stack;
		row.text_offset = d->out[PL_OUT_TEXT].bytes;
		if (h->ntext)
			put(d, PL_OUT_TEXT, p + fixed + h->nframes * 8UL, h->ntext);
		put(d, PL_OUT_CALLS, &row, sizeof(row));
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

PL_EXPORT struct pl_drain *pl_drain_open(unsigned int ncpu, const int *fds, size_t ring_size, const char *dir);
PL_EXPORT struct pl_drain *pl_drain_open(unsigned int ncpu, const int *fds, size_t ring_size, const char *dir)
{
	struct pl_drain *d = calloc(1, sizeof(*d));

	if (!d || strlen(dir) >= sizeof(d->dir))
		goto fail;
	strcpy(d->dir, dir);
	d->ncpu = ncpu;
	d->ring_size = ring_size;
	pthread_mutex_init(&d->lock, NULL);
	d->rings = calloc(ncpu ? ncpu : 1, sizeof(*d->rings));
	d->stacks = pl_stacks_new();
	if (!d->rings || !d->stacks)
		goto fail;
	for (int i = 0; i < PL_OUTS; i++) {
		d->out[i].fd = -1;
		d->out[i].buffer = malloc(BUFFER);
		if (!d->out[i].buffer)
			goto fail;
	}
	for (unsigned int i = 0; i < ncpu; i++) {
		struct ring *r = &d->rings[i];

		if (fds[i] < 0)
			continue;
		r->map_rw = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fds[i], 0);
		r->map_ro = mmap(NULL, PAGE + 2 * ring_size, PROT_READ, MAP_SHARED, fds[i], PAGE);
		if (r->map_rw == MAP_FAILED || r->map_ro == MAP_FAILED)
			goto fail;
		r->consumer = r->map_rw;
		r->producer = r->map_ro;
		r->data = (const unsigned char *)r->map_ro + PAGE;
	}
	errno = open_segment(d);
	if (errno)
		goto fail;
	return d;
fail:
	free(d);        /* the process ends: mappings and files go with it */
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
	closed = d->stats.segment;
	close_segment(d);
	d->stats.segment++;
	if (!d->stats.error)
		d->stats.error = open_segment(d);
	pthread_mutex_unlock(&d->lock);
	return closed;
}

PL_EXPORT void pl_drain_stats(struct pl_drain *d, struct pl_drain_stats *to);
PL_EXPORT void pl_drain_stats(struct pl_drain *d, struct pl_drain_stats *to)
{
	pthread_mutex_lock(&d->lock);
	*to = d->stats;
	to->segment_bytes = 0;
	for (int i = 0; i < PL_OUTS; i++)
		to->segment_bytes += d->out[i].bytes;
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
	close_segment(d);
	return d->stats.segment;
}

PL_EXPORT void pl_drain_free(struct pl_drain *d);
PL_EXPORT void pl_drain_free(struct pl_drain *d)
{
	for (unsigned int i = 0; i < d->ncpu; i++) {
		if (!d->rings[i].data)
			continue;
		munmap(d->rings[i].map_rw, PAGE);
		munmap(d->rings[i].map_ro, PAGE + 2 * d->ring_size);
	}
	for (int i = 0; i < PL_OUTS; i++)
		free(d->out[i].buffer);
	pl_stacks_free(d->stacks);
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
}
