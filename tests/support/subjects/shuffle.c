/* shuffle SEED OPS: maps, unmaps, moves, protects, locks, advises and touches random ranges of one small
 * arena, so that areas merge and split in every way; now and then a child goes on alone. The arena stays. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define P 4096UL
#define PAGES 96
static char *const arena = (char *)0x200000000000;
static uint64_t state;
static int ends[2], file;

static unsigned roll(unsigned n)
{
	state = state * 6364136223846793005u + 1442695040888963407u;
	return (unsigned)(state >> 33) % n;
}

/* Through a pipe: a page without rights is then an error and not a signal. */
static void touch(char *at, int store)
{
	char c = 1;

	if (store) {
		if (write(ends[1], &c, 1) == 1 && read(ends[0], at, 1) != 1 && read(ends[0], &c, 1) != 1)
			_exit(1);
	} else if (write(ends[1], at, 1) == 1 && read(ends[0], &c, 1) != 1) {
		_exit(1);
	}
}

static void step(void)
{
	static const int rights[] = { PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE };
	static const int advice[] = { MADV_DONTFORK, MADV_DOFORK, MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DODUMP,
				      MADV_RANDOM, MADV_NORMAL, MADV_DONTNEED };
	static const int populate[] = { MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_FREE };
	unsigned first = roll(PAGES), count = 1 + roll(12), to = roll(PAGES - 12);
	int prot = rights[roll(4)];
	char *at;

	if (first + count > PAGES)
		count = PAGES - first;
	at = arena + first * P;
	switch (roll(20)) {
	case 0: case 1: case 2:
		mmap(at, count * P, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		break;
	case 3:
		mmap(at, count * P, prot, MAP_PRIVATE | MAP_FIXED, file, (off_t)(first * P));
		break;
	case 4:
		mmap(at, count * P, prot, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		break;
	case 5:
		munmap(at, count * P);
		break;
	case 6: case 7: case 8:
		mprotect(at, count * P, prot);
		break;
	case 9:
		madvise(at, count * P, advice[roll(8)]);
		break;
	case 10:
		roll(2) ? mlock(at, count * P) : munlock(at, count * P);
		break;
	case 11:
		if (to + count <= first || first + count <= to)
			mremap(at, count * P, count * P, MREMAP_MAYMOVE | MREMAP_FIXED, arena + to * P);
		break;
	case 12:
		mremap(at, count * P, (1 + roll(12)) * P, 0);
		break;
	case 13:
		touch(at, 0);
		break;
	case 14:
		if (roll(4))
			mlock2(at, count * P, roll(2) ? MLOCK_ONFAULT : 0);
		else if (roll(2))
			mlockall(1 + roll(7)); /* CURRENT, FUTURE, ONFAULT; 4 alone is refused */
		else
			munlockall();
		break;
	case 15:
		madvise(at, count * P, populate[roll(3)]);
		break;
	case 16:
		if (to + count <= first || first + count <= to)
			mremap(at, count * P, count * P, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
			       arena + to * P);
		break;
	case 17:
		sbrk((long)(P * (roll(5)) - 2 * P));
		break;
	default:
		for (unsigned i = 0; i < count; i += 1 + roll(3))
			touch(at + i * P, 1);
	}
}

int main(int argc, char **argv)
{
	int ops = argc > 2 ? atoi(argv[2]) : 100;

	state = strtoull(argc > 1 ? argv[1] : "1", NULL, 10) * 2654435761u;
	file = open(argv[0], O_RDONLY);
	if (file < 0 || pipe(ends))
		return 1;
	for (int i = 0; i < ops; i++) {
		step();
		if (i % 64 == 63) {
			pid_t child = fork();

			if (!child) {
				for (int k = 0; k < 60; k++)
					step();
				_exit(0);
			}
			waitpid(child, NULL, 0);
		}
	}
	return 0;
}
