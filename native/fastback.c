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
#include "fastback.h"
#include "inject.h"

#include <elf.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SETSIGMASK 0x420b
#define PROCMAP_QUERY_IOCTL 0xC0686611UL
#define NEXT_VMA 0x10

struct procmap {
    uint64_t size, flags, addr, vma_start, vma_end, vma_flags, page_size, offset, inode;
    uint32_t dev_major, dev_minor, name_size, build_id_size;
    uint64_t name_addr, build_id_addr;
};

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

/* The threads are exactly the saved ones: all those are held, and there are no more (proc_task_getattr adds the number
 * of threads to the link count of /proc/PID/task). */
static int same_threads(struct pl_fast *f) {
    struct stat task;
    return !fstat(f->task_fd, &task) && task.st_nlink == 2 + f->n_threads;
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
PL_EXPORT int pl_fast_rollback(struct pl_fast *f);
PL_EXPORT int pl_fast_rollback(struct pl_fast *f) {
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
            f->why = pl_fast_memory(f);
            if (f->why == WHY_OK)
                f->why = restore_threads(f);
        }
    }
    for (uint64_t i = 0; i < seized; i++) {
        if (f->why != WHY_OK && status[i] >> 16 && WSTOPSIG(status[i]) == SIGTRAP)
            pl_undo_eintr(f->tids[i]); /* it was not put back, so it goes on from here */
        /* A signal that was about to be delivered is delivered now. */
        unsigned long sig = status[i] && !(status[i] >> 16) ? (unsigned long)WSTOPSIG(status[i]) : 0;
        trace(PTRACE_DETACH, f->tids[i], 0, (void *)sig);
    }
    free(status);
    f->hold_ns = (uint64_t)(now_ns() - begin);
    return f->why;
}
