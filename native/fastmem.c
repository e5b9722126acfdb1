/* The memory of a fast rollback: find what was written or dropped since, write it back, protect it again.
 *
 * Two walks of the page tables name what differs, each of which passes over a page that is as it was at 3 ns (one walk
 * that lists what is populated costs 12): pages written since they were protected, and pages without contents where
 * there were some (MADV_DONTNEED; WP_ASYNC says nothing of those). All that is to be written is listed first, so that
 * a reason not to (a guard page more, no memory) is found with nothing touched. Writing is fastwrite.c's.
 */
#include "fastback.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#define PIECE (64 * PAGE)      /* most of one iovec, so that work can be shared out */
#define PM_SCAN 0xC0606610UL
#define IS_WRITTEN 2ULL
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
    } done[64]; /* the first places written, neighbours joined; total counts all */
    int failed;
};

static uint8_t zeros[PIECE] __attribute__((aligned(4096)));

static void remember(struct plan *w, uint64_t start, uint64_t end) {
    const size_t room = sizeof w->done / sizeof *w->done;
    if (w->total && w->total <= room && w->done[w->total - 1].end == start) {
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
    if (s->offset == ~0ULL) {
        put(w, a, b, NULL);
        w->f->zeroed += (b - a) / PAGE;
    } else {
        put(w, a, b, w->f->data + s->offset + (a - s->start));
        w->f->written += (b - a) / PAGE;
    }
}

/* Pages of a span by their categories, from f->regions[n] on. How many regions, or -1 with errno. */
static int64_t scan(struct pl_fast *f, const struct pl_span *span, uint64_t n, const struct pm_arg *how) {
    struct pm_arg arg = *how;
    uint64_t first = n;
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
    return (int64_t)(n - first);
}

/* What was written in the spans, into f->regions; where each span's begin goes to first[]. The number of guard pages
 * (never armed, so they count as written; they look like swap entries and are no contents), or ~0 with errno. */
static uint64_t collect(struct pl_fast *f, uint64_t *first) {
    const struct pm_arg written = {.mask = IS_WRITTEN, .anyof = POPULATED,
                                   .ret = IS_PFNZERO | (f->guard_known ? IS_GUARD : 0)};
    uint64_t n = 0, guards = 0;
    for (uint64_t i = 0; i < f->n_spans; i++) {
        first[i] = n;
        int64_t got = scan(f, &f->spans[i], n, &written);
        if (got < 0)
            return ~0ULL;
        uint64_t kept = n;
        for (int64_t r = 0; r < got; r++) {
            struct pl_region g = f->regions[n + (uint64_t)r];
            if (g.categories & IS_GUARD)
                guards += (g.end - g.start) / PAGE;
            else
                f->regions[kept++] = g;
        }
        n = kept;
    }
    first[f->n_spans] = n;
    return guards;
}

PL_EXPORT uint64_t pl_fast_guards(struct pl_fast *f);
PL_EXPORT uint64_t pl_fast_guards(struct pl_fast *f) {
    uint64_t *first = calloc(f->n_spans + 1, sizeof *first);
    uint64_t guards = first ? collect(f, first) : ~0ULL;
    free(first);
    return guards;
}

/* Written pages of one span: saved contents, or zeros where nothing was. Returns the first row beyond the span. */
static uint64_t plan_written(struct plan *w, const struct pl_span *span, const struct pl_region *g,
                             const struct pl_region *end, uint64_t i) {
    const struct pl_fast *f = w->f;
    for (; g < end; g++) {
        int zero = (g->categories & IS_PFNZERO) != 0;
        uint64_t clear = g->start; /* populated, not saved: was absent */
        while (i < f->n_saved && f->saved[i].end <= g->start)
            i++;
        for (; i < f->n_saved && f->saved[i].start < g->end; i++) {
            const struct pl_saved *s = &f->saved[i];
            if (!zero && clear < s->start) {
                put(w, clear, s->start, NULL);
                w->f->zeroed += (s->start - clear) / PAGE;
            }
            if (!zero || s->offset != ~0ULL)
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
    while (i < f->n_saved && f->saved[i].start < span->end)
        i++;
    return i;
}

/* Saved contents of a private span where nothing is populated now. -1 with errno. */
static int plan_dropped(struct plan *w, const struct pl_span *span, uint64_t n, uint64_t i) {
    const struct pm_arg absent = {.inverted = POPULATED, .mask = POPULATED, .ret = IS_PRESENT};
    struct pl_fast *f = w->f;
    int64_t got = scan(f, span, n, &absent);
    for (int64_t r = 0; r < got; r++) {
        const struct pl_region *g = &f->regions[n + (uint64_t)r];
        while (i < f->n_saved && f->saved[i].end <= g->start)
            i++;
        for (; i < f->n_saved && f->saved[i].start < g->end; i++) {
            if (f->saved[i].offset != ~0ULL)
                restore(w, &f->saved[i], g->start, g->end);
            if (f->saved[i].end > g->end)
                break;
        }
    }
    return got < 0 ? -1 : 0;
}

/* Protect what is written, guard pages aside (they have no contents, and must go on being counted). */
static int arm_range(struct pl_fast *f, uint64_t start, uint64_t end) {
    const uint64_t guard = f->guard_known ? IS_GUARD : 0;
    struct pm_arg arg = {.size = sizeof arg, .flags = 1 /* PM_SCAN_WP_MATCHING */, .start = start, .end = end,
                         .inverted = guard, .mask = IS_WRITTEN | guard, .anyof = POPULATED};
    return ioctl(f->pagemap_fd, (unsigned long)PM_SCAN, &arg) < 0 ? -1 : 0;
}

static int arm(struct pl_fast *f) {
    for (uint64_t i = 0; i < f->n_spans; i++)
        if (arm_range(f, f->spans[i].start, f->spans[i].end))
            return -1;
    return 0;
}

/* Only what was just written (few places: one call each beats a walk over everything). */
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
static int make_plan(struct plan *w, uint64_t *first) {
    struct pl_fast *f = w->f;
    uint64_t row = 0, guards = collect(f, first);
    if (guards == ~0ULL || guards != f->guard_pages) {
        f->error = guards == ~0ULL ? errno : 0;
        return guards == ~0ULL && errno != E2BIG ? WHY_SCAN : WHY_MAPS;
    }
    for (uint64_t i = 0; i < f->n_spans; i++) {
        const struct pl_span *span = &f->spans[i];
        while (row < f->n_saved && f->saved[row].end <= span->start)
            row++;
        uint64_t next = plan_written(w, span, f->regions + first[i], f->regions + first[i + 1], row);
        if (!span->shared && row < next && plan_dropped(w, span, first[f->n_spans], row)) {
            f->error = errno;
            return errno == E2BIG ? WHY_MAPS : WHY_SCAN;
        }
        row = next;
    }
    f->error = w->failed;
    return w->failed ? WHY_HOLD : WHY_OK;
}

int pl_fast_memory(struct pl_fast *f) {
    uint64_t *first = calloc(f->n_spans + 1, sizeof *first);
    struct plan w = {.f = f};
    int64_t begin = now_ns(), planned, written;
    int why = WHY_HOLD;
    f->error = ENOMEM;
    if (first) {
        why = make_plan(&w, first);
        planned = now_ns();
        f->scan_ns = (uint64_t)(planned - begin);
    }
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
    free(first);
    free(w.local);
    free(w.remote);
    return why;
}
