/* One 64-bit hash for each 4 KiB page: tells pages rewritten with the same bytes from changed ones. Four lanes
 * of multiply and rotate, so that it runs at memory speed; no defence against an adversary is claimed. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "pagelens.h"

static inline uint64_t mix(uint64_t lane, uint64_t word)
{
	lane = (lane ^ word) * UINT64_C(0x9e3779b97f4a7c15);
	return lane << 29 | lane >> 35;
}

PL_EXPORT void pl_page_sums(const uint8_t *data, size_t pages, uint64_t *out);
PL_EXPORT void pl_page_sums(const uint8_t *data, size_t pages, uint64_t *out)
{
	for (size_t p = 0; p < pages; p++, data += 4096) {
		uint64_t a = 1, b = 2, c = 3, d = 4, w[4];
		for (size_t i = 0; i < 4096; i += 32) {
			memcpy(w, data + i, 32);
			a = mix(a, w[0]);
			b = mix(b, w[1]);
			c = mix(c, w[2]);
			d = mix(d, w[3]);
		}
		a = mix(mix(mix(a, b), c), d);
		out[p] = a ^ a >> 32;
	}
}
