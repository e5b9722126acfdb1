/* Numbers for call stacks: equal stacks get the same number.
 *
 * An open-addressing table of 64-bit hashes and offsets into one arena. When it has grown to its limit it is
 * emptied and the numbers go on: a stack may then have two numbers, never a number two stacks. Rejected: the
 * kernel's stack map (it drops a stack when two hash alike, and its content dies with the recorder).
 */
#include <stdlib.h>
#include <string.h>

#include "drain.h"

#define LIMIT (64UL * 1024 * 1024 / 8)  /* words in the arena: 64 MiB */

struct slot {
	uint64_t hash;
	uint32_t at, n;         /* n = 0: empty */
	int64_t id;
};

struct pl_stacks {
	struct slot *slots;
	size_t size, used;
	uint64_t *arena;
	size_t words, room;
	int64_t next;
};

struct pl_stacks *pl_stacks_new(void)
{
	struct pl_stacks *s = calloc(1, sizeof(*s));

	if (!s)
		return NULL;
	s->size = 1024;
	s->slots = calloc(s->size, sizeof(*s->slots));
	s->room = 64 * 1024;
	s->arena = malloc(s->room * 8);
	if (!s->slots || !s->arena) {
		pl_stacks_free(s);
		return NULL;
	}
	return s;
}

void pl_stacks_free(struct pl_stacks *s)
{
	if (!s)
		return;
	free(s->slots);
	free(s->arena);
	free(s);
}

static uint64_t mix(const uint64_t *frames, unsigned int n)
{
	uint64_t h = n * 0x9e3779b97f4a7c15ULL;

	for (unsigned int i = 0; i < n; i++) {
		h = (h ^ frames[i]) * 0xff51afd7ed558ccdULL;
		h ^= h >> 32;
	}
	return h;
}

static int grow(struct pl_stacks *s)
{
	size_t size = s->size * 2;
	struct slot *slots = calloc(size, sizeof(*slots));

	if (!slots)
		return 0;
	for (size_t i = 0; i < s->size; i++) {
		size_t at;

		if (!s->slots[i].n)
			continue;
		for (at = s->slots[i].hash & (size - 1); slots[at].n; at = (at + 1) & (size - 1))
			;
		slots[at] = s->slots[i];
	}
	free(s->slots);
	s->slots = slots;
	s->size = size;
	return 1;
}

static void forget(struct pl_stacks *s)
{
	memset(s->slots, 0, s->size * sizeof(*s->slots));
	s->used = 0;
	s->words = 0;
}

int64_t pl_stacks_number(struct pl_stacks *s, const uint64_t *frames, unsigned int n, int *fresh)
{
	uint64_t hash = mix(frames, n);
	size_t at;

	*fresh = 0;
	for (at = hash & (s->size - 1); s->slots[at].n; at = (at + 1) & (s->size - 1)) {
		const struct slot *slot = &s->slots[at];

		if (slot->hash == hash && slot->n == n && !memcmp(s->arena + slot->at, frames, n * 8UL))
			return slot->id;
	}
	*fresh = 1;
	if (s->words + n > s->room) {
		uint64_t *more = s->room * 2 <= LIMIT ? realloc(s->arena, s->room * 16) : NULL;

		if (more) {
			s->arena = more;
			s->room *= 2;
		} else {
			forget(s);
		}
	}
	if ((s->used + 1) * 2 > s->size && !grow(s))
		forget(s);
	for (at = hash & (s->size - 1); s->slots[at].n; at = (at + 1) & (s->size - 1))
		;
	memcpy(s->arena + s->words, frames, n * 8UL);
	s->slots[at] = (struct slot){ hash, (uint32_t)s->words, n, s->next++ };
	s->words += n;
	s->used++;
	return s->slots[at].id;
}
