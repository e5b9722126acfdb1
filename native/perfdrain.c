/* Records faults of tasks with inherited perf software events: the way down where BPF cannot be had (no privilege,
 * a locked-down container). Per task and CPU: MIN and MAJ page faults with period 1, and a dummy event that
 * carries fork, exec, comm, exit and mmap records.
 *
 * Samples of all CPUs are merged by time and written as the records of bpf/record.h, so that everything behind the
 * spool is the same. Merging holds back what is younger than the start of the drain round before: only then has
 * every CPU written all that is older.
 *
 * Rejected: one ring a task (thousands of rings); inherited tracepoints (thread creation costs 130 us and more).
 */
#include <errno.h>
#include <linux/perf_event.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "bpf/record.h"
#include "pagelens.h"

#define MAX_CPUS 1024
#define OUT_BYTES (1u << 20)

#ifndef PERF_FORMAT_LOST
#define PERF_FORMAT_LOST (1U << 4)
#endif

enum which { EV_MIN, EV_MAJ, EV_SIDE, EVENTS };

struct ring {
	int fd;
	struct perf_event_mmap_page *page;
	char *data;
	uint64_t size, tail, head;
};

struct seen { /* open addressing by id of the event: which of the three it is */
	uint64_t id;
	unsigned char which;
};

struct proc { /* address space number by process */
	uint32_t pid, mm;
};

struct pl_perf {
	int ncpu, pages, spool;
	unsigned flags;
	struct ring rings[MAX_CPUS];
	int *fds;
	unsigned char *fd_which;
	size_t nfds, cap_fds;
	struct seen *ids;
	size_t nids, cap_ids;
	struct proc *procs;
	size_t nprocs, cap_procs;
	uint32_t next_mm;
	pthread_t thread;
	atomic_int stop;
	int running, write_errno;
	uint64_t lost_records, faults, written;
	char *out;
	size_t used;
};

#define PL_PERF_KERNEL 1u /* kernel-mode faults too (needs CAP_PERFMON or perf_event_paranoid < 2) */
#define PL_PERF_STACKS 2u

static int perf_open(struct perf_event_attr *attr, pid_t pid, int cpu)
{
	return (int)syscall(SYS_perf_event_open, attr, pid, cpu, -1, PERF_FLAG_FD_CLOEXEC);
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- address space numbers ---------------------------------------------------------------------------------- */

static struct proc *proc_slot(struct pl_perf *p, uint32_t pid)
{
	size_t i;

	if (2 * (p->nprocs + 1) > p->cap_procs) {
		size_t old = p->cap_procs, cap = old ? 2 * old : 256;
		struct proc *was = p->procs, *grown = calloc(cap, sizeof *grown);

		if (!grown)
			return NULL;
		p->procs = grown;
		p->cap_procs = cap;
		for (size_t k = 0; k < old; k++)
			if (was[k].pid) {
				for (i = was[k].pid * 2654435761u % cap; grown[i].pid; i = (i + 1) % cap)
					;
				grown[i] = was[k];
			}
		free(was);
	}
	for (i = pid * 2654435761u % p->cap_procs; p->procs[i].pid && p->procs[i].pid != pid;)
		i = (i + 1) % p->cap_procs;
	return &p->procs[i];
}

static uint32_t mm_of(struct pl_perf *p, uint32_t pid, int fresh)
{
	struct proc *slot = proc_slot(p, pid);

	if (!slot)
		return 0;
	if (!slot->pid) {
		slot->pid = pid;
		p->nprocs++;
		fresh = 1;
	}
	if (fresh)
		slot->mm = ++p->next_mm;
	return slot->mm;
}

/* ---- output --------------------------------------------------------------------------------------------------- */

static void flush(struct pl_perf *p)
{
	size_t done = 0;

	while (done < p->used && !p->write_errno) {
		ssize_t n = write(p->spool, p->out + done, p->used - done);

		if (n < 0 && errno != EINTR)
			p->write_errno = errno;
		else if (n > 0)
			done += (size_t)n;
	}
	p->written += done;
	p->used = 0;
}

static void emit(struct pl_perf *p, const void *fixed, size_t nfixed, const void *frames, size_t nframes,
		 const void *text, size_t ntext)
{
	if (p->used + nfixed + nframes + ntext > OUT_BYTES)
		flush(p);
	memcpy(p->out + p->used, fixed, nfixed);
	p->used += nfixed;
	if (nframes)
		memcpy(p->out + p->used, frames, nframes);
	p->used += nframes;
	if (ntext)
		memcpy(p->out + p->used, text, ntext);
	p->used += ntext;
}

/* ---- translation ---------------------------------------------------------------------------------------------- */

/* sample_id_all trailer: pid tid, time, cpu res, identifier: 4 words from the end. */
struct trailer {
	uint32_t pid, tid;
	uint64_t time;
	uint32_t cpu, res;
	uint64_t id;
};

struct sample {
	uint64_t id, ip;
	uint32_t pid, tid;
	uint64_t time, addr;
	uint32_t cpu, res;
	uint64_t nr; /* only with PL_PERF_STACKS */
	uint64_t ips[];
};

static enum which which_of(struct pl_perf *p, uint64_t id)
{
	for (size_t i = id * 0x9E3779B97F4A7C15u % p->cap_ids; p->ids[i].id; i = (i + 1) % p->cap_ids)
		if (p->ids[i].id == id)
			return p->ids[i].which;
	return EV_SIDE;
}

static void translate_sample(struct pl_perf *p, const struct perf_event_header *h)
{
	const struct sample *s = (const void *)(h + 1);
	struct pl_rec_fault r = {0};
	uint64_t frames[PL_MAX_FRAMES];
	size_t n = 0;

	if (which_of(p, s->id) == EV_SIDE)
		return;
	r.h.kind = PL_FAULT;
	if ((h->misc & PERF_RECORD_MISC_CPUMODE_MASK) == PERF_RECORD_MISC_USER)
		r.h.flags |= PL_F_USER;
	if (which_of(p, s->id) == EV_MAJ)
		r.h.flags |= PL_F_MAJOR;
	if (p->flags & PL_PERF_STACKS)
		for (uint64_t i = 0; i < s->nr && n < PL_MAX_FRAMES; i++)
			if (s->ips[i] < (uint64_t)PERF_CONTEXT_MAX)
				frames[n++] = s->ips[i];
	r.h.nframes = (unsigned char)n;
	r.h.nr = -1;
	r.h.cpu = (unsigned short)s->cpu;
	r.h.pid = s->pid;
	r.h.tid = s->tid;
	r.h.mm = mm_of(p, s->pid, 0);
	r.h.time_ns = s->time;
	r.h.ip = s->ip;
	r.addr = s->addr;
	p->faults++;
	emit(p, &r, sizeof r, frames, n * 8, NULL, 0);
}

static void task_record(struct pl_perf *p, unsigned char kind, const struct trailer *t, uint32_t pid, uint32_t tid,
			const uint64_t args[6], const char *text)
{
	struct pl_rec_call r = {0};
	char padded[PL_MAX_TEXT] = {0};
	size_t n = text ? strnlen(text, PL_MAX_TEXT - 1) + 1 : 0;

	r.h.kind = kind;
	r.h.nr = -1;
	r.h.cpu = (unsigned short)t->cpu;
	r.h.pid = pid;
	r.h.tid = tid;
	r.h.mm = mm_of(p, pid, 0);
	r.h.time_ns = t->time;
	n = (n + 7) & ~(size_t)7;
	r.h.ntext = (unsigned char)n;
	memcpy(r.args, args, sizeof r.args);
	if (text)
		memcpy(padded, text, strnlen(text, PL_MAX_TEXT - 1));
	emit(p, &r, sizeof r, NULL, 0, padded, n);
}

static void translate(struct pl_perf *p, const struct perf_event_header *h)
{
	const struct trailer *t = (const void *)((const char *)h + h->size - sizeof *t);
	const uint32_t *w = (const void *)(h + 1);
	uint64_t args[6] = {0};

	switch (h->type) {
	case PERF_RECORD_SAMPLE:
		translate_sample(p, h);
		break;
	case PERF_RECORD_LOST: /* u64 id, lost */
		p->lost_records += ((const uint64_t *)w)[1];
		break;
	case PERF_RECORD_FORK: /* pid ppid tid ptid, u64 time */
		if (w[0] != w[1])
			mm_of(p, w[0], 1);
		args[0] = w[0];
		args[1] = w[2];
		args[2] = w[0] == w[1] ? 0x10100 : 0; /* CLONE_VM | CLONE_THREAD; of a process the flags are unknown */
		args[3] = mm_of(p, w[0], 0);
		task_record(p, PL_FORK, t, w[1], w[3], args, NULL);
		break;
	case PERF_RECORD_COMM: /* pid tid comm */
		if (h->misc & PERF_RECORD_MISC_COMM_EXEC) {
			args[0] = mm_of(p, w[0], 0);
			args[1] = mm_of(p, w[0], 1);
			task_record(p, PL_EXEC, t, w[0], w[1], args, (const char *)(w + 2));
		}
		break;
	default:
		break;
	}
}

/* ---- rings ---------------------------------------------------------------------------------------------------- */

/* The record at the tail, contiguous (copied where it wraps), or NULL. Its time by *time. */
static const struct perf_event_header *peek(struct ring *r, char *copy, uint64_t *time)
{
	const struct perf_event_header *h;
	uint64_t at = r->tail & (r->size - 1);

	if (r->tail == r->head)
		return NULL;
	h = (const void *)(r->data + at);
	if (at + h->size > r->size) {
		uint64_t first = r->size - at;
		uint16_t size = h->size;

		memcpy(copy, r->data + at, first);
		memcpy(copy + first, r->data, size - first);
		h = (const void *)copy;
	}
	if (h->type == PERF_RECORD_SAMPLE)
		*time = ((const struct sample *)(h + 1))->time;
	else
		*time = ((const struct trailer *)((const char *)h + h->size - sizeof(struct trailer)))->time;
	return h;
}

static void round_of(struct pl_perf *p, uint64_t limit, char *copy)
{
	for (int c = 0; c < p->ncpu; c++)
		if (p->rings[c].page)
			p->rings[c].head = __atomic_load_n(&p->rings[c].page->data_head, __ATOMIC_ACQUIRE);
	for (;;) {
		int best = -1;
		uint64_t best_time = limit, time;

		for (int c = 0; c < p->ncpu; c++)
			if (p->rings[c].page && peek(&p->rings[c], copy, &time) && time < best_time) {
				best = c;
				best_time = time;
			}
		if (best < 0)
			break;
		{
			struct ring *r = &p->rings[best];
			const struct perf_event_header *h = peek(r, copy, &time);

			translate(p, h);
			r->tail += h->size;
			__atomic_store_n(&r->page->data_tail, r->tail, __ATOMIC_RELEASE);
		}
	}
}

static void *drain(void *arg)
{
	struct pl_perf *p = arg;
	struct pollfd polls[MAX_CPUS];
	char *copy = malloc(1 << 16);
	uint64_t before = now_ns();
	nfds_t n = 0;
	int hung = 0;

	if (!copy)
		return NULL;
	for (int c = 0; c < p->ncpu; c++)
		if (p->rings[c].page)
			polls[n++] = (struct pollfd){.fd = p->rings[c].fd, .events = POLLIN};
	while (!atomic_load(&p->stop)) {
		uint64_t begin;

		/* The fd of a task that is gone polls as POLLHUP for ever (its children still use the ring): from
		 * then on by the clock. */
		if (poll(polls, n, hung ? 10 : 50) > 0)
			for (nfds_t i = 0; i < n; i++)
				if (polls[i].revents & (POLLHUP | POLLERR | POLLNVAL)) {
					polls[i].fd = -1;
					hung = 1;
				}
		begin = now_ns();
		round_of(p, before, copy);
		before = begin;
	}
	round_of(p, UINT64_MAX, copy);
	flush(p);
	free(copy);
	return NULL;
}

/* ---- interface ------------------------------------------------------------------------------------------------ */

PL_EXPORT struct pl_perf *pl_perf_new(int ncpu, int ring_pages, int spool, unsigned flags);
PL_EXPORT int pl_perf_add(struct pl_perf *p, int tid, int on_exec);
PL_EXPORT int pl_perf_start(struct pl_perf *p);
PL_EXPORT int pl_perf_stop(struct pl_perf *p, uint64_t totals[4]);
PL_EXPORT uint32_t pl_perf_mm(struct pl_perf *p, uint32_t pid);
PL_EXPORT void pl_perf_free(struct pl_perf *p);

/* NULL: out of memory or too many CPUs. */
PL_EXPORT struct pl_perf *pl_perf_new(int ncpu, int ring_pages, int spool, unsigned flags)
{
	struct pl_perf *p;

	if (ncpu > MAX_CPUS || !(p = calloc(1, sizeof *p)))
		return NULL;
	p->ncpu = ncpu;
	p->pages = ring_pages;
	p->spool = spool;
	p->flags = flags;
	p->cap_ids = 1024;
	p->ids = calloc(p->cap_ids, sizeof *p->ids);
	p->out = malloc(OUT_BYTES);
	if (!p->ids || !p->out) {
		pl_perf_free(p);
		return NULL;
	}
	return p;
}

/* The number of an address space; call it before start for the tasks that the recording begins with. */
PL_EXPORT uint32_t pl_perf_mm(struct pl_perf *p, uint32_t pid)
{
	return mm_of(p, pid, 0);
}

static int remember(struct pl_perf *p, int fd, enum which which)
{
	uint64_t id;

	if (p->nfds == p->cap_fds) {
		size_t cap = p->cap_fds ? 2 * p->cap_fds : 64;
		int *fds = realloc(p->fds, cap * sizeof *fds);
		unsigned char *kinds = realloc(p->fd_which, cap);

		if (fds)
			p->fds = fds;
		if (kinds)
			p->fd_which = kinds;
		if (!fds || !kinds)
			return -ENOMEM;
		p->cap_fds = cap;
	}
	p->fds[p->nfds] = fd;
	p->fd_which[p->nfds++] = (unsigned char)which;
	if (ioctl(fd, PERF_EVENT_IOC_ID, &id) < 0)
		return -errno;
	if (2 * (p->nids + 1) > p->cap_ids) {
		size_t cap = 2 * p->cap_ids;
		struct seen *grown = calloc(cap, sizeof *grown);

		if (!grown)
			return -ENOMEM;
		for (size_t k = 0; k < p->cap_ids; k++)
			if (p->ids[k].id) {
				size_t i = p->ids[k].id * 0x9E3779B97F4A7C15u % cap;

				while (grown[i].id)
					i = (i + 1) % cap;
				grown[i] = p->ids[k];
			}
		free(p->ids);
		p->ids = grown;
		p->cap_ids = cap;
	}
	{
		size_t i = id * 0x9E3779B97F4A7C15u % p->cap_ids;

		while (p->ids[i].id)
			i = (i + 1) % p->cap_ids;
		p->ids[i] = (struct seen){.id = id, .which = (unsigned char)which};
		p->nids++;
	}
	return 0;
}

static int map_ring(struct pl_perf *p, int cpu, int fd)
{
	struct ring *r = &p->rings[cpu];
	size_t page = (size_t)sysconf(_SC_PAGESIZE), size = (size_t)p->pages * page;
	void *base = mmap(NULL, page + size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (base == MAP_FAILED)
		return -errno;
	*r = (struct ring){.fd = fd, .page = base, .data = (char *)base + page, .size = size};
	return 0;
}

/* Opens the events of one task on every CPU; its children inherit them. 0 or -errno. Before start only. */
PL_EXPORT int pl_perf_add(struct pl_perf *p, int tid, int on_exec)
{
	static const uint64_t configs[EVENTS] = {PERF_COUNT_SW_PAGE_FAULTS_MIN, PERF_COUNT_SW_PAGE_FAULTS_MAJ,
						 PERF_COUNT_SW_DUMMY};

	for (int cpu = 0; cpu < p->ncpu; cpu++)
		for (int e = 0; e < EVENTS; e++) {
			struct perf_event_attr a = {.size = sizeof a, .type = PERF_TYPE_SOFTWARE};
			int fd, error;

			a.config = configs[e];
			a.sample_period = 1;
			a.sample_type = PERF_SAMPLE_IDENTIFIER | PERF_SAMPLE_IP | PERF_SAMPLE_TID | PERF_SAMPLE_TIME |
					PERF_SAMPLE_ADDR | PERF_SAMPLE_CPU;
			if (p->flags & PL_PERF_STACKS)
				a.sample_type |= PERF_SAMPLE_CALLCHAIN;
			a.exclude_callchain_kernel = 1;
			a.exclude_kernel = !(p->flags & PL_PERF_KERNEL);
			a.exclude_hv = 1;
			a.inherit = 1;
			a.disabled = 1;
			a.enable_on_exec = on_exec != 0;
			a.sample_id_all = 1;
			a.use_clockid = 1;
			a.clockid = CLOCK_MONOTONIC;
			a.watermark = 1;
			a.wakeup_watermark = (uint32_t)p->pages * 4096u / 4;
			a.read_format = PERF_FORMAT_LOST;
			if (e == EV_SIDE)
				a.task = a.comm = a.comm_exec = 1;
			fd = perf_open(&a, tid, cpu);
			if (fd < 0 && errno == EINVAL) { /* before 6.0: no PERF_FORMAT_LOST */
				a.read_format = 0;
				fd = perf_open(&a, tid, cpu);
			}
			if (fd < 0)
				return errno == ENODEV ? 0 : -errno; /* ENODEV: the CPU is offline */
			if ((error = remember(p, fd, (enum which)e)))
				return error;
			if (!p->rings[cpu].page)
				error = map_ring(p, cpu, fd);
			else if (ioctl(fd, PERF_EVENT_IOC_SET_OUTPUT, p->rings[cpu].fd) < 0)
				error = -errno;
			if (!error && !on_exec && ioctl(fd, PERF_EVENT_IOC_ENABLE, 0) < 0)
				error = -errno;
			if (error)
				return error;
		}
	return 0;
}

PL_EXPORT int pl_perf_start(struct pl_perf *p)
{
	int error = pthread_create(&p->thread, NULL, drain, p);

	p->running = !error;
	return -error;
}

/* Stops and drains. totals: faults recorded, faults lost (PERF_FORMAT_LOST), LOST records' sum, bytes written.
 * 0, or -errno of a write that failed (the rest of the recording was dropped then). */
PL_EXPORT int pl_perf_stop(struct pl_perf *p, uint64_t totals[4])
{
	uint64_t lost = 0;

	for (size_t i = 0; i < p->nfds; i++)
		ioctl(p->fds[i], PERF_EVENT_IOC_DISABLE, 0);
	if (p->running) {
		atomic_store(&p->stop, 1);
		pthread_join(p->thread, NULL);
		p->running = 0;
	}
	for (size_t i = 0; i < p->nfds; i++) {
		uint64_t value[2] = {0, 0};

		if (p->fd_which[i] != EV_SIDE && read(p->fds[i], value, sizeof value) == (ssize_t)sizeof value)
			lost += value[1];
	}
	totals[0] = p->faults;
	totals[1] = lost;
	totals[2] = p->lost_records;
	totals[3] = p->written;
	return -p->write_errno;
}

PL_EXPORT void pl_perf_free(struct pl_perf *p)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	if (!p)
		return;
	for (int c = 0; c < p->ncpu; c++)
		if (p->rings[c].page)
			munmap(p->rings[c].page, page + p->rings[c].size);
	for (size_t i = 0; i < p->nfds; i++)
		close(p->fds[i]);
	free(p->fds);
	free(p->fd_which);
	free(p->ids);
	free(p->procs);
	free(p->out);
	free(p);
}
