/* Writes pages that it says: some by hand, some by a system call, some in a mapping made later. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(void)
{
	char *p = mmap(NULL, 400 * 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *q;
	int fd = open("/dev/zero", O_RDONLY);

	for (int i = 0; i < 100; i++)
		p[(3 * i) * 4096] = 1;
	if (read(fd, p + 310 * 4096, 20 * 4096) != 20 * 4096)
		return 3;
	q = mmap(NULL, 50 * 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(q, 1, 50 * 4096);
	printf("first=%p last=%p written=%d\n", (void *)p, (void *)q, 100 + 20 + 50);
	fflush(stdout);
	return 0;
}
