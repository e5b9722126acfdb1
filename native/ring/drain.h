/* Rows of the spool, and what the drain shares with its stack table. */
#ifndef PL_DRAIN_H
#define PL_DRAIN_H
#include <stddef.h>
#include <stdint.h>

#include "../bpf/record.h"

enum { PL_OUT_FAULTS, PL_OUT_CALLS, PL_OUT_SWITCHES, PL_OUT_STACKS, PL_OUT_TEXT, PL_OUT_RAW, PL_OUTS };

struct pl_spool_fault {
	struct pl_rec_fault r;
	int64_t stack_id;       /* -1: none */
};

struct pl_spool_call {
	struct pl_rec_call r;
	int64_t stack_id;
	uint64_t text_offset;   /* into the segment's text file, r.h.ntext bytes, NUL ended */
};

/* A stack that is still to be unwound; length: bytes of stack that are good. */
struct pl_spool_raw {
	int64_t stack_id;
	uint32_t mm, pid, length, unused;
	uint64_t regs[PL_RAW_REGS];
	unsigned char stack[PL_RAW_STACK];
};

struct pl_drain_stats {
	uint64_t segment, segment_bytes, passes, watermark_ns, high_water;
	uint64_t faults;                /* completed faults written to the spool */
	uint64_t dropped_faults, dropped_others, damaged;
	uint64_t taken[PL_KINDS];
	int64_t error;                  /* errno of the first failed write, then nothing more is written */
};

/* Whole records, one behind the other, from a source other than the BPF rings (perfdrain.c). */
struct pl_drain;
void pl_drain_batch(struct pl_drain *d, const void *records, size_t size);

struct pl_stacks;
struct pl_stacks *pl_stacks_new(void);
void pl_stacks_free(struct pl_stacks *s);
int64_t pl_stacks_number(struct pl_stacks *s, const uint64_t *frames, unsigned int n, int *fresh);
#endif
