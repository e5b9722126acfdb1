/* CASES 7 from inside: protect everything that can be written, list what gets written, survive the listing's own
 * writes, and give real faults to the program's own handler. argv[1]: libpagelens.so. Prints one line a check.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
static char in_data[PAGE * 4] __attribute__((aligned(4096))) = {1};
static char in_bss[PAGE * 4] __attribute__((aligned(4096)));
static uintptr_t listed[4096] __attribute__((aligned(4096)));
static volatile int n_listed;
static sigjmp_buf back;
static void *volatile fault_at;

static void each(uintptr_t page, void *arg)
{
	(void)arg;
	if (n_listed < 4096)
		listed[n_listed++] = page; /* writes to watched pages while the list is made */
}

static int has(const void *p)
{
	for (int i = 0; i < n_listed; i++)
		if (listed[i] == ((uintptr_t)p & ~(PAGE - 1)))
			return 1;
	return 0;
}

static void own_handler(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	fault_at = info->si_addr;
	siglongjmp(back, 1);
}

static char alternate[64 << 10] __attribute__((aligned(4096))); /* in the middle of a mapping that is watched */

/* A thread that lives before everything is protected: its stack and its alternate stack are memory like any. */
static volatile char *volatile early_page;
static volatile int early_step;
static __attribute__((noinline)) void deep(int levels)
{
	volatile char frame[PAGE];
	frame[0] = 1;
	if (levels)
		deep(levels - 1);
	frame[1] = 1;
}

static void *early(void *arg)
{
	stack_t stack = {.ss_sp = malloc(64 << 10), .ss_size = 64 << 10};
	sigaltstack(&stack, NULL);
	__atomic_store_n(&early_step, 1, __ATOMIC_SEQ_CST);
	while (!early_page)
		usleep(1000);
	deep(20);
	*early_page = 8;
	return arg;
}

static void *in_thread(void *arg)
{
	((volatile char *)arg)[0] = 5;
	return NULL;
}

int main(int argc, char **argv)
{
	void *lib = argc > 1 ? dlopen(argv[1], RTLD_NOW) : NULL;
	if (!lib) {
		printf("no library: %s\n", dlerror());
		return 1;
	}
	long (*everything)(void) = (long (*)(void))dlsym(lib, "pl_barrier_everything");
	long (*list)(void (*)(uintptr_t, void *), void *) =
		(long (*)(void (*)(uintptr_t, void *), void *))dlsym(lib, "pl_barrier_list");
	void (*end)(void) = (void (*)(void))dlsym(lib, "pl_barrier_end");
	struct sigaction sa = {.sa_sigaction = own_handler, .sa_flags = SA_SIGINFO | SA_ONSTACK};
	sigaction(SIGSEGV, &sa, NULL);
	stack_t stack = {.ss_sp = alternate, .ss_size = sizeof(alternate)};
	sigaltstack(&stack, NULL);
	pthread_t t, living;
	pthread_create(&t, NULL, in_thread, malloc(1)); /* leaves its stack to the C library, which gives it out again */
	pthread_join(t, NULL);
	pthread_create(&living, NULL, early, NULL);
	while (!early_step)
		usleep(1000);
	volatile char *heap = malloc(64 * PAGE), *area;
	area = mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	area[5 * PAGE] = 1;
	printf("ready\n");
	fflush(stdout);

	long pages = everything();
	printf("watched %d\n", pages > 200);
	n_listed = 0;
	list(NULL, NULL); /* what this program has written so far */
	in_data[PAGE] = 2;
	in_bss[2 * PAGE] = 3;
	heap[9 * PAGE] = 4;
	area[5 * PAGE] = 6;
	area[7 * PAGE] = 6;
	pthread_create(&t, NULL, in_thread, (void *)(area + 11 * PAGE));
	pthread_join(t, NULL);
	early_page = area + 12 * PAGE;
	pthread_join(living, NULL);
	long n = list(each, NULL);
	printf("listed %d\n", n > 0 && has(in_data + PAGE) && has(in_bss + 2 * PAGE) &&
	       has((const void *)(heap + 9 * PAGE)) && has((const void *)(area + 5 * PAGE)) &&
	       has((const void *)(area + 7 * PAGE)) && has((const void *)(area + 11 * PAGE)) && has((const void *)(area + 12 * PAGE)));
	printf("unlisted %d\n", !has(in_data + 2 * PAGE) && !has(in_bss) && !has((const void *)(area + 6 * PAGE)) &&
	       !has((const void *)(heap + 20 * PAGE)));
	list(NULL, NULL);
	n_listed = 0;
	n = list(each, NULL);
	printf("own %d\n", has((const void *)&n_listed) || n > 0); /* its own writes show up in the next list */
	area[1 * PAGE] = 1;
	n_listed = 0;
	list(each, NULL);
	printf("again %d\n", has((const void *)(area + PAGE)) && !has((const void *)(area + 5 * PAGE)));
	if (!sigsetjmp(back, 1))
		*(volatile char *)0x10 = 1;
	printf("chained %d\n", fault_at == (void *)0x10);
	char *read_only = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!sigsetjmp(back, 1))
		*(volatile char *)read_only = 1;
	printf("chained %d\n", fault_at == (void *)read_only);
	fflush(stdout);
	pid_t child = fork();
	if (!child) {
		area[20 * PAGE] = 9;
		in_bss[0] = 1;
		_exit(area[20 * PAGE] == 9 ? 0 : 1);
	}
	int status = 1;
	waitpid(child, &status, 0);
	n_listed = 0;
	list(each, NULL);
	printf("fork %d\n", status == 0 && !has((const void *)(area + 20 * PAGE)));
	end();
	area[30 * PAGE] = 1;
	printf("ended %d\n", area[30 * PAGE] == 1);
	return 0;
}
