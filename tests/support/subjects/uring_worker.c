/* Reads 16 pages of /dev/zero through io_uring, forced into a worker thread: the worker takes the faults. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(void)
{
	struct io_uring_params p = { 0 };
	long fd = syscall(SYS_io_uring_setup, 4, &p);
	size_t sq_size, sqes_size;
	char *sq, *cq, *buffer;
	struct io_uring_sqe *sqe;
	struct io_uring_cqe *cqe;
	int zero = open("/dev/zero", O_RDONLY);

	if (fd < 0)
		return 77;
	sq_size = p.sq_off.array + p.sq_entries * sizeof(unsigned);
	sqes_size = p.sq_entries * sizeof(*sqe);
	sq = mmap(NULL, sq_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQ_RING);
	cq = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof(*cqe), PROT_READ | PROT_WRITE, MAP_SHARED, fd,
		  IORING_OFF_CQ_RING);
	sqe = mmap(NULL, sqes_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQES);
	buffer = mmap(NULL, 16 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (sq == MAP_FAILED || cq == MAP_FAILED || (void *)sqe == MAP_FAILED || buffer == MAP_FAILED)
		return 3;
	madvise(buffer, 16 * 4096, MADV_NOHUGEPAGE);
	printf("%p\n", (void *)buffer);
	fflush(stdout);
	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = IORING_OP_READ;
	sqe->flags = IOSQE_ASYNC;
	sqe->fd = zero;
	sqe->addr = (unsigned long)buffer;
	sqe->len = 16 * 4096;
	((unsigned *)(sq + p.sq_off.array))[0] = 0;
	__atomic_store_n((unsigned *)(sq + p.sq_off.tail), 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
		return 4;
	cqe = (struct io_uring_cqe *)(cq + p.cq_off.cqes);
	return cqe->res == 16 * 4096 ? 0 : 5;
}
