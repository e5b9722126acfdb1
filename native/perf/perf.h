/* Recording by inherited perf events: what its two files share. See rings.c. */
#ifndef PL_PERF_H
#define PL_PERF_H
#include <linux/perf_event.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "../bpf/record.h"
#include "../ring/drain.h"

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

struct slot { /* of a process: its address space number; of a thread: its figures */
	uint32_t key, mm;
	uint64_t recorded, min_flt, maj_flt, gup;
	int counted, followed; /* followed: began under our events, which it inherited */
};

struct table { /* open addressing by pid or tid */
	struct slot *slots;
	size_t used, cap;
};

struct pl_perf_totals {
	uint64_t recorded, lost, lost_records, min_flt, maj_flt, tasks_started, tasks_gone, tasks_uncounted, recorded_uncounted;
	uint64_t gup;
};

struct pl_perf {
	int ncpu, pages;
	struct pl_drain *sink;
	unsigned flags;
	struct ring rings[MAX_CPUS];
	int *fds;
	unsigned char *fd_which;
	size_t nfds, cap_fds;
	struct seen *ids;
	size_t nids, cap_ids;
	struct table procs, tasks;
	pthread_mutex_t lock; /* tasks and totals: Python tells counters and reads figures meanwhile */
	uint32_t next_mm;
	pthread_t thread;
	atomic_int stop;
	int running;
	struct pl_perf_totals totals;
	char *out, *copy;
	size_t used;
};

#define PL_PERF_KERNEL 1u /* kernel-mode faults too (needs CAP_PERFMON or perf_event_paranoid < 2) */
#define PL_PERF_STACKS 2u
#define PL_PERF_CALLS 4u /* somebody tells the calls (pl_perf_call): MMAP2 records would be a second account of them */

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

/* open.c: the events of one thread of process pid on every CPU; its children inherit them. 0 or -errno. The first
 * before start, so that each CPU has its ring. */
int pl_perf_open(struct pl_perf *p, int pid, int tid, int on_exec);
/* records.c */
struct slot *pl_perf_find(struct slot *slots, size_t cap, uint32_t key);
struct slot *pl_perf_slot(struct table *t, uint32_t key);
uint32_t pl_perf_mm_of(struct pl_perf *p, uint32_t pid, int fresh);
void pl_perf_flush(struct pl_perf *p);
void pl_perf_emit_call(struct pl_perf *p, struct pl_rec_call *r, const char *text);
void pl_perf_translate(struct pl_perf *p, const struct perf_event_header *h);
#endif
