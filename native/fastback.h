/* A fast rollback: what Python hands in (mirrored by checkpoint/fast.py) and what its files share. */
#ifndef PL_FASTBACK_H
#define PL_FASTBACK_H
#include <stdint.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <time.h>

#include "pagelens.h"

#define PAGE 4096ULL

/* struct page_region of linux/fs.h */
struct pl_region {
    uint64_t start, end, categories;
};

/* One mapping as PROCMAP_QUERY describes it: what must be unchanged for the fast way. */
struct pl_map {
    uint64_t start, end, flags, offset, inode, dev;
};
/* Saved pages [start, end): contents at data + offset, or zeros (PL_ZERO). PL_OF_FILE beside the offset: they were
 * the file's pages in a private mapping of it, so where they are again there is nothing to write. */
struct pl_saved {
    uint64_t start, end, offset;
};
#define PL_ZERO (~0ULL)
#define PL_OF_FILE 1ULL
/* A watched range. Shared: a missing entry says nothing about the contents; others: who map it too. */
struct pl_span {
    uint64_t start, end, kind;
};
enum { PL_ANONYMOUS, PL_SHARED, PL_PRIVATE_FILE, PL_SHARED_OTHERS };

struct pl_fast {
    int32_t pid, maps_fd, pagemap_fd, mem_fd, task_fd;
    int32_t accept_shared; /* write to shared memory that others map */
    uint64_t n_threads, n_maps, n_saved, n_spans, xstate_size;
    uint64_t guard_known, guard_pages; /* the kernel has PAGE_IS_GUARD; guard pages in the spans when saved */
    const int32_t *tids;
    const struct user_regs_struct *regs;
    const uint8_t *xstate; /* n_threads * xstate_size */
    const uint32_t *xstate_len;
    const uint64_t *sigmask;
    const struct pl_map *maps;
    const struct pl_saved *saved;
    const struct pl_span *spans;
    const uint8_t *data;
    struct pl_region *regions; /* scratch, n_regions */
    uint64_t n_regions;
    /* results */
    uint64_t written, zeroed, hold_ns, stop_ns, check_ns, scan_ns, write_ns, arm_ns;
    int32_t error, why; /* errno, and a PL_WHY */
};
enum { WHY_OK, WHY_THREADS, WHY_MAPS, WHY_HOLD, WHY_SCAN, WHY_WRITE, WHY_REGS, WHY_GONE, WHY_SHARED };

static inline int64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

/* The contents of all watched spans, as they were saved. WHY_OK, or why not and f->error; for WHY_MAPS, WHY_HOLD and
 * WHY_SHARED nothing was written. */
int pl_fast_memory(struct pl_fast *f);

/* Write all n iovecs, `pages` pages in all; frees both lists. 0, an errno, or -ENOMEM with nothing written. */
int pl_write_all(struct pl_fast *f, struct iovec *local, struct iovec *remote, size_t n, uint64_t pages);
#endif
