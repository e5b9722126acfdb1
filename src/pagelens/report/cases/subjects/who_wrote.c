/* A page of initialised data, read and then written; the same with uninitialised data. */
#include <stdio.h>
#include <unistd.h>

#define PAGE __attribute__((aligned(4096)))
volatile char first[4096] PAGE = { 1 };
/* Fault-around maps up to 16 neighbours with a page that is read: page2 has such a window for itself, and page1
 * stands alone in the last one of the file's part. */
volatile char page2[65536] __attribute__((aligned(65536))) = { 3 };
volatile char page1[4096] PAGE = { 2 };
volatile char blank1[4096] PAGE;
volatile char blank2[4096] PAGE;

static void stage(const char *name)
{
	printf("stage %s\n", name);
	fflush(stdout);
	getchar();
}

int main(void)
{
	int sum;

	printf("pid=%d page1=%p page2=%p blank1=%p blank2=%p\n", getpid(), (void *)page1, (void *)page2,
	       (void *)blank1, (void *)blank2);
	first[0] = 9;
	stage("start");
	page2[100] = 8; /* written without a read before */
	stage("direct");
	sum = page1[100];
	stage("read");
	page1[100] = 7; /* the store that copies */
	stage("written");
	sum += blank1[100];
	stage("blank-read");
	blank1[100] = 1; /* over the zero page */
	stage("blank-written");
	return sum == 12345;
}
