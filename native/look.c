/* Helpers of `linux` (procfs readers and probes): bulk preads without a Python loop, and the soft-dirty trial in
 * a child, because clearing soft-dirty bits is for a whole process and must not disturb the one that asks. */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pagelens.h"

/* Read `count[i]` 8-byte entries from index `first[i]` of fd, for each of n runs, one after another into out.
 * Returns 0, or -errno at the first failure. Entries beyond the end of the file stay as they are in out. */
PL_EXPORT int pl_pread_u64(int fd, size_t n, const uint64_t *first, const uint64_t *count, uint64_t *out);
PL_EXPORT int pl_pread_u64(int fd, size_t n, const uint64_t *first, const uint64_t *count, uint64_t *out)
{
    for (size_t i = 0; i < n; i++) {
        size_t want = count[i] * 8, done = 0;
        while (done < want) {
            size_t chunk = want - done < (2u << 20) ? want - done : (2u << 20);
            ssize_t got = pread(fd, (char *)out + done, chunk, (off_t)(first[i] * 8 + done));
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) return -errno;
            if (got == 0) break;
            done += (size_t)got;
        }
        out += count[i];
    }
    return 0;
}

static int bit55(int fd, const void *page)
{
    uint64_t entry;
    if (pread(fd, &entry, 8, (off_t)((uintptr_t)page >> 12) * 8) != 8) _exit(3);
    return (int)(entry >> 55 & 1);
}

static void soft_dirty_child(void)
{
    /* Raw calls only: this is a copy of one thread of a program that may have had others. */
    volatile char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    int refs = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
    if (page == MAP_FAILED || map < 0 || refs < 0) _exit(3);
    *page = 1;
    if (write(refs, "4", 1) != 1) _exit(2);
    int cleared = bit55(map, (const void *)page);
    *page = 2;
    _exit(!cleared && bit55(map, (const void *)page) ? 0 : 1);
}

/* Does this kernel keep soft-dirty bits? 0 yes; 1 the clear works and the bit never comes back (no
 * CONFIG_MEM_SOFT_DIRTY); 2 the clear is refused; 3 pagemap or clear_refs cannot be opened; -errno no child. */
PL_EXPORT int pl_probe_soft_dirty(void);
PL_EXPORT int pl_probe_soft_dirty(void)
{
    int status;
    pid_t pid = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (pid < 0) return -errno;
    if (pid == 0) soft_dirty_child();
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR) return -errno;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 3;
}
