/* The memory of a fast rollback: find what was written or dropped since, write it back, protect it again.
 *
 * One walk of the page tables names what differs, and passes over a page that is as it was at 2.5 ns: pages written
 * since they were protected, and pages without contents (MADV_DONTNEED; WP_ASYNC says nothing of those). Of private
 * mappings of files it also lists pages of the page cache: a private copy that was dropped and read again keeps its
 * protection, and is the file's page now. All that is to be written is listed first, so that a reason not to (a guard
 * page more, no memory) is found with nothing touched. Writing is fastwrite.c's.
 *
 * Rejected: the kernel's quick walk for pages that are written (1.2 ns; mask and answer WRITTEN alone), because a
 * second walk must then find what was dropped; one that lists all that is populated (10 ns).
 */
#include "fastback.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#define PIECE (64 * PAGE)      /* most of one iovec, so that work can be shared out */
#define NEAR (1024 * PAGE)     /* walking as much costs as one more call */
#define PM_SCAN 0xC0606610UL
#define IS_WRITTEN 2ULL
#define IS_FILE 4ULL
#define IS_PRESENT 8ULL
#define IS_SWAPPED 16ULL
#define IS_PFNZERO 32ULL
#define IS_GUARD 256ULL
#define POPULATED (IS_PRESENT | IS_SWAPPED)

struct pm_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, ret;
};

struct plan {
    struct pl_fast *f;
    struct iovec *local, *remote;
    size_t n, room, total;
    uint64_t pages;
    struct {
        uint64_t start, end;
    } done[64]; /* the first places written, near ones joined; total counts all */
    int failed, others; /* others: what they map would be written */
};

static uint8_t zeros[PIECE] __attribute__((aligned(4096)));

static void remember(struct plan *w, uint64_t start, uint64_t end) {
    const size_t room = sizeof w->done / sizeof *w->done;
    if (w->total && w->total <= room && start - w->done[w->total - 1].end <= NEAR) {
        w->done[w->total - 1].end = end;
        return;
    }
    if (w->total < room) {
        w->done[w->total].start = start;
        w->done[w->total].end = end;
    }
    w->total++;
}

/* List [start, end) to be written from `from`, or with zeros. */
static void put(struct plan *w, uint64_t start, uint64_t end, const uint8_t *from) {
    if (start >= end)
        return;
    remember(w, start, end);
    w->pages += (end - start) / PAGE;
    while (start < end) {
        uint64_t len = end - start < PIECE ? end - start : PIECE;
        if (w->n == w->room) {
            size_t room = w->room ? 2 * w->room : 1024;
            struct iovec *local = realloc(w->local, room * sizeof *local);
            w->local = local ? local : w->local;
            struct iovec *remote = realloc(w->remote, room * sizeof *remote);
            w->remote = remote ? remote : w->remote;
            if (!local || !remote) {
                w->failed = ENOMEM;
                return;
            }
            w->room = room;
        }
        w->local[w->n].iov_base = from ? (void *)(uintptr_t)from : zeros;
        w->remote[w->n].iov_base = (void *)(uintptr_t)start;
        w->local[w->n].iov_len = w->remote[w->n].iov_len = len;
        w->n++;
        start += len;
        if (from)
            from += len;
    }
}

/* The part of saved row `s` that lies in [from, to). */
static void restore(struct plan *w, const struct pl_saved *s, uint64_t from, uint64_t to) {
    uint64_t a = s->start > from ? s->start : from, b = s->end < to ? s->end : to;
    if (a >= b)
        return;
    if (s->offset == PL_ZERO) {
        put(w, a, b, NULL);
        w->f->zeroed += (b - a) / PAGE;
    } else {
        put(w, a, b, w->f->data + (s->offset & ~PL_OF_FILE) + (a - s->start));
        w->f->written += (b - a) / PAGE;
    }
}

/* Pages of a span by their categories, into f->regions. How many regions, or -1 with errno. */
static int64_t scan(struct pl_fast *f, const struct pl_span *span, const struct pm_arg *how) {
    struct pm_arg arg = *how;
    uint64_t n = 0;
    arg.size = sizeof arg;
    arg.end = span->end;
    for (arg.start = span->start; arg.start < arg.end; arg.start = arg.walk_end) {
        if (n == f->n_regions) {
            errno = E2BIG;
            return -1;
        }
        arg.vec = (uint64_t)(uintptr_t)(f->regions + n);
        arg.vec_len = f->n_regions - n;
        int got = ioctl(f->pagemap_fd, (unsigned long)PM_SCAN, &arg);
        if (got < 0)
            return -1;
        n += (uint64_t)got;
        /* With room left all was walked, whatever walk_end says: after more than 512 regions it can be that of an
         * earlier part (do_pagemap_scan sets it only where it is 0), and its regions would come twice. */
        if ((uint64_t)got < arg.vec_len)
            break;
        if (f->regions[n - 1].end > arg.walk_end)
            arg.walk_end = f->regions[n - 1].end;
        if (arg.walk_end <= arg.start) {
            errno = EPROTO;
            return -1;
        }
    }
    return (int64_t)n;
}

/* What may differ in a span. Guard pages look like swap entries, are listed and are no contents. */
static int64_t look(struct pl_fast *f, const struct pl_span *span) {
    const uint64_t guard = f->guard_known ? IS_GUARD : 0;
    const struct pm_arg shared = {.mask = IS_WRITTEN, .anyof = POPULATED, .ret = IS_WRITTEN | POPULATED | guard};
    /* inverted: pages that are not present match; swap entries are among them, as unchanged ones. */
    struct pm_arg ours = {.inverted = IS_PRESENT, .anyof = IS_WRITTEN | IS_PRESENT,
                          .ret = IS_WRITTEN | POPULATED | IS_PFNZERO | guard};
    if (span->kind == PL_PRIVATE_FILE) { /* costs a look at each page's struct page: 20 ns */
        ours.anyof |= IS_FILE;
        ours.ret |= IS_FILE;
    }
    return scan(f, span, span->kind == PL_SHARED || span->kind == PL_SHARED_OTHERS ? &shared : &ours);
}

PL_EXPORT uint64_t pl_fast_guards(struct pl_fast *f);
PL_EXPORT uint64_t pl_fast_guards(struct pl_fast *f) {
    uint64_t guards = 0;
    for (uint64_t i = 0; i < f->n_spans; i++) {
        int64_t n = look(f, &f->spans[i]);
        if (n < 0)
            return ~0ULL;
        for (int64_t r = 0; r < n; r++)
            if (f->regions[r].categories & IS_GUARD)
                guards += (f->regions[r].end - f->regions[r].start) / PAGE;
    }
    return guards;
}

/* Pages that were written: saved contents, or zeros where nothing was. */
static void was_written(struct plan *w, const struct pl_region *g, uint64_t i) {
    const struct pl_fast *f = w->f;
    int zero = (g->categories & IS_PFNZERO) != 0;
    uint64_t clear = g->start; /* populated, not saved: was absent */
    for (; i < f->n_saved && f->saved[i].start < g->end; i++) {
        const struct pl_saved *s = &f->saved[i];
        if (!zero && clear < s->start) {
            put(w, clear, s->start, NULL);
            w->f->zeroed += (s->start - clear) / PAGE;
        }
        if (!zero || s->offset != PL_ZERO)
            restore(w, s, g->start, g->end);
        clear = s->end;
        if (s->end > g->end)
            break;
    }
    if (!zero && clear < g->end) {
        put(w, clear, g->end, NULL);
        w->f->zeroed += (g->end - clear) / PAGE;
    }
}

/* Pages that lost what they held (they read as zeros, or as their file): saved contents, unless those are the same. */
static void was_dropped(struct plan *w, const struct pl_region *g, uint64_t i) {
    const struct pl_fast *f = w->f;
    for (; i < f->n_saved && f->saved[i].start < g->end; i++) {
        if (f->saved[i].offset != PL_ZERO && !(f->saved[i].offset & PL_OF_FILE))
            restore(w, &f->saved[i], g->start, g->end);
        if (f->saved[i].end > g->end)
            break;
    }
}

/* List what differs in a span. `row`: the first saved row that ends behind its begin. Adds to *guards. -1 with errno. */
static int plan_span(struct plan *w, const struct pl_span *span, uint64_t row, uint64_t *guards) {
    struct pl_fast *f = w->f;
    int64_t n = look(f, span);
    for (int64_t r = 0; r < n; r++) {
        const struct pl_region *g = &f->regions[r];
        const uint64_t c = g->categories;
        while (row < f->n_saved && f->saved[row].end <= g->start)
            row++;
        if (c & IS_GUARD)
            *guards += (g->end - g->start) / PAGE;
        else if (!(c & POPULATED))
            was_dropped(w, g, row);
        else if (span->kind == PL_PRIVATE_FILE && (c & IS_PRESENT ? (c & IS_FILE) != 0 : !(c & IS_WRITTEN)))
            was_dropped(w, g, row); /* the file's page, or a mark where a page was (or one in swap) */
        else if (c & IS_WRITTEN) {
            was_written(w, g, row);
            w->others |= span->kind == PL_SHARED_OTHERS;
        }
    }
    return n < 0 ? -1 : 0;
}

/* Protect what is written. Nothing is to be listed, so the kernel takes its quick walk (1 ns a page). */
static int arm_range(struct pl_fast *f, uint64_t start, uint64_t end) {
    struct pm_arg arg = {.size = sizeof arg, .flags = 1 /* PM_SCAN_WP_MATCHING */, .start = start, .end = end,
                         .mask = IS_WRITTEN, .anyof = POPULATED};
    return ioctl(f->pagemap_fd, (unsigned long)PM_SCAN, &arg) < 0 ? -1 : 0;
}

static int arm(struct pl_fast *f) {
    for (uint64_t i = 0; i < f->n_spans; i++)
        if (arm_range(f, f->spans[i].start, f->spans[i].end))
            return -1;
    return 0;
}

/* Only what was just written, where those places are few: one call each beats a walk over everything. */
static int arm_again(struct pl_fast *f, const struct plan *w) {
    if (w->total > sizeof w->done / sizeof *w->done)
        return arm(f);
    for (size_t i = 0; i < w->total; i++)
        if (arm_range(f, w->done[i].start, w->done[i].end))
            return -1;
    return 0;
}

PL_EXPORT int pl_fast_arm(struct pl_fast *f);
PL_EXPORT int pl_fast_arm(struct pl_fast *f) { return arm(f) ? -errno : 0; }

/* List all of it. WHY_OK, or why not. */
static int make_plan(struct plan *w) {
    struct pl_fast *f = w->f;
    uint64_t row = 0, guards = 0;
    for (uint64_t i = 0; i < f->n_spans; i++) {
        const struct pl_span *span = &f->spans[i];
        while (row < f->n_saved && f->saved[row].end <= span->start)
            row++;
        if (plan_span(w, span, row, &guards)) {
            f->error = errno;
            return errno == E2BIG ? WHY_MAPS : WHY_SCAN;
        }
    }
    f->error = w->failed;
    if (guards != f->guard_pages)
        return WHY_MAPS;
    if (w->others && !f->accept_shared)
        return WHY_SHARED;
    return w->failed ? WHY_HOLD : WHY_OK;
}

int pl_fast_memory(struct pl_fast *f) {
    struct plan w = {.f = f};
    int64_t begin = now_ns();
    int why = make_plan(&w);
    int64_t planned = now_ns(), written;
    f->scan_ns = (uint64_t)(planned - begin);
    if (why == WHY_OK) {
        int failed = pl_write_all(f, w.local, w.remote, w.n, w.pages);
        w.local = w.remote = NULL;
        written = now_ns();
        f->write_ns = (uint64_t)(written - planned);
        if (failed || arm_again(f, &w)) {
            f->error = failed ? abs(failed) : errno;
            why = failed < 0 ? WHY_HOLD : WHY_WRITE;
        }
        f->arm_ns = (uint64_t)(now_ns() - written);
    }
    free(w.local);
    free(w.remote);
    return why;
}
