/* Copy pages of another process, and hash them, without a Python loop per page.
 *
 * process_vm_readv fails as a whole at the first page that it may not read (no VM_READ, a guard, a hole), so a
 * short count is followed up page by page: /proc/PID/mem reads what PROT_NONE hides (FOLL_FORCE,
 * mm/gup.c check_vma_flags), and what even that refuses is marked bad and left zero.
 *
 * The hash is for finding change and damage, not against an adversary: eight lanes of (rotate, xor, multiply by
 * an odd number), each step a bijection of the word, so that any single changed word changes the result.
 */
#include "pagelens.h"

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096UL
#define IOVS 512
#define READ_MAX (1UL << 30) /* below MAX_RW_COUNT, so that a short count means a bad page */

static const uint64_t K1 = 0x9E3779B97F4A7C15ULL, K2 = 0xD6E8FEB86659FD93ULL;

static inline uint64_t rotl(uint64_t x, int r) { return x << r | x >> (64 - r); }

/* Hash of n bytes (n a multiple of 64 is the fast path); *any gets the OR of all words. */
static uint64_t hash_bytes(const uint8_t *data, size_t n, uint64_t *any) {
    uint64_t lane[8], seen = 0;
    for (int i = 0; i < 8; i++)
        lane[i] = K2 * (uint64_t)(i + 1);
    size_t words = n / 64;
    for (size_t k = 0; k < words; k++) {
        uint64_t w[8];
        memcpy(w, data + k * 64, 64);
        for (int i = 0; i < 8; i++) {
            seen |= w[i];
            lane[i] = (rotl(lane[i], 27) ^ w[i]) * K1;
        }
    }
    size_t left = n - words * 64;
    if (left) {
        uint64_t w[8] = {0};
        memcpy(w, data + words * 64, left);
        for (int i = 0; i < 8; i++) {
            seen |= w[i];
            lane[i] = (rotl(lane[i], 27) ^ w[i]) * K1;
        }
    }
    uint64_t h = n * K2 + 1;
    for (int i = 0; i < 8; i++) {
        h = (rotl(h, 31) ^ lane[i]) * K1;
        h ^= h >> 32;
    }
    h *= K2;
    h ^= h >> 29;
    if (any)
        *any = seen;
    return h;
}

PL_EXPORT uint64_t pl_sum(const void *data, size_t n);
PL_EXPORT uint64_t pl_sum(const void *data, size_t n) { return hash_bytes(data, n, NULL); }

PL_EXPORT void pl_sum_pages(const uint8_t *data, size_t pages, uint64_t *hash, uint8_t *zero);
PL_EXPORT void pl_sum_pages(const uint8_t *data, size_t pages, uint64_t *hash, uint8_t *zero) {
    for (size_t i = 0; i < pages; i++) {
        uint64_t any;
        hash[i] = hash_bytes(data + i * PAGE, PAGE, &any);
        zero[i] = any == 0;
    }
}

/* One page that process_vm_readv refused. 0, or 1 if /proc/PID/mem refuses it too. */
static int read_hidden(int mem, uint64_t addr, uint8_t *dst) {
    if (mem >= 0 && pread(mem, dst, PAGE, (off_t)addr) == (ssize_t)PAGE)
        return 0;
    memset(dst, 0, PAGE);
    return 1;
}

/* Read n runs of pages into dst, one after the other. bad[page] = 1 where a page cannot be read (it is zeroed).
 * Returns the number of bad pages, or -errno (ESRCH: the process is gone; EPERM). */
PL_EXPORT long pl_vm_read(int pid, int mem, size_t n, const uint64_t *addr, const uint64_t *pages, uint8_t *dst,
                          uint8_t *bad);
PL_EXPORT long pl_vm_read(int pid, int mem, size_t n, const uint64_t *addr, const uint64_t *pages, uint8_t *dst,
                          uint8_t *bad) {
    struct iovec remote[IOVS];
    size_t run = 0, page = 0; /* where we are: run, and page within it */
    size_t out = 0;           /* pages done in all */
    long failed = 0;
    while (run < n) {
        size_t count = 0, bytes = 0, r = run, p = page;
        while (r < n && count < IOVS && bytes < READ_MAX) {
            size_t len = (pages[r] - p) * PAGE;
            if (len > READ_MAX - bytes)
                len = READ_MAX - bytes;
            remote[count].iov_base = (void *)(uintptr_t)(addr[r] + p * PAGE);
            remote[count++].iov_len = len;
            bytes += len;
            r++;
            p = 0;
        }
        struct iovec local = {dst + out * PAGE, bytes};
        ssize_t got = process_vm_readv(pid, &local, 1, remote, count, 0);
        if (got < 0) {
            if (errno != EFAULT)
                return -errno;
            got = 0;
        }
        size_t done = (size_t)got / PAGE;
        if ((size_t)got < bytes) {
            size_t at = done, k = 0;
            while (at >= remote[k].iov_len / PAGE)
                at -= remote[k++].iov_len / PAGE;
            int is_bad = read_hidden(mem, (uint64_t)(uintptr_t)remote[k].iov_base + at * PAGE, dst + (out + done) * PAGE);
            bad[out + done] = (uint8_t)is_bad;
            failed += is_bad;
            done++;
        }
        out += done;
        while (done) {
            size_t left = pages[run] - page;
            if (done < left) {
                page += done;
                break;
            }
            done -= left;
            run++;
            page = 0;
        }
        while (run < n && pages[run] == page) {
            run++;
            page = 0;
        }
    }
    return failed;
}

/* Write n runs of pages from src, one after the other. Pages that process_vm_writev refuses go through
 * /proc/PID/mem (private read-only mappings). Returns the number of pages that neither can write (bad[page] = 1),
 * or -errno. */
PL_EXPORT long pl_vm_write(int pid, int mem, size_t n, const uint64_t *addr, const uint64_t *pages,
                           const uint8_t *src, uint8_t *bad);
PL_EXPORT long pl_vm_write(int pid, int mem, size_t n, const uint64_t *addr, const uint64_t *pages,
                           const uint8_t *src, uint8_t *bad) {
    struct iovec remote[IOVS];
    size_t out = 0, run = 0;
    long failed = 0;
    while (run < n) {
        size_t count = 0, bytes = 0, first = run;
        while (run < n && count < IOVS && (!count || bytes + pages[run] * PAGE <= READ_MAX)) {
            remote[count].iov_base = (void *)(uintptr_t)addr[run];
            remote[count++].iov_len = pages[run] * PAGE;
            bytes += pages[run++] * PAGE;
        }
        struct iovec local = {(void *)(uintptr_t)(src + out * PAGE), bytes};
        ssize_t got = process_vm_writev(pid, &local, 1, remote, count, 0);
        if (got < 0) {
            if (errno != EFAULT)
                return -errno;
            got = 0;
        }
        size_t page = 0, done = (size_t)got / PAGE;
        if ((size_t)got < bytes)
            for (size_t r = first; r < run; r++)
                for (size_t p = 0; p < pages[r]; p++, page++)
                    if (page >= done && pwrite(mem, src + (out + page) * PAGE, PAGE, (off_t)(addr[r] + p * PAGE)) !=
                                            (ssize_t)PAGE) {
                        bad[out + page] = 1;
                        failed++;
                    }
        out += bytes / PAGE;
    }
    return failed;
}
