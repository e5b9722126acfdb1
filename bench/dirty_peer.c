/* The peer of bench/dirty.py: the same get-and-protect ioctl loop over a range, and nothing else. */
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>

struct scan { uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, ret; };
struct region { uint64_t start, end, categories; };
static struct region regions[1 << 15];

/* Both scans of a look: what is populated (protecting what was written), and what is not registered. */
long peer_epoch(int fd, uint64_t start, uint64_t end)
{
	long total = 0;
	for (int pass = 0; pass < 2; pass++) {
		struct scan s = {sizeof(s), pass ? 0 : 1, start, end, 0, (uint64_t)(uintptr_t)regions,
				 sizeof(regions) / sizeof(regions[0]), 0, 256, 256, 24, 0x7b};
		if (pass) {
			s.inverted |= 5;
			s.mask |= 5;
			s.ret = 8;
		}
		while (s.start < s.end) {
			int got = ioctl(fd, 0xC0606610ul, &s);
			if (got < 0)
				return -1;
			total += got;
			s.start = s.walk_end;
		}
	}
	return total;
}
