/* Case 3: one of each kind of present page that kpagecount does not count, and some that it does.
 * Prints its pid, then (at the first line of input) the addresses: zero huge-zero ring written file. */
#include <linux/perf_event.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static char *map(size_t size)
{
    return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

int main(void)
{
    char line[256], c;
    volatile char sink;
    int n = snprintf(line, sizeof line, "%d\n", (int)getpid());
    if (write(1, line, n) < 0) return 3;

    char *zero = map(4 * 4096);
    sink = zero[0];
    sink = zero[3 * 4096];
    char *base = map(4 << 20), *huge = (char *)(((unsigned long)base + (2 << 20) - 1) & -(2UL << 20));
    madvise(huge, 2 << 20, MADV_HUGEPAGE);
    sink = huge[0];
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now); /* the vdso reads vvar */
    struct perf_event_attr attr = {.type = PERF_TYPE_SOFTWARE, .size = sizeof attr,
                                   .config = PERF_COUNT_SW_DUMMY, .exclude_kernel = 1};
    int fd = (int)syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0);
    char *ring = fd < 0 ? NULL : mmap(NULL, 2 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (ring == MAP_FAILED) ring = NULL;
    if (ring) sink = ring[0], sink = ring[4096];
    char *written = map(2 * 4096);
    written[0] = written[4096] = 1;
    (void)sink;

    while (read(0, &c, 1) == 1) {
        if (c != '\n') continue;
        n = snprintf(line, sizeof line, "%lx %lx %lx %lx %lx\n", (long)zero, (long)huge, (long)ring, (long)written,
                     (long)main & ~4095L);
        if (write(1, line, n) < 0) return 3;
    }
    return 0;
}
