/* perf's records, each in a block of exactly its size, through native/perf/records.c: run by test_perf.py under
 * AddressSanitizer and UndefinedBehaviorSanitizer. Prints the totals, and what the drain would get by kind. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "perf/records.c"

static unsigned long kinds[PL_KINDS], frames, text;

void pl_drain_batch(struct pl_drain *d, const void *records, size_t size)
{
	const unsigned char *at = records, *end = at + size;

	(void)d;
	while (at < end) {
		const struct pl_head *h = (const void *)at;

		if (h->kind >= PL_KINDS)
			abort();
		kinds[h->kind]++;
		frames += h->nframes;
		text += h->ntext;
		at += (h->kind == PL_FAULT ? sizeof(struct pl_rec_fault) : sizeof(struct pl_rec_call)) + h->nframes * 8UL + h->ntext;
	}
	if (at != end)
		abort();
}

static const struct trailer trailer = {.pid = 1, .tid = 1, .time = 7, .cpu = 1, .id = 3};

static void feed(struct pl_perf *p, unsigned type, unsigned misc, const void *body, size_t n, int trailing)
{
	size_t size = sizeof(struct perf_event_header) + n + (trailing ? sizeof trailer : 0);
	struct perf_event_header *h = malloc(size);

	*h = (struct perf_event_header){type, (unsigned short)misc, (unsigned short)size};
	memcpy(h + 1, body, n);
	if (trailing)
		memcpy((char *)(h + 1) + n, &trailer, sizeof trailer);
	pl_perf_translate(p, h);
	free(h);
}

static void sample(struct pl_perf *p, uint64_t id, uint32_t tid, size_t have, uint64_t claimed)
{
	uint64_t body[7 + 300] = {id, 0x1000, (uint64_t)tid << 32 | 9, 5, 0x2000, 0, claimed};

	for (size_t i = 0; i < have; i++)
		body[7 + i] = i % 5 ? 0x4000 + i : (uint64_t)PERF_CONTEXT_USER;
	feed(p, PERF_RECORD_SAMPLE, PERF_RECORD_MISC_USER, body, (7 + have) * 8, 0);
}

int main(void)
{
	struct pl_perf *p = calloc(1, sizeof *p);
	uint32_t words[6] = {0};
	char comm[32];

	p->flags = PL_PERF_STACKS;
	p->out = malloc(OUT_BYTES);
	p->cap_ids = 8;
	p->ids = calloc(p->cap_ids, sizeof *p->ids);
	for (uint64_t id = 1; id <= 3; id++)
		p->ids[id * 0x9E3779B97F4A7C15u % p->cap_ids] = (struct seen){id, id == 1 ? EV_MIN : id == 2 ? EV_MAJ : EV_SIDE};
	for (uint32_t tid = 1; tid <= 20000; tid++) {
		uint64_t fork[3] = {(uint64_t)9 << 32 | (tid % 3 ? 9 : tid), (uint64_t)1 << 32 | tid, 5};

		feed(p, PERF_RECORD_FORK, 0, fork, sizeof fork, 1);
		sample(p, 1 + tid % 2, tid, tid % 100, tid % 100);
	}
	sample(p, 1, 5, 300, 300);
	sample(p, 1, 5, 3, 1u << 20); /* claims more than it has */
	sample(p, 3, 5, 0, 0);        /* of the side event, and of one that nobody opened */
	sample(p, 99, 5, 0, 0);
	for (size_t n = 0; n < 4096; n += n < 300 ? 1 : 500) {
		struct mmap2 *m = calloc(1, sizeof *m + (n + 8) / 8 * 8);

		m->pid = m->tid = 9;
		m->ino = n % 2;
		memset(m->name, 'x', n);
		feed(p, PERF_RECORD_MMAP2, 0, m, sizeof *m + (n + 8) / 8 * 8, 1);
		free(m);
	}
	for (size_t n = 0; n < 16; n++) {
		memset(comm, 0, sizeof comm);
		words[0] = words[1] = 9;
		memcpy(comm, words, 8);
		memset(comm + 8, 'c', n);
		feed(p, PERF_RECORD_COMM, n % 2 ? PERF_RECORD_MISC_COMM_EXEC : 0, comm, 8 + (n + 8) / 8 * 8, 1);
	}
	pl_perf_slot(&p->tasks, 3)->counted = 1;
	for (uint32_t tid = 1; tid <= 20001; tid += 2) {
		uint64_t gone[3] = {(uint64_t)1 << 32 | 9, (uint64_t)1 << 32 | tid, 5};

		feed(p, PERF_RECORD_EXIT, 0, gone, sizeof gone, 1);
	}
	feed(p, PERF_RECORD_LOST, 0, (uint64_t[2]){1, 12}, 16, 1);
	feed(p, 77, 0, "12345678", 8, 1);
	pl_perf_flush(p);
	printf("recorded %lu lost %lu gone %lu uncounted %lu started %lu\n", p->totals.recorded, p->totals.lost_records,
	       p->totals.tasks_gone, p->totals.tasks_uncounted, p->totals.tasks_started);
	printf("faults %lu calls %lu forks %lu execs %lu exits %lu frames %lu\n", kinds[PL_FAULT], kinds[PL_SYSCALL],
	       kinds[PL_FORK], kinds[PL_EXEC], kinds[PL_EXIT], frames);
	free(p->tasks.slots);
	free(p->procs.slots);
	free(p->ids);
	free(p->out);
	free(p);
	return !text;
}
