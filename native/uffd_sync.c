/* The handler thread of backend `uffd-sync`: takes write-protect faults from a userfaultfd, notes address,
 * thread and time of each, opens the page and wakes the writer.
 *
 * It allocates nothing after its start and touches only its own ring, so that it cannot fault on what it
 * watches. A full ring loses no page: the fault is still resolved, its address goes to a bitmap-free count, and
 * the reader finds the page by its missing protection bit; only who and when are lost, and counted.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "pagelens.h"

struct pl_uffd_write {
	uint64_t addr, time_ns;
	uint32_t tid, pad;
};

struct message { /* struct uffd_msg, page-fault part */
	uint8_t event, reserved[7];
	uint64_t flags, address;
	uint32_t tid, pad;
};

struct pl_uffd_sync {
	int fd, stop;
	uint32_t size;
	pthread_t thread;
	struct pl_uffd_write *ring;
	_Atomic uint64_t head, tail, lost;
};

PL_EXPORT struct pl_uffd_sync *pl_uffd_sync_start(int fd, uint32_t size);
PL_EXPORT uint32_t pl_uffd_sync_take(struct pl_uffd_sync *s, struct pl_uffd_write *out, uint32_t max);
PL_EXPORT uint64_t pl_uffd_sync_lost(struct pl_uffd_sync *s);
PL_EXPORT void pl_uffd_sync_stop(struct pl_uffd_sync *s);

static uint64_t now_ns(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void resolve(struct pl_uffd_sync *s, const struct message *m)
{
	uint64_t page = m->address & ~UINT64_C(4095), args[3] = {page, 4096, 0};
	uint64_t head = atomic_load(&s->head);
	if (head - atomic_load(&s->tail) < s->size) {
		s->ring[head % s->size] = (struct pl_uffd_write){page, now_ns(), m->tid, 0};
		atomic_store(&s->head, head + 1);
	} else {
		atomic_fetch_add(&s->lost, 1);
	}
	/* _IOWR(0xAA, 6, 24): UFFDIO_WRITEPROTECT without MODE_WP opens and wakes. EAGAIN: fork or mremap is
	 * under way. */
	while (ioctl(s->fd, 0xC018AA06ul, args) && errno == EAGAIN)
		;
}

static void *serve(void *arg)
{
	struct pl_uffd_sync *s = arg;
	struct message messages[32];
	struct pollfd fds[2] = {{s->fd, POLLIN, 0}, {s->stop, POLLIN, 0}};
	for (;;) {
		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			return NULL;
		if (fds[1].revents)
			return NULL;
		ssize_t got = read(s->fd, messages, sizeof(messages));
		for (ssize_t i = 0; i + (ssize_t)sizeof(messages[0]) <= got; i += (ssize_t)sizeof(messages[0])) {
			const struct message *m = &messages[i / (ssize_t)sizeof(messages[0])];
			if (m->event == 0x12)
				resolve(s, m);
		}
	}
}

/* Takes faults of `fd` until `stop`; the descriptor stays the caller's. NULL: errno says why. */
PL_EXPORT struct pl_uffd_sync *pl_uffd_sync_start(int fd, uint32_t size)
{
	/* One mapping of its own: no allocator page that could be watched. */
	size_t head = (sizeof(struct pl_uffd_sync) + 63) & ~(size_t)63;
	char *area = mmap(NULL, head + size * sizeof(struct pl_uffd_write), PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (area == MAP_FAILED)
		return NULL;
	struct pl_uffd_sync *s = (struct pl_uffd_sync *)area;
	s->fd = fd;
	s->size = size;
	s->ring = (struct pl_uffd_write *)(area + head);
	s->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int failed = s->stop < 0 ? errno : pthread_create(&s->thread, NULL, serve, s);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (failed) {
		if (s->stop >= 0)
			close(s->stop);
		munmap(area, head + size * sizeof(struct pl_uffd_write));
		errno = failed;
		return NULL;
	}
	return s;
}

/* At most `max` writes, oldest first. One reader at a time. */
PL_EXPORT uint32_t pl_uffd_sync_take(struct pl_uffd_sync *s, struct pl_uffd_write *out, uint32_t max)
{
	uint64_t tail = atomic_load(&s->tail), head = atomic_load(&s->head);
	uint32_t n = 0;
	while (tail < head && n < max)
		out[n++] = s->ring[tail++ % s->size];
	atomic_store(&s->tail, tail);
	return n;
}

PL_EXPORT uint64_t pl_uffd_sync_lost(struct pl_uffd_sync *s) { return atomic_load(&s->lost); }

PL_EXPORT void pl_uffd_sync_stop(struct pl_uffd_sync *s)
{
	uint64_t one = 1;
	if (write(s->stop, &one, sizeof(one)) == sizeof(one))
		pthread_join(s->thread, NULL);
	close(s->stop);
	size_t head = (sizeof(*s) + 63) & ~(size_t)63;
	munmap(s, head + s->size * sizeof(struct pl_uffd_write));
}
