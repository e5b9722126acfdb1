// Makes every call that shapes memory once; results do not matter, only that they are made.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#ifndef SYS_mseal
#define SYS_mseal 462
#endif
int main(int argc, char **argv) {
    if (argc > 1) return 0;
    long page = 4096;
    char *a = mmap(0, 64 * page, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(a, page, 1); mprotect(a, page, 3);
    syscall(SYS_pkey_mprotect, a, page, 3, -1);  // the C library makes it a plain mprotect
    char *b = mmap(0, 4 * page, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    b = mremap(b, 4 * page, 8 * page, MREMAP_MAYMOVE);
    madvise(a, page, MADV_DONTNEED);
    struct iovec v = {a, page};
    int self = syscall(SYS_pidfd_open, getpid(), 0);
    syscall(SYS_process_madvise, self, &v, 1, MADV_COLD, 0);
    void *top = sbrk(0); syscall(SYS_brk, (char *)top + page);
    mlock(a, page); mlock2(a, page, MLOCK_ONFAULT); munlock(a, page); mlockall(MCL_ONFAULT | MCL_CURRENT); munlockall();
    syscall(SYS_mbind, a, page, 0, 0, 0, 0);
    int m = memfd_create("calls", 0); ftruncate(m, 4 * page); fallocate(m, 0, 0, page);
    char *f = mmap(0, 4 * page, 3, MAP_SHARED, m, 0); f[0] = 1; msync(f, page, MS_SYNC);
    pwrite(m, "x", 1, 0); fsync(m);
    syscall(SYS_mseal, b, page, 0);
    int id = shmget(IPC_PRIVATE, page, 0600); void *s = shmat(id, 0, 0); shmdt(s); shmctl(id, IPC_RMID, 0);
    int u = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {UFFD_API}; ioctl(u, UFFDIO_API, &api);
    struct uffdio_register r = {{(unsigned long)(a + 8 * page), page}, UFFDIO_REGISTER_MODE_MISSING}; ioctl(u, UFFDIO_REGISTER, &r);
    struct uffdio_zeropage z = {{(unsigned long)(a + 8 * page), page}}; ioctl(u, UFFDIO_ZEROPAGE, &z);
    prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0); prctl(PR_SET_NAME, "not-memory");
    struct rlimit l; getrlimit(RLIMIT_STACK, &l); setrlimit(RLIMIT_STACK, &l);
    prlimit(0, RLIMIT_MEMLOCK, 0, &l); prlimit(0, RLIMIT_MEMLOCK, &l, 0);
    unsigned long aio = 0; syscall(SYS_io_setup, 4, &aio);
    char params[120] = {0}; int ring = syscall(SYS_io_uring_setup, 4, params);
    syscall(SYS_io_uring_register, ring, 0, &v, 1);
    int c = open("/proc/self/clear_refs", O_WRONLY); write(c, "4\n", 2);
    pid_t p = fork(); if (!p) _exit(0); waitpid(p, 0, 0);
    p = vfork(); if (!p) { execl("/proc/self/exe", "calls", "x", (char *)0); _exit(1); } waitpid(p, 0, 0);
    p = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0); if (!p) _exit(0); waitpid(p, 0, 0);
    unsigned long args[11] = {0}; args[4] = SIGCHLD;
    p = syscall(SYS_clone3, args, sizeof args); if (!p) _exit(0); waitpid(p, 0, 0);
    p = fork(); if (!p) { struct iovec to = {a + 20 * page, 8}, from = {"1234567", 8}; exit(process_vm_writev(getppid(), &from, 1, &to, 1, 0) != 8); } int st; waitpid(p, &st, 0);
    munmap(b, 8 * page);
    printf("%p writev %d uring %d\n", (void *)a, st, ring);
}
