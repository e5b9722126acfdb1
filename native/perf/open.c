/* Opening the events of one thread on every CPU, and which descriptor and id is which. See rings.c. */
#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../pagelens.h"
#include "perf.h"

static int perf_open(struct perf_event_attr *attr, pid_t pid, int cpu)
{
	return (int)syscall(SYS_perf_event_open, attr, pid, cpu, -1, PERF_FLAG_FD_CLOEXEC);
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

int pl_perf_open(struct pl_perf *p, int pid, int tid, int on_exec)
{
	static const uint64_t configs[EVENTS] = {PERF_COUNT_SW_PAGE_FAULTS_MIN, PERF_COUNT_SW_PAGE_FAULTS_MAJ,
						 PERF_COUNT_SW_DUMMY};

	if (!pl_perf_mm_of(p, (uint32_t)pid, 0))
		return -ENOMEM;
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
				a.task = a.comm = a.comm_exec = a.mmap = a.mmap_data = a.mmap2 = 1;
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
			if (!error && !cpu && !e)
				p->totals.tasks_started++;
			if (!error && !on_exec && ioctl(fd, PERF_EVENT_IOC_ENABLE, 0) < 0)
				error = -errno;
			if (error)
				return error;
		}
	return 0;
}
