/* Which pages of a file are in the page cache (mincore on a mapping of ours that is never touched). In C because
 * Python's mmap refuses a mapping that ends in the last, partial page. */
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pagelens.h"

#define PART (1UL << 18) /* pages mapped at a time */

PL_EXPORT int pl_residency(int fd, uint64_t first, uint64_t pages, unsigned char *cached);
/* cached[i] = 1 where page first + i is cached. 0 or -errno. */
PL_EXPORT int pl_residency(int fd, uint64_t first, uint64_t pages, unsigned char *cached)
{
	for (uint64_t done = 0; done < pages;) {
		uint64_t part = pages - done < PART ? pages - done : PART;
		void *at = mmap(NULL, part << 12, PROT_READ, MAP_SHARED, fd, (off_t)((first + done) << 12));
		int error;

		if (at == MAP_FAILED)
			return -errno;
		error = mincore(at, part << 12, cached + done) ? errno : 0;
		munmap(at, part << 12);
		if (error)
			return -error;
		for (uint64_t i = done; i < done + part; i++)
			cached[i] &= 1;
		done += part;
	}
	return 0;
}
