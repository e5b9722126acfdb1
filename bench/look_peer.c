/* The least that any program must do for `map` and `pages`: read the same files of the same process in C.
 *   look_peer hold              reserves 16 GiB, touches 1 GiB of it, prints its pid, waits
 *   look_peer map PID REPEAT    reads smaps whole and sums Rss: wall and CPU microseconds of each pass
 *   look_peer pages PID REPEAT  reads maps, then pagemap of every vma whole, counts present pages: likewise
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static char text[1 << 20];
static uint64_t entries[1 << 18];

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static int hold(void)
{
    size_t reserved = 16UL << 30;
    char *p = mmap(NULL, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return 1;
    /* 1 GiB in sixteen pieces, one in each GiB */
    for (size_t piece = 0; piece < 16; piece++)
        for (size_t at = 0; at < 64UL << 20; at += 4096) p[(piece << 30) + at] = 1;
    printf("%d\n", (int)getpid());
    fflush(stdout);
    pause();
    return 0;
}

static size_t slurp(const char *path, char **out)
{
    int fd = open(path, O_RDONLY);
    size_t have = 0, room = 1 << 20;
    char *data = malloc(room);
    for (ssize_t n; (n = read(fd, text, sizeof text)) > 0; have += n) {
        if (have + n + 1 > room) data = realloc(data, room *= 2);
        memcpy(data + have, text, n);
    }
    close(fd);
    data[have] = 0;
    *out = data;
    return have;
}

static unsigned long map_pass(int pid)
{
    char path[64], *data;
    unsigned long rss = 0;
    snprintf(path, sizeof path, "/proc/%d/smaps", pid);
    slurp(path, &data);
    for (char *line = strtok(data, "\n"); line; line = strtok(NULL, "\n"))
        if (!strncmp(line, "Rss:", 4)) rss += strtoul(line + 4, NULL, 10);
    free(data);
    return rss;
}

static unsigned long pages_pass(int pid)
{
    char path[64], *data;
    unsigned long present = 0;
    snprintf(path, sizeof path, "/proc/%d/maps", pid);
    slurp(path, &data);
    snprintf(path, sizeof path, "/proc/%d/pagemap", pid);
    int fd = open(path, O_RDONLY);
    for (char *line = strtok(data, "\n"); line; line = strtok(NULL, "\n")) {
        unsigned long start, end;
        if (sscanf(line, "%lx-%lx", &start, &end) != 2 || start >> 63) continue;
        for (unsigned long at = start; at < end;) {
            size_t want = (end - at) / 4096;
            if (want > sizeof entries / 8) want = sizeof entries / 8;
            ssize_t got = pread(fd, entries, want * 8, at / 4096 * 8);
            if (got <= 0) break;
            for (ssize_t i = 0; i < got / 8; i++) present += entries[i] >> 63;
            at += got / 8 * 4096UL;
        }
    }
    close(fd);
    free(data);
    return present;
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "hold")) return hold();
    if (argc != 4) return 2;
    for (int i = atoi(argv[3]); i > 0; i--) {
        double start = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
        unsigned long found = argv[1][0] == 'm' ? map_pass(atoi(argv[2])) : pages_pass(atoi(argv[2]));
        cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
        printf("%.0f %.0f %lu\n", now(CLOCK_MONOTONIC) - start, cpu, found);
    }
    return 0;
}
