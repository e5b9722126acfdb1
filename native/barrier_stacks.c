/* Where the stacks of this process are. The kernel pushes a signal's frame onto the stack of the thread, or onto its
 * alternate one, and a frame that it cannot push kills the process: neither may be read-only.
 *
 * maps names one stack only. So each other thread is asked, by a signal that nobody uses: where it stands, and its
 * alternate stack, are in the context that the kernel hands to the handler. (A thread that waits may see EINTR
 * where SA_RESTART does not help, as by any signal; glibc's setuid() does the same.) A thread that blocks the signal
 * is looked up in /proc/self/task/TID/syscall, which shows its stack pointer and not its alternate stack.
 * Stacks that no thread has are there too: the C library keeps those of threads that have ended and gives them to
 * new ones. They lie right above a guard, with a thread control block at their end that points at itself.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "barrier_stacks.h"

#define PAGE 4096ul
#define MOST 4096
#define TCB_SIZE 0xa00ul /* struct pthread of glibc, generously */

static struct { uintptr_t sp, low, high; int tid; } answers[MOST];
static int n_answers;

static void on_ask(int sig, siginfo_t *info, void *context)
{
	const ucontext_t *uc = context;
	int saved = errno, i = __atomic_load_n(&n_answers, __ATOMIC_SEQ_CST);
	(void)sig;
	(void)info;
	if (i < MOST) {
		/* One at a time: the next thread is asked when this one has answered. */
		answers[i].sp = (uintptr_t)uc->uc_mcontext.gregs[REG_RSP];
		answers[i].low = uc->uc_stack.ss_flags & SS_DISABLE ? 0 : (uintptr_t)uc->uc_stack.ss_sp;
		answers[i].high = answers[i].low + uc->uc_stack.ss_size;
		answers[i].tid = (int)syscall(SYS_gettid);
		__atomic_store_n(&n_answers, i + 1, __ATOMIC_SEQ_CST);
	}
	errno = saved;
}

static int free_signal(void)
{
	for (int sig = SIGRTMAX - 2; sig > SIGRTMIN; sig--) {
		struct sigaction now;
		if (!sigaction(sig, NULL, &now) && !(now.sa_flags & SA_SIGINFO) && now.sa_handler == SIG_DFL)
			return sig;
	}
	return 0;
}

/* A file of the thread in /proc, ended by a zero; 0 where it cannot be read. */
static int text_of(int tid, const char *name, char *text, size_t size)
{
	char path[64];
	snprintf(path, sizeof(path), "/proc/self/task/%d/%s", tid, name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? -1 : read(fd, text, size - 1);
	if (fd >= 0)
		close(fd);
	if (got <= 0)
		return 0;
	text[got] = 0;
	return 1;
}

/* Whether the thread would take the signal now. */
static int takes(int tid, int sig)
{
	char text[4096], *at;
	if (!text_of(tid, "status", text, sizeof(text)))
		return 0;
	if (!(at = strstr(text, "\nState:\t")) || strchr("ZXD", at[8]) || !(at = strstr(at, "\nSigBlk:\t")))
		return 0;
	return !(strtoull(at + 9, NULL, 16) >> (sig - 1) & 1);
}

static uintptr_t stack_pointer(int tid)
{
	char text[512], *words[16];
	int n = 0;
	if (!text_of(tid, "syscall", text, sizeof(text)))
		return 0;
	for (char *save, *word = strtok_r(text, " \n", &save); word && n < 16; word = strtok_r(NULL, " \n", &save))
		words[n++] = word;
	return n > 2 ? strtoull(words[n - 2], NULL, 16) : 0;
}

static void ask(int tid, int sig)
{
	int before = n_answers;
	struct timespec nap = {0, 100000};
	if (takes(tid, sig) && !syscall(SYS_tgkill, getpid(), tid, sig))
		for (int i = 0; i < 5000 && __atomic_load_n(&n_answers, __ATOMIC_SEQ_CST) == before; i++)
			nanosleep(&nap, NULL);
	if (__atomic_load_n(&n_answers, __ATOMIC_SEQ_CST) == before && before < MOST) {
		answers[before].sp = stack_pointer(tid);
		answers[before].low = 0;
		answers[before].tid = tid;
		n_answers = before + 1;
	}
}

static struct pl_part pages_of(uintptr_t low, uintptr_t high)
{
	return (struct pl_part){low & ~(PAGE - 1), (high + PAGE - 1) & ~(PAGE - 1)};
}

int pl_stacks_of_threads(struct pl_part *out, int most, int *alternates)
{
	struct sigaction mine = {.sa_sigaction = on_ask, .sa_flags = SA_SIGINFO | SA_RESTART}, before;
	int sig = free_signal(), self = (int)syscall(SYS_gettid), n = 0;
	stack_t own;
	n_answers = 0;
	if (sig)
		sigaction(sig, &mine, &before);
	DIR *tasks = opendir("/proc/self/task");
	for (struct dirent *entry; tasks && (entry = readdir(tasks));) {
		int tid = atoi(entry->d_name);
		if (tid > 0 && tid != self && n_answers < MOST)
			ask(tid, sig ? sig : 1);
	}
	if (tasks)
		closedir(tasks);
	if (!sigaltstack(NULL, &own) && !(own.ss_flags & SS_DISABLE) && n < most)
		out[n++] = pages_of((uintptr_t)own.ss_sp, (uintptr_t)own.ss_sp + own.ss_size);
	for (int i = 0; i < n_answers && n < most; i++)
		if (answers[i].low)
			out[n++] = pages_of(answers[i].low, answers[i].high);
	*alternates = n;
	for (int i = 0; i < n_answers && n < most; i++)
		if (answers[i].sp)
			out[n++] = pages_of(answers[i].sp, answers[i].sp + 1);
	if (sig) {
		/* A late answer would find no handler, and its default is to end the process. */
		struct sigaction ignore = {.sa_handler = SIG_IGN};
		sigaction(sig, &ignore, NULL);
		sigaction(sig, &before, NULL);
	}
	return n;
}

uintptr_t pl_stack_of_libc(uintptr_t start, uintptr_t end)
{
	unsigned char there[512];
	uintptr_t found = 0;
	for (uintptr_t at = start; at < end && !found; at += sizeof(there) * PAGE) {
		size_t size = end - at < sizeof(there) * PAGE ? end - at : sizeof(there) * PAGE;
		if (mincore((void *)at, size, there)) /* only what is there is read: nothing is populated by the search */
			return 0;
		for (size_t page = 0; page < size / PAGE && !found; page++) {
			if (!(there[page] & 1))
				continue;
			for (size_t offset = 0; offset < PAGE; offset += 64) {
				const volatile uintptr_t *word = (const uintptr_t *)(at + page * PAGE + offset);
				/* tcbhead_t: tcb, dtv, self */
				if (word[0] == (uintptr_t)word && word[2] == (uintptr_t)word && word[1] != word[0]) {
					found = (uintptr_t)word;
					break;
				}
			}
		}
	}
	if (!found)
		return 0;
	found = (found + TCB_SIZE + PAGE - 1) & ~(PAGE - 1);
	return found < end ? found : end;
}
