/* Records faults of tasks with inherited perf software events: the way down where BPF cannot be had (no privilege,
 * a locked-down container). Per task and CPU: MIN and MAJ page faults with period 1, and a dummy event that
 * carries fork, exec, comm, exit and mmap records.
 *
 * Samples of all CPUs are merged by time and handed to the drain (ring/drain.c) as the records of bpf/record.h, so
 * that everything behind it is the same. Merging holds back what is younger than the start of the drain round before: only then has
 * every CPU written all that is older.
 *
 * Rejected: one ring a task (thousands of rings); inherited tracepoints (thread creation costs 130 us and more).
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../pagelens.h"
#include "perf.h"

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
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

			pl_perf_translate(p, h);
			r->tail += h->size;
			__atomic_store_n(&r->page->data_tail, r->tail, __ATOMIC_RELEASE);
		}
	}
}

static void *drain(void *arg)
{
	struct pl_perf *p = arg;
	struct pollfd polls[MAX_CPUS];
	uint64_t before = now_ns();
	nfds_t n = 0;
	int hung = 0;

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
		pthread_mutex_lock(&p->lock);
		round_of(p, before, p->copy);
		pl_perf_flush(p);
		pthread_mutex_unlock(&p->lock);
		before = begin;
	}
	pthread_mutex_lock(&p->lock);
	round_of(p, UINT64_MAX, p->copy);
	pl_perf_flush(p);
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

/* ---- interface ------------------------------------------------------------------------------------------------ */

PL_EXPORT struct pl_perf *pl_perf_new(int ncpu, int ring_pages, struct pl_drain *sink, unsigned flags);
PL_EXPORT int pl_perf_add(struct pl_perf *p, int pid, int tid, int on_exec);
PL_EXPORT int pl_perf_start(struct pl_perf *p);
PL_EXPORT void pl_perf_stop(struct pl_perf *p);
PL_EXPORT void pl_perf_totals(struct pl_perf *p, struct pl_perf_totals *to);
PL_EXPORT void pl_perf_sync(struct pl_perf *p);
PL_EXPORT int pl_perf_followed(struct pl_perf *p, uint32_t tid);
PL_EXPORT uint64_t pl_perf_recorded(struct pl_perf *p, uint32_t tid);
PL_EXPORT uint32_t pl_perf_mm(struct pl_perf *p, uint32_t pid);
PL_EXPORT void pl_perf_counters(struct pl_perf *p, uint32_t tid, uint64_t min_flt, uint64_t maj_flt);
PL_EXPORT void pl_perf_call(struct pl_perf *p, struct pl_rec_call *r, const char *text);
PL_EXPORT void pl_perf_root(struct pl_perf *p, uint32_t pid);
PL_EXPORT void pl_perf_tell(struct pl_perf *p, const void *record);
PL_EXPORT void pl_perf_free(struct pl_perf *p);

/* NULL: out of memory or too many CPUs. */
PL_EXPORT struct pl_perf *pl_perf_new(int ncpu, int ring_pages, struct pl_drain *sink, unsigned flags)
{
	struct pl_perf *p;

	if (ncpu > MAX_CPUS || !(p = calloc(1, sizeof *p)))
		return NULL;
	p->ncpu = ncpu;
	p->pages = ring_pages;
	p->sink = sink;
	pthread_mutex_init(&p->lock, NULL);
	p->flags = flags;
	p->cap_ids = 1024;
	p->ids = calloc(p->cap_ids, sizeof *p->ids);
	p->out = malloc(OUT_BYTES);
	p->copy = malloc(1 << 16);
	if (!p->ids || !p->out || !p->copy) {
		pl_perf_free(p);
		return NULL;
	}
	return p;
}

/* The number of the address space of a process; 0 if it is not known yet. */
PL_EXPORT uint32_t pl_perf_mm(struct pl_perf *p, uint32_t pid)
{
	uint32_t mm;

	pthread_mutex_lock(&p->lock);
	mm = p->procs.cap ? pl_perf_find(p->procs.slots, p->procs.cap, pid)->mm : 0;
	pthread_mutex_unlock(&p->lock);
	return mm;
}

/* Hands over a call of a thread that is stopped at its end; all but the address space's number is filled in. */
PL_EXPORT void pl_perf_call(struct pl_perf *p, struct pl_rec_call *r, const char *text)
{
	pthread_mutex_lock(&p->lock);
	round_of(p, now_ns(), p->copy);
	pl_perf_emit_call(p, r, text);
	pthread_mutex_unlock(&p->lock);
}

/* Where perf cannot be had a tracer tells what perf would: the first task, and records of perf's own layout (FORK, EXIT,
 * COMM, without samples). */
PL_EXPORT void pl_perf_root(struct pl_perf *p, uint32_t pid)
{
	pthread_mutex_lock(&p->lock);
	pl_perf_mm_of(p, pid, 0);
	p->totals.tasks_started++;
	pthread_mutex_unlock(&p->lock);
}

PL_EXPORT void pl_perf_tell(struct pl_perf *p, const void *record)
{
	pthread_mutex_lock(&p->lock);
	pl_perf_translate(p, record);
	pl_perf_flush(p);
	pthread_mutex_unlock(&p->lock);
}

/* Tells the counters of a thread that is at its exit stop, as far as they belong to the recording. */
PL_EXPORT void pl_perf_counters(struct pl_perf *p, uint32_t tid, uint64_t min_flt, uint64_t maj_flt)
{
	struct slot *task;

	pthread_mutex_lock(&p->lock);
	task = pl_perf_slot(&p->tasks, tid);
	if (task) {
		task->min_flt = min_flt;
		task->maj_flt = maj_flt;
		task->counted = 1;
	}
	pthread_mutex_unlock(&p->lock);
}

PL_EXPORT int pl_perf_add(struct pl_perf *p, int pid, int tid, int on_exec)
{
	int error;

	pthread_mutex_lock(&p->lock);
	error = pl_perf_open(p, pid, tid, on_exec);
	pthread_mutex_unlock(&p->lock);
	return error;
}

/* Whether a thread began under our events, as far as they are drained (pl_perf_sync): it must not be added. */
PL_EXPORT int pl_perf_followed(struct pl_perf *p, uint32_t tid)
{
	int followed;

	pl_perf_sync(p);
	pthread_mutex_lock(&p->lock);
	followed = p->tasks.cap ? pl_perf_find(p->tasks.slots, p->tasks.cap, tid)->followed : 0;
	pthread_mutex_unlock(&p->lock);
	return followed;
}

PL_EXPORT int pl_perf_start(struct pl_perf *p)
{
	int error = pthread_create(&p->thread, NULL, drain, p);

	p->running = !error;
	return -error;
}

/* Takes what the tasks that are stopped now have recorded: their state (pl_perf_mm) is then that of this moment. */
PL_EXPORT void pl_perf_sync(struct pl_perf *p)
{
	pthread_mutex_lock(&p->lock);
	round_of(p, now_ns(), p->copy);
	pthread_mutex_unlock(&p->lock);
}

/* Faults recorded of a thread that is stopped now. */
PL_EXPORT uint64_t pl_perf_recorded(struct pl_perf *p, uint32_t tid)
{
	uint64_t recorded;

	pl_perf_sync(p);
	pthread_mutex_lock(&p->lock);
	recorded = p->tasks.cap ? pl_perf_find(p->tasks.slots, p->tasks.cap, tid)->recorded : 0;
	pthread_mutex_unlock(&p->lock);
	return recorded;
}

/* Stops recording and hands what is left to the drain. */
PL_EXPORT void pl_perf_stop(struct pl_perf *p)
{
	for (size_t i = 0; i < p->nfds; i++)
		ioctl(p->fds[i], PERF_EVENT_IOC_DISABLE, 0);
	if (p->running) {
		atomic_store(&p->stop, 1);
		pthread_join(p->thread, NULL);
		p->running = 0;
	}
}

/* Figures up to now. lost: faults that found the ring full (PERF_FORMAT_LOST; 0 before Linux 6.0, where only
 * lost_records tells). */
PL_EXPORT void pl_perf_totals(struct pl_perf *p, struct pl_perf_totals *to)
{
	pthread_mutex_lock(&p->lock);
	*to = p->totals;
	pthread_mutex_unlock(&p->lock);
	for (size_t i = 0; i < p->nfds; i++) {
		uint64_t value[2] = {0, 0};

		if (p->fd_which[i] != EV_SIDE && read(p->fds[i], value, sizeof value) == (ssize_t)sizeof value)
			to->lost += value[1];
	}
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
	free(p->procs.slots);
	free(p->tasks.slots);
	free(p->out);
	free(p->copy);
	free(p);
}
