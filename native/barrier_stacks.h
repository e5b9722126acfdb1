/* What native/barrier_all.c must not protect: stacks. */
#ifndef PL_BARRIER_STACKS_H
#define PL_BARRIER_STACKS_H
#include <stdint.h>

struct pl_part { uintptr_t start, end; }; /* [start, end), whole pages */

/* The places of stacks that are not named in maps, at most `most`, in any order: an alternate signal stack has its
 * own pages; of the others one page, which stands for the whole mapping around it. Returns how many;
 * *alternates: how many of them, the first ones, are to be taken as they are. */
int pl_stacks_of_threads(struct pl_part *out, int most, int *alternates);
/* The end of the thread stack that begins at `start` (right above its guard), or 0 where there is none. */
uintptr_t pl_stack_of_libc(uintptr_t start, uintptr_t end);
#endif
