/* Roll a process back thousands of times a second: everything of one rollback that is on the hot path.
 *
 * The saved contents lie in our memory; which pages differ is known from asynchronous write protection
 * (userfaultfd WP_ASYNC, armed and read by PAGEMAP_SCAN), so only written pages cross over, straight from the saved
 * buffer, and are armed again. Anything out of the ordinary (other threads, another vma list) is not handled here:
 * the answer says what, the process is let go untouched, and Python takes the slow way.
 *
 * Between two rollbacks the process is not traced: each one seizes afresh, because a seized thread would wait for
 * us at every signal.
 */
#include "pagelens.h"

#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ULL
#define BATCH 512
#define SETSIGMASK 0x420b
#define PM_SCAN 0xC0606610UL
#define PROCMAP_QUERY_IOCTL 0xC0686611UL
#define NEXT_VMA 0x10
#define IS_WRITTEN 2ULL
#define IS_FILE 4ULL
#define IS_PRESENT 8ULL
#define IS_SWAPPED 16ULL
#define IS_PFNZERO 32ULL
#define IS_GUARD 256ULL

struct pm_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, ret;
};
struct region {
    uint64_t start, end, categories;
};
struct procmap {
    uint64_t size, flags, addr, vma_start, vma_end, vma_flags, page_size, offset, inode;
    uint32_t dev_major, dev_minor, name_size, build_id_size;
    uint64_t name_addr, build_id_addr;
};

/* One mapping as PROCMAP_QUERY describes it: what must be unchanged for the fast way. */
struct pl_map {
    uint64_t start, end, flags, offset, inode, dev;
};
/* Saved pages [start, end): contents at data + offset, or zeros (offset == ~0). */
struct pl_saved {
    uint64_t start, end, offset;
};
/* A watched range; shared: a missing entry says nothing about the contents. */
struct pl_span {
    uint64_t start, end, shared;
};

struct pl_fast {
    int32_t pid, maps_fd, pagemap_fd, mem_fd;
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
    struct region *regions; /* scratch, n_regions */
    uint64_t n_regions;
    /* results */
    uint64_t written, zeroed, hold_ns, stop_ns, check_ns, scan_ns, write_ns, arm_ns;
    int32_t error, why; /* errno, and a PL_WHY */
};
enum { WHY_OK, WHY_THREADS, WHY_MAPS, WHY_HOLD, WHY_SCAN, WHY_WRITE, WHY_REGS, WHY_GONE };

static int64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

static long trace(long what, pid_t tid, unsigned long addr, void *data) {
    return syscall(SYS_ptrace, what, tid, addr, data);
}

/* The mapping list. -1 where the kernel has no PROCMAP_QUERY (before 6.11) or there are more than max. */
PL_EXPORT long pl_maps(int maps_fd, struct pl_map *out, uint64_t max);
PL_EXPORT long pl_maps(int maps_fd, struct pl_map *out, uint64_t max) {
    uint64_t n = 0;
    struct procmap q;
    memset(&q, 0, sizeof q);
    for (uint64_t at = 0;;) {
        q.size = sizeof q;
        q.flags = NEXT_VMA;
        q.addr = at;
        q.name_size = q.build_id_size = 0;
        if (ioctl(maps_fd, PROCMAP_QUERY_IOCTL, &q)) {
            if (errno == ENOENT)
                return (long)n;
            return -errno;
        }
        if (n == max)
            return -E2BIG;
        memset(&out[n], 0, sizeof out[n]);
        out[n++] = (struct pl_map){q.vma_start, q.vma_end, q.vma_flags, q.offset, q.inode,
                                   (uint64_t)q.dev_major << 32 | q.dev_minor};
        at = q.vma_end;
    }
}

static int same_maps(struct pl_fast *f) {
    struct procmap q;
    memset(&q, 0, sizeof q);
    uint64_t at = 0;
    for (uint64_t i = 0;; i++) {
        q.size = sizeof q;
        q.flags = NEXT_VMA;
        q.addr = at;
        q.name_size = q.build_id_size = 0;
        if (ioctl(f->maps_fd, PROCMAP_QUERY_IOCTL, &q))
            return errno == ENOENT && i == f->n_maps;
        const struct pl_map *m = &f->maps[i];
        if (i == f->n_maps || m->start != q.vma_start || m->end != q.vma_end || m->flags != q.vma_flags ||
            m->offset != q.offset || m->inode != q.inode)
            return 0;
        at = q.vma_end;
    }
}

/* The threads are exactly the saved ones. */
static int same_threads(struct pl_fast *f) {
    char path[40], buf[4096];
    uint64_t n = 0;
    char *p = path;
    const char *prefix = "/proc/";
    while (*prefix)
        *p++ = *prefix++;
    char digits[12];
    int k = 0;
    for (int32_t v = f->pid; v; v /= 10)
        digits[k++] = (char)('0' + v % 10);
    while (k)
        *p++ = digits[--k];
    memcpy(p, "/task", 6);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    int ok = 1;
    for (long got; ok && (got = syscall(SYS_getdents64, fd, buf, sizeof buf)) > 0;)
        for (long at = 0; at < got;) {
            uint16_t len;
            memcpy(&len, buf + at + 16, 2);
            const char *name = buf + at + 19;
            at += len;
            if (*name == '.')
                continue;
            int32_t tid = atoi(name);
            uint64_t i = 0;
            while (i < f->n_threads && f->tids[i] != tid)
                i++;
            if (i == f->n_threads)
                ok = 0;
            n++;
        }
    close(fd);
    return ok && n == f->n_threads;
}

static int wait_stop(pid_t tid, int64_t deadline, int *status) {
    struct timespec nap = {0, 20000};
    for (int spins = 0;; spins++) {
        siginfo_t info;
        info.si_pid = 0;
        int failed = waitid(P_PID, (id_t)tid, &info, WSTOPPED | WEXITED | WNOWAIT | WNOHANG | __WALL);
        if (failed && errno != EINTR)
            return -1;
        if (!failed && info.si_pid) {
            if (info.si_code != CLD_TRAPPED && info.si_code != CLD_STOPPED) {
                errno = ESRCH;
                return -1;
            }
            if (waitpid(tid, status, __WALL | WNOHANG) == tid && WIFSTOPPED(*status))
                return 0;
        }
        if (now_ns() > deadline) {
            errno = ETIMEDOUT;
            return -1;
        }
        if (spins > 200)
            nanosleep(&nap, NULL);
        else
            sched_yield();
    }
}

struct writer {
    struct pl_fast *f;
    struct iovec local[BATCH], remote[BATCH];
    size_t n, total;
    struct {
        uint64_t start, end;
    } done[64]; /* the first places written, neighbours joined; total counts all */
    int failed;
};

static uint8_t zeros[64 * 4096] __attribute__((aligned(4096)));

static void flush(struct writer *w) {
    size_t want = 0;
    for (size_t i = 0; i < w->n; i++)
        want += w->remote[i].iov_len;
    if (!want)
        return;
    ssize_t got = process_vm_writev(w->f->pid, w->local, w->n, w->remote, w->n, 0);
    if (got < 0 && errno == ESRCH) {
        w->failed = ESRCH;
    } else if ((size_t)(got < 0 ? 0 : got) != want) {
        /* A mapping that is not writable now: /proc/PID/mem writes to private ones all the same. */
        for (size_t i = 0; i < w->n; i++)
            for (size_t at = 0; at < w->remote[i].iov_len; at += PAGE)
                if (pwrite(w->f->mem_fd, (uint8_t *)w->local[i].iov_base + at, PAGE,
                           (off_t)((uintptr_t)w->remote[i].iov_base + at)) != (ssize_t)PAGE)
                    w->failed = errno ? errno : EIO;
    }
    w->n = 0;
}

static void put(struct writer *w, uint64_t start, uint64_t end, const uint8_t *from) {
    const size_t room = sizeof w->done / sizeof *w->done;
    if (w->total && w->total <= room && w->done[w->total - 1].end == start) {
        w->done[w->total - 1].end = end;
    } else if (start < end) {
        if (w->total < room) {
            w->done[w->total].start = start;
            w->done[w->total].end = end;
        }
        w->total++;
    }
    while (start < end) {
        uint64_t len = end - start;
        if (!from && len > sizeof zeros)
            len = sizeof zeros;
        if (w->n == BATCH)
            flush(w);
        w->local[w->n].iov_base = from ? (void *)(uintptr_t)from : zeros;
        w->remote[w->n].iov_base = (void *)(uintptr_t)start;
        w->local[w->n].iov_len = w->remote[w->n].iov_len = len;
        w->n++;
        start += len;
        if (from)
            from += len;
    }
}

/* Restore the part of saved row `s` that lies in [from, to). */
static void restore(struct writer *w, const struct pl_saved *s, uint64_t from, uint64_t to) {
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

/* All that is populated in the spans, into f->regions; where each span's begin goes to first[]. The number of guard
 * pages, or ~0 with errno. */
static uint64_t collect(struct pl_fast *f, uint64_t *first) {
    struct pm_arg arg;
    uint64_t n = 0, guards = 0;
    for (uint64_t i = 0; i < f->n_spans; i++) {
        first[i] = n;
        memset(&arg, 0, sizeof arg);
        arg.size = sizeof arg;
        arg.anyof = IS_PRESENT | IS_SWAPPED;
        arg.ret = IS_WRITTEN | IS_PFNZERO | (f->guard_known ? IS_GUARD : 0);
        arg.end = f->spans[i].end;
        for (arg.start = f->spans[i].start; arg.start < arg.end; arg.start = arg.walk_end) {
            if (n == f->n_regions) {
                errno = E2BIG;
                return ~0ULL;
            }
            arg.vec = (uint64_t)(uintptr_t)(f->regions + n);
            arg.vec_len = f->n_regions - n;
            int got = ioctl(f->pagemap_fd, (unsigned long)PM_SCAN, &arg);
            if (got < 0 || arg.walk_end <= arg.start) {
                errno = got < 0 ? errno : EPROTO;
                return ~0ULL;
            }
            /* Guard markers look like swap entries, and are no contents. */
            uint64_t kept = n;
            for (int r = 0; r < got; r++) {
                struct region g = f->regions[n + (uint64_t)r];
                if (g.categories & IS_GUARD)
                    guards += (g.end - g.start) / PAGE;
                else
                    f->regions[kept++] = g;
            }
            n = kept;
        }
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

/* One span: walk what is populated and what was saved side by side. */
static void one_span(struct writer *w, const struct pl_span *span, const struct region *from, const struct region *to,
                     uint64_t *row) {
    struct pl_fast *f = w->f;
    uint64_t i = *row, at = span->start; /* everything below `at` is settled */
    while (i < f->n_saved && f->saved[i].end <= span->start)
        i++;
    for (const struct region *g = from; g < to; g++) {
        /* Saved contents where nothing is populated now: dropped since (MADV_DONTNEED). */
        while (i < f->n_saved && f->saved[i].start < g->start) {
            if (!span->shared && f->saved[i].offset != ~0ULL)
                restore(w, &f->saved[i], at, g->start);
            if (f->saved[i].end > g->start)
                break;
            i++;
        }
        int written = (g->categories & IS_WRITTEN) != 0, zero = (g->categories & IS_PFNZERO) != 0;
        uint64_t clear = g->start; /* populated, not saved: was absent */
        while (i < f->n_saved && f->saved[i].start < g->end) {
            const struct pl_saved *s = &f->saved[i];
            uint64_t a = s->start > g->start ? s->start : g->start;
            if (written && !zero && clear < a) {
                put(w, clear, a, NULL);
                f->zeroed += (a - clear) / PAGE;
            }
            if (written && !(zero && s->offset == ~0ULL))
                restore(w, s, g->start, g->end);
            clear = s->end < g->end ? s->end : g->end;
            if (s->end > g->end)
                break;
            i++;
        }
        if (written && !zero && clear < g->end) {
            put(w, clear, g->end, NULL);
            f->zeroed += (g->end - clear) / PAGE;
        }
        at = g->end;
    }
    while (i < f->n_saved && f->saved[i].start < span->end) {
        if (!span->shared && f->saved[i].offset != ~0ULL)
            restore(w, &f->saved[i], at, span->end);
        if (f->saved[i].end > span->end)
            break;
        i++;
    }
    *row = i;
}

static int arm_range(struct pl_fast *f, uint64_t start, uint64_t end) {
    struct pm_arg arg;
    memset(&arg, 0, sizeof arg);
    arg.size = sizeof arg;
    arg.flags = 1; /* PM_SCAN_WP_MATCHING */
    arg.start = start;
    arg.end = end;
    arg.mask = IS_WRITTEN;
    arg.anyof = IS_PRESENT | IS_SWAPPED;
    return ioctl(f->pagemap_fd, (unsigned long)PM_SCAN, &arg) < 0 ? -1 : 0;
}

static int arm(struct pl_fast *f) {
    for (uint64_t i = 0; i < f->n_spans; i++)
        if (arm_range(f, f->spans[i].start, f->spans[i].end))
            return -1;
    return 0;
}

/* Only what was just written (few places: one call each beats a walk over everything). */
static int arm_again(struct pl_fast *f, const struct writer *w) {
    if (w->total > sizeof w->done / sizeof *w->done)
        return arm(f);
    for (size_t i = 0; i < w->total; i++)
        if (arm_range(f, w->done[i].start, w->done[i].end))
            return -1;
    return 0;
}

PL_EXPORT int pl_fast_arm(struct pl_fast *f);
PL_EXPORT int pl_fast_arm(struct pl_fast *f) { return arm(f) ? -errno : 0; }

static int restore_memory(struct pl_fast *f, int check_only) {
    uint64_t row = 0, *first = calloc(f->n_spans + 1, sizeof *first);
    struct writer *w = malloc(sizeof *w);
    int why = WHY_OK;
    int64_t begin = now_ns(), scanned, done;
    uint64_t guards = first && w ? collect(f, first) : ~0ULL;
    scanned = now_ns();
    f->scan_ns = (uint64_t)(scanned - begin);
    if (guards == ~0ULL || guards != f->guard_pages) {
        f->error = guards == ~0ULL ? errno : 0;
        why = guards == ~0ULL && errno != E2BIG ? WHY_SCAN : WHY_MAPS;
    } else if (!check_only) {
        w->f = f;
        w->n = w->total = 0;
        w->failed = 0;
        for (uint64_t i = 0; i < f->n_spans; i++)
            one_span(w, &f->spans[i], f->regions + first[i], f->regions + first[i + 1], &row);
        flush(w);
        done = now_ns();
        f->write_ns = (uint64_t)(done - scanned);
        if (w->failed || arm_again(f, w)) {
            f->error = w->failed ? w->failed : errno;
            why = WHY_WRITE;
        }
        f->arm_ns = (uint64_t)(now_ns() - done);
    }
    free(first);
    free(w);
    return why;
}

static int restore_threads(struct pl_fast *f) {
    for (uint64_t i = 0; i < f->n_threads; i++) {
        struct iovec iov = {(void *)(uintptr_t)(f->xstate + i * f->xstate_size), f->xstate_len[i]};
        struct user_regs_struct regs = f->regs[i];
        uint64_t mask = f->sigmask[i];
        if (trace(PTRACE_SETREGSET, f->tids[i], NT_X86_XSTATE, &iov) || trace(PTRACE_SETREGS, f->tids[i], 0, &regs) ||
            trace(SETSIGMASK, f->tids[i], 8, &mask)) {
            f->error = errno;
            return WHY_REGS;
        }
    }
    return WHY_OK;
}

/* One rollback. 0, or see why and error. The process is let go in every case. */
PL_EXPORT int pl_fast_rollback(struct pl_fast *f, int check_only);
PL_EXPORT int pl_fast_rollback(struct pl_fast *f, int check_only) {
    int64_t begin = now_ns(), deadline = begin + 2000000000LL;
    uint64_t seized = 0, stopped = 0;
    int *status = calloc(f->n_threads, sizeof *status);
    f->written = f->zeroed = 0;
    f->error = 0;
    f->why = WHY_HOLD;
    if (!status) {
        f->error = ENOMEM;
        return f->why;
    }
    for (; seized < f->n_threads; seized++)
        if (trace(PTRACE_SEIZE, f->tids[seized], 0, NULL) || trace(PTRACE_INTERRUPT, f->tids[seized], 0, NULL)) {
            f->error = errno;
            break;
        }
    int ok = seized == f->n_threads;
    for (; stopped < seized; stopped++)
        if (wait_stop(f->tids[stopped], deadline, &status[stopped])) {
            f->error = errno;
            ok = 0;
            status[stopped] = 0;
        }
    f->stop_ns = (uint64_t)(now_ns() - begin);
    if (ok) {
        f->why = !same_threads(f) ? WHY_THREADS : !same_maps(f) ? WHY_MAPS : WHY_OK;
        f->check_ns = (uint64_t)(now_ns() - begin) - f->stop_ns;
        if (f->why == WHY_OK) {
            f->why = restore_memory(f, check_only);
            if (f->why == WHY_OK && !check_only)
                f->why = restore_threads(f);
        }
    }
    for (uint64_t i = 0; i < seized; i++) {
        /* A signal that was about to be delivered is delivered now. */
        unsigned long sig = status[i] && !(status[i] >> 16) ? (unsigned long)WSTOPSIG(status[i]) : 0;
        trace(PTRACE_DETACH, f->tids[i], 0, (void *)sig);
    }
    free(status);
    f->hold_ns = (uint64_t)(now_ns() - begin);
    return f->why;
}
