/* Write many pages into a process that stands still, on all CPUs that are idle.
 *
 * process_vm_writev takes 0.3 to 0.5 us for a page beside the last one and twice that for one by itself, most of which
 * is not copying (pinning, the page's lock). So from some hundred pages on a second thread shares the work; threads
 * wait for it from the first use on, because making one takes as long as 100 pages. Rejected: helpers whatever the load
 * (one that waits for a CPU with a batch in its hands keeps the process standing still: 8 to 17 ms in place of 3 to 5
 * at a load of 11); code in the process itself that copies from a shared mapping (at the speed of memcpy, but our death
 * would leave it in that code).
 */
#include "fastback.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BATCH_MOST 512 /* pages of one call, one iovec over */
#define BATCH_LEAST 32
#define PAGES_A_THREAD 128 /* less is not worth waking a thread (10 us, and 40 until it runs) */
#define MAX_THREADS 4

/* What is listed, in batches that any thread may take. It lives until the last thread has let go of it: one that gets
 * no CPU before all is done is not waited for. */
struct work {
    int pid, mem_fd;
    struct iovec *local, *remote;
    size_t *batch; /* index of its first iovec; batches + 1 of them */
    size_t batches;
    atomic_size_t next, finished;
    atomic_int failed, users;
};

static int write_batch(const struct work *k, size_t from, size_t to) {
    const struct iovec *local = k->local + from, *remote = k->remote + from;
    size_t n = to - from, want = 0;
    int failed = 0;
    for (size_t i = 0; i < n; i++)
        want += remote[i].iov_len;
    ssize_t got = process_vm_writev(k->pid, local, n, remote, n, 0);
    if (got < 0 && errno == ESRCH)
        return ESRCH;
    if ((size_t)(got < 0 ? 0 : got) == want)
        return 0;
    /* A mapping that is not writable now: /proc/PID/mem writes to private ones all the same. */
    for (size_t i = 0; i < n; i++)
        for (size_t at = 0; at < remote[i].iov_len; at += PAGE)
            if (pwrite(k->mem_fd, (uint8_t *)local[i].iov_base + at, PAGE,
                       (off_t)((uintptr_t)remote[i].iov_base + at)) != (ssize_t)PAGE)
                failed = errno ? errno : EIO;
    return failed;
}

static void take_batches(struct work *k) {
    for (size_t b; (b = atomic_fetch_add(&k->next, 1)) < k->batches;) {
        int failed = write_batch(k, k->batch[b], k->batch[b + 1]);
        if (failed)
            atomic_store(&k->failed, failed);
        atomic_fetch_add(&k->finished, 1);
    }
}

static void let_go(struct work *k) {
    if (atomic_fetch_sub(&k->users, 1) != 1)
        return;
    free(k->local);
    free(k->remote);
    free(k->batch);
    free(k);
}

/* Threads that wait for work. Only the poster of `work` and those who hold the lock look at it. */
static struct {
    pthread_mutex_t lock;
    struct work *work;
    atomic_uint posted; /* a futex */
    uint64_t threads;
    pid_t owner; /* a forked child has none of them */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void *help(void *unused) {
    (void)unused;
    for (unsigned seen = 0;;) {
        unsigned now = atomic_load(&pool.posted);
        if (now == seen) {
            syscall(SYS_futex, &pool.posted, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
            continue;
        }
        seen = now;
        pthread_mutex_lock(&pool.lock);
        struct work *k = pool.work;
        if (k)
            atomic_fetch_add(&k->users, 1);
        pthread_mutex_unlock(&pool.lock);
        if (k) {
            take_batches(k);
            let_go(k);
        }
    }
    return NULL;
}

static void add_threads(uint64_t wanted) {
    pthread_attr_t detached;
    pthread_t thread;
    sigset_t all, old;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (pool.threads < wanted && !pthread_create(&thread, &detached, help, NULL))
        pool.threads++;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&detached);
}

/* Let `wanted` threads help with it, until `recall`; another's work in the pool: none. */
static void post(struct work *k, uint64_t wanted) {
    if (!wanted || pthread_mutex_trylock(&pool.lock))
        return;
    if (pool.owner != getpid()) {
        pool.owner = getpid();
        pool.threads = 0;
        pool.work = NULL;
    }
    if (!pool.work) {
        add_threads(wanted);
        pool.work = k;
        atomic_fetch_add(&pool.posted, 1);
        syscall(SYS_futex, &pool.posted, FUTEX_WAKE_PRIVATE, wanted < INT_MAX ? (int)wanted : INT_MAX, NULL, NULL, 0);
    }
    pthread_mutex_unlock(&pool.lock);
}

static void recall(struct work *k) {
    pthread_mutex_lock(&pool.lock);
    if (pool.work == k)
        pool.work = NULL;
    pthread_mutex_unlock(&pool.lock);
}

/* CPUs that nobody wants just now (/proc/loadavg counts the runnable threads of the system, us included). */
static uint64_t idle_cpus(void) {
    char text[64];
    cpu_set_t cpus;
    int fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    if (got <= 0 || sched_getaffinity(0, sizeof cpus, &cpus))
        return 0;
    text[got] = 0;
    const char *slash = strchr(text, '/');
    while (slash && slash > text && slash[-1] != ' ')
        slash--;
    uint64_t usable = (uint64_t)CPU_COUNT(&cpus), running = slash ? strtoul(slash, NULL, 10) : usable;
    return usable > running ? usable - running : 0;
}

/* How many threads shall help: where a CPU is idle; one that had to wait for a CPU with a batch in its hands would
 * keep the process standing still. */
static uint64_t helpers(uint64_t pages) {
    uint64_t most = pages / PAGES_A_THREAD;
    if (most < 2)
        return 0;
    uint64_t idle = idle_cpus();
    most = most > MAX_THREADS ? MAX_THREADS : most;
    return idle < most - 1 ? idle : most - 1;
}

int pl_write_all(struct pl_fast *f, struct iovec *local, struct iovec *remote, size_t n, uint64_t pages) {
    struct work *k = calloc(1, sizeof *k);
    size_t *batch = malloc((n + 1) * sizeof *batch);
    if (!k || !batch) {
        free(k);
        free(batch);
        free(local);
        free(remote);
        return -ENOMEM;
    }
    uint64_t threads = helpers(pages), batch_pages = pages / (8 * (threads + 1));
    if (!threads || batch_pages > BATCH_MOST)
        batch_pages = BATCH_MOST;
    if (batch_pages < BATCH_LEAST)
        batch_pages = BATCH_LEAST;
    *k = (struct work){.pid = f->pid, .mem_fd = f->mem_fd, .local = local, .remote = remote, .batch = batch};
    for (size_t at = 0, full = batch_pages; at < n; at++) {
        if (full >= batch_pages) {
            batch[k->batches++] = at;
            full = 0;
        }
        full += remote[at].iov_len / PAGE;
    }
    batch[k->batches] = n;
    atomic_store(&k->users, 1);
    post(k, threads);
    take_batches(k);
    while (atomic_load(&k->finished) < k->batches)
        sched_yield();
    if (threads)
        recall(k);
    int failed = atomic_load(&k->failed);
    let_go(k);
    return failed;
}
