/* Threads that rewrite pages for ever, such that any instant can be checked from memory alone.
 * scribe THREADS PAGES FILE [PAUSE]: prints "ready CONTROL" (address of struct control), then works until killed.
 *
 * Thread t owns PAGES pages. It takes page p = step % PAGES and stores word k = mix(t, p, version, k) for
 * k = 0..511, raising cursor.word after each store; then it raises version[p] and goes to the next page. So at
 * any instant words below the cursor are of version+1, those above of version; the one at it is either. With PAUSE
 * it sleeps so many us in the middle of each page, so that it is mostly caught there, and leaves CPUs to others.
 * Beside that lie memory of each other sort, with contents that never change.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX 8
struct owner {
    volatile uint64_t page, word, steps, pad;
    uint64_t base, versions;
};
struct control {
    uint64_t threads, pages;
    struct owner owner[MAX];
    /* fixed contents, each `fixed_pages` long and filled with byte pattern(kind) */
    uint64_t fixed_pages, hidden, locked, shared_a, shared_b, copied, zero, guard, huge, untouched;
};

static struct control *control;
static useconds_t pause_us;

static uint64_t mix(uint64_t t, uint64_t p, uint64_t v, uint64_t k) {
    uint64_t x = (t + 1) * 0x9E3779B97F4A7C15ULL ^ (p + 1) * 0xC2B2AE3D27D4EB4FULL ^ v * 0x165667B19E3779F9ULL ^ k;
    return x * 0xD6E8FEB86659FD93ULL;
}

static void *work(void *arg) {
    uint64_t t = (uintptr_t)arg;
    struct owner *me = &control->owner[t];
    uint64_t *version = (uint64_t *)me->versions;
    for (uint64_t step = 0;; step++) {
        uint64_t p = step % control->pages, v = version[p] + 1;
        volatile uint64_t *page = (uint64_t *)(me->base + p * 4096);
        me->word = 0;
        me->page = p;
        for (uint64_t k = 0; k < 512; k++) {
            page[k] = mix(t, p, v, k);
            me->word = k + 1;
            if (pause_us && k == (step * 37 & 511))
                usleep(pause_us);
        }
        /* version and cursor cannot change in one store: page = -1 says that all words are of version or +1 */
        me->page = p | 1ULL << 63;
        ((volatile uint64_t *)version)[p] = v;
        me->steps = step + 1;
    }
    return NULL;
}

static void *area(size_t bytes, int prot, int flags, int fd) {
    void *p = mmap(NULL, bytes, prot, flags, fd, 0);
    if (p == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return p;
}

int main(int argc, char **argv) {
    uint64_t threads = argc > 1 ? strtoull(argv[1], 0, 0) : 2, pages = argc > 2 ? strtoull(argv[2], 0, 0) : 64;
    const int anon = MAP_PRIVATE | MAP_ANONYMOUS, rw = PROT_READ | PROT_WRITE;
    size_t fixed = 4, len = fixed * 4096;
    control = area(sizeof *control, rw, anon, -1);
    control->threads = threads;
    control->pages = pages;
    control->fixed_pages = fixed;
    memset((void *)(control->hidden = (uint64_t)area(len, rw, anon, -1)), 0x11, len);
    mprotect((void *)control->hidden, len, PROT_NONE);
    memset((void *)(control->locked = (uint64_t)area(len, rw, anon, -1)), 0x22, len);
    mlock((void *)control->locked, len);
    int fd = memfd_create("scribe", 0);
    if (ftruncate(fd, (off_t)len)) return 1;
    control->shared_a = (uint64_t)area(len, rw, MAP_SHARED, fd);
    control->shared_b = (uint64_t)area(len, rw, MAP_SHARED, fd);
    memset((void *)control->shared_a, 0x33, len - 4096);
    pause_us = argc > 4 ? (useconds_t)strtoul(argv[4], 0, 0) : 0;
    if (argc > 3) {
        int file = open(argv[3], O_RDWR | O_CREAT, 0600);
        for (size_t i = 0; i < len; i += 4096) {
            char page[4096];
            memset(page, 0x55, sizeof page);
            if (write(file, page, sizeof page) != sizeof page) return 1;
        }
        control->copied = (uint64_t)area(len, rw, MAP_PRIVATE, file);
        memset((void *)(control->copied + 4096), 0x44, 4096); /* one copied, one only read, two not touched */
        *(volatile char *)control->copied;
    }
    control->zero = (uint64_t)area(len, rw, anon, -1);
    for (size_t i = 0; i < len; i += 4096)
        *(volatile char *)(control->zero + i);
    control->guard = (uint64_t)area(len, rw, anon, -1);
    memset((void *)control->guard, 0x66, len);
    madvise((void *)(control->guard + 4096), 4096, 102 /* MADV_GUARD_INSTALL */);
    char *big = area(4 << 20, rw, anon, -1);
    big = (char *)(((uintptr_t)big + (2 << 20) - 1) & ~((2ULL << 20) - 1));
    madvise(big, 2 << 20, MADV_HUGEPAGE);
    memset(big, 0x77, 2 << 20);
    control->huge = (uint64_t)big;
    control->untouched = (uint64_t)area(len, rw, anon, -1);
    for (uint64_t t = 0; t < threads; t++) {
        control->owner[t].versions = (uint64_t)area(pages * 8, rw, anon, -1);
        control->owner[t].base = (uint64_t)area(pages * 4096, rw, anon, -1);
        for (uint64_t p = 0; p < pages; p++)
            for (uint64_t k = 0; k < 512; k++)
                ((uint64_t *)control->owner[t].base)[p * 512 + k] = mix(t, p, 0, k);
        control->owner[t].page = 1ULL << 63;
    }
    for (uint64_t t = 0; t < threads; t++) {
        pthread_t thread;
        pthread_create(&thread, NULL, work, (void *)(uintptr_t)t);
    }
    for (uint64_t t = 0; t < threads; t++)
        while (!control->owner[t].steps)
            usleep(1000);
    printf("ready %#lx\n", (unsigned long)control);
    fflush(stdout);
    for (;;)
        pause();
}
