/* perf's records into those of bpf/record.h: address space numbers, figures of each thread, output. */
#include <stdlib.h>
#include <string.h>

#include "perf.h"

struct slot *pl_perf_find(struct slot *slots, size_t cap, uint32_t key)
{
	size_t i = key * 2654435761u % cap;

	while (slots[i].key && slots[i].key != key)
		i = (i + 1) % cap;
	return &slots[i];
}

/* The slot of a key, made where there is none; NULL: out of memory. */
struct slot *pl_perf_slot(struct table *t, uint32_t key)
{
	struct slot *slot;

	if (2 * (t->used + 1) > t->cap) {
		size_t cap = t->cap ? 2 * t->cap : 256;
		struct slot *grown = calloc(cap, sizeof *grown);

		if (!grown)
			return NULL;
		for (size_t k = 0; k < t->cap; k++)
			if (t->slots[k].key)
				*pl_perf_find(grown, cap, t->slots[k].key) = t->slots[k];
		free(t->slots);
		t->slots = grown;
		t->cap = cap;
	}
	slot = pl_perf_find(t->slots, t->cap, key);
	if (!slot->key) {
		slot->key = key;
		t->used++;
	}
	return slot;
}

uint32_t pl_perf_mm_of(struct pl_perf *p, uint32_t pid, int fresh)
{
	struct slot *slot = pl_perf_slot(&p->procs, pid);

	if (!slot)
		return 0;
	if (!slot->mm || fresh)
		slot->mm = ++p->next_mm;
	return slot->mm;
}

/* ---- output --------------------------------------------------------------------------------------------------- */

void pl_perf_flush(struct pl_perf *p)
{
	if (p->used)
		pl_drain_batch(p->sink, p->out, p->used);
	p->used = 0;
}

static void emit(struct pl_perf *p, const void *fixed, size_t nfixed, const void *frames, size_t nframes,
		 const void *text, size_t ntext)
{
	if (p->used + nfixed + nframes + ntext > OUT_BYTES)
		pl_perf_flush(p);
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
	struct slot *task;
	size_t n = 0, room;

	if (which_of(p, s->id) == EV_SIDE)
		return;
	r.h.kind = PL_FAULT;
	if ((h->misc & PERF_RECORD_MISC_CPUMODE_MASK) == PERF_RECORD_MISC_USER)
		r.h.flags |= PL_F_USER;
	if (which_of(p, s->id) == EV_MAJ)
		r.h.flags |= PL_F_MAJOR;
	room = h->size > sizeof *h + sizeof *s ? (h->size - sizeof *h - sizeof *s) / 8 : 0;
	if (p->flags & PL_PERF_STACKS)
		for (uint64_t i = 0; i < s->nr && i < room && n < PL_MAX_FRAMES; i++)
			if (s->ips[i] < (uint64_t)PERF_CONTEXT_MAX)
				frames[n++] = s->ips[i];
	r.h.nframes = (unsigned char)n;
	r.h.nr = -1;
	r.h.cpu = (unsigned short)s->cpu;
	r.h.pid = s->pid;
	r.h.tid = s->tid;
	r.h.mm = pl_perf_mm_of(p, s->pid, 0);
	r.h.time_ns = s->time;
	r.h.ip = s->ip;
	r.addr = s->addr;
	p->totals.recorded++;
	task = pl_perf_slot(&p->tasks, s->tid);
	if (task)
		task->recorded++;
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
	r.h.mm = pl_perf_mm_of(p, pid, 0);
	r.h.time_ns = t->time;
	n = (n + 7) & ~(size_t)7;
	r.h.ntext = (unsigned char)n;
	memcpy(r.args, args, sizeof r.args);
	if (text)
		memcpy(padded, text, strnlen(text, PL_MAX_TEXT - 1));
	emit(p, &r, sizeof r, NULL, 0, padded, n);
}

/* The counters come from whoever reads them at the exit stop. Without them nothing can be said of the thread's
 * completeness: it is counted, and gets no record of its end. */
static void task_gone(struct pl_perf *p, const struct trailer *t, uint32_t pid, uint32_t tid)
{
	struct slot *task = pl_perf_slot(&p->tasks, tid);
	uint64_t args[6] = {0};

	if (!task || !task->counted) {
		p->totals.tasks_uncounted++;
		p->totals.recorded_uncounted += task ? task->recorded : 0;
	} else {
		args[0] = task->min_flt;
		args[1] = task->maj_flt;
		args[2] = task->recorded;
		args[3] = task->gup;
		p->totals.min_flt += task->min_flt;
		p->totals.maj_flt += task->maj_flt;
		task_record(p, PL_EXIT, t, pid, tid, args, NULL);
	}
	if (task) /* the number may be used again */
		*task = (struct slot){.key = tid};
}

/* What stands behind a PERF_RECORD_MMAP2: the vma as it is after an mmap, an mprotect or a growing brk. */
struct mmap2 {
	uint32_t pid, tid;
	uint64_t addr, len, pgoff;
	uint32_t maj, min;
	uint64_t ino, ino_generation;
	uint32_t prot, flags;
	char name[];
};

/* As the mmap that makes it so: perf does not tell which call it was. */
static void mapped(struct pl_perf *p, const struct perf_event_header *h, const struct trailer *t)
{
	const struct mmap2 *m = (const void *)(h + 1);
	struct pl_rec_call r = {0};
	char path[PL_MAX_TEXT] = {0};
	size_t n = strnlen(m->name, PL_MAX_TEXT - 8);

	r.h.kind = PL_SYSCALL;
	r.h.nr = 9;
	r.h.cpu = (unsigned short)t->cpu;
	r.h.pid = m->pid;
	r.h.tid = m->tid;
	r.h.mm = pl_perf_mm_of(p, m->pid, 0);
	r.h.time_ns = t->time;
	r.args[0] = m->addr;
	r.args[1] = m->len;
	r.args[2] = m->prot;
	r.args[3] = m->flags | 0x10 /* MAP_FIXED */ | (m->ino ? 0 : 0x20 /* MAP_ANONYMOUS */);
	r.args[4] = m->ino ? 0 : (uint64_t)-1;
	r.args[5] = m->ino ? m->pgoff : 0;
	r.result = (int64_t)m->addr;
	if (m->ino) {
		r.h.flags |= PL_F_FILE;
		r.dev = (uint64_t)m->maj << 20 | m->min;
		r.ino = m->ino;
		memcpy(path, m->name, n);
		r.h.ntext = (unsigned char)((n + 8) & ~(size_t)7);
	}
	emit(p, &r, sizeof r, NULL, 0, path, r.h.ntext);
}

/* A call that a tracer saw; its thread is stopped. */
void pl_perf_emit_call(struct pl_perf *p, struct pl_rec_call *r, const char *text)
{
	struct slot *task = pl_perf_slot(&p->tasks, r->h.tid);
	char padded[PL_MAX_TEXT] = {0};
	size_t n = strnlen(text, PL_MAX_TEXT - 8);

	memcpy(padded, text, n);
	r->h.mm = pl_perf_mm_of(p, r->h.pid, 0);
	r->h.ntext = n ? (unsigned char)((n + 8) & ~(size_t)7) : 0;
	if (task)
		task->gup += r->h.extra;
	p->totals.gup += r->h.extra;
	emit(p, r, sizeof *r, NULL, 0, padded, r->h.ntext);
}

void pl_perf_translate(struct pl_perf *p, const struct perf_event_header *h)
{
	const struct trailer *t = (const void *)((const char *)h + h->size - sizeof *t);
	const uint32_t *w = (const void *)(h + 1);
	uint64_t args[6] = {0};
	struct slot *child;

	switch (h->type) {
	case PERF_RECORD_SAMPLE:
		translate_sample(p, h);
		break;
	case PERF_RECORD_LOST: /* u64 id, lost */
		p->totals.lost_records += ((const uint64_t *)w)[1];
		break;
	case PERF_RECORD_FORK: /* pid ppid tid ptid, u64 time */
		if (w[0] != w[1])
			pl_perf_mm_of(p, w[0], 1);
		args[0] = w[0];
		args[1] = w[2];
		args[2] = w[0] == w[1] ? 0x10100 : 0; /* CLONE_VM | CLONE_THREAD; of a process the flags are unknown */
		args[3] = pl_perf_mm_of(p, w[0], 0);
		p->totals.tasks_started++;
		child = pl_perf_slot(&p->tasks, w[2]);
		if (child)
			child->followed = 1;
		task_record(p, PL_FORK, t, w[1], w[3], args, NULL);
		break;
	case PERF_RECORD_EXIT: /* pid ppid tid ptid, u64 time */
		p->totals.tasks_gone++;
		task_gone(p, t, w[0], w[2]);
		break;
	case PERF_RECORD_MMAP2:
		if (!(p->flags & PL_PERF_CALLS))
			mapped(p, h, t);
		break;
	case PERF_RECORD_COMM: /* pid tid comm */
		if (h->misc & PERF_RECORD_MISC_COMM_EXEC) {
			args[0] = pl_perf_mm_of(p, w[0], 0);
			args[1] = pl_perf_mm_of(p, w[0], 1);
			task_record(p, PL_EXEC, t, w[0], w[1], args, (const char *)(w + 2));
		}
		break;
	default:
		break;
	}
}
