/* The files that the drain writes: one of fixed-size rows for each kind of record, in segments. */
#ifndef PL_SPOOL_H
#define PL_SPOOL_H
#include <stddef.h>
#include <stdint.h>

#include "drain.h"

struct pl_out {
	int fd;                 /* -1: no segment is open */
	size_t used;
	uint64_t bytes;         /* in the segment, written or buffered */
	unsigned char *buffer;
};

struct pl_spool {
	char dir[4000];
	uint64_t segment;
	int64_t error;          /* errno of the first failed write, then nothing more is written */
	struct pl_out out[PL_OUTS];
};

int pl_spool_init(struct pl_spool *s, const char *dir);         /* 0 or errno; then pl_spool_free, in either case */
int pl_spool_open(struct pl_spool *s);                          /* begins segment s->segment; 0 or errno */
void pl_spool_put(struct pl_spool *s, int which, const void *data, size_t size);
void pl_spool_close(struct pl_spool *s);                        /* flushes and closes the segment */
void pl_spool_free(struct pl_spool *s);
#endif
