/* A process on strings: does exactly what it is told on stdin, one line a command, and answers one line.
 *   sys NR A B C D E F    -> result (a negative errno on failure)
 *   write ADDR LEN STEP V -> stores byte V at each STEP from ADDR       read ADDR LEN STEP -> sum of bytes
 *   malloc LEN -> addr    free ADDR    fork -> pid of a child that takes the same commands until "back"
 *   thread -> tid and the address of a local variable of it; it sleeps for ever
 * Its own buffers are static and touched before the first answer, so that a command faults nothing else in.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static char line[4096], answer[256];
static volatile unsigned long thread_tid, thread_sp;

static void say(long a, long b)
{
    int n = snprintf(answer, sizeof answer, "%ld %ld\n", a, b);
    if (write(1, answer, n) != n) _exit(3);
}

static int get(void)
{
    size_t n = 0;
    while (n < sizeof line - 1) {
        if (read(0, line + n, 1) != 1) return 0;
        if (line[n] == '\n') break;
        n++;
    }
    line[n] = 0;
    return 1;
}

static void *sleeper(void *unused)
{
    char here;
    (void)unused;
    prctl(PR_SET_NAME, "sleeper", 0, 0, 0);
    thread_sp = (unsigned long)&here;
    thread_tid = syscall(SYS_gettid);
    for (;;) pause();
    return NULL;
}

int main(void)
{
    memset(line, 1, sizeof line);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    say(getpid(), (long)line);
    while (get()) {
        unsigned long v[8] = {0};
        char *word = strtok(line, " "), *t;
        for (int i = 0; i < 8 && (t = strtok(NULL, " ")); i++) v[i] = strtoul(t, NULL, 0);
        if (!word) continue;
        if (!strcmp(word, "sys")) {
            long r = syscall(v[0], v[1], v[2], v[3], v[4], v[5], v[6]);
            say(r == -1 ? -errno : r, 0);
        } else if (!strcmp(word, "write")) {
            for (unsigned long o = 0; o < v[1]; o += v[2]) *(volatile char *)(v[0] + o) = (char)v[3];
            say(0, 0);
        } else if (!strcmp(word, "read")) {
            unsigned long s = 0;
            for (unsigned long o = 0; o < v[1]; o += v[2]) s += *(volatile unsigned char *)(v[0] + o);
            say((long)s, 0);
        } else if (!strcmp(word, "malloc")) {
            say((long)malloc(v[0]), 0);
        } else if (!strcmp(word, "free")) {
            free((void *)v[0]);
            say(0, 0);
        } else if (!strcmp(word, "thread")) {
            pthread_t th;
            thread_tid = 0;
            if (pthread_create(&th, NULL, sleeper, NULL)) say(-1, 0);
            else {
                while (!thread_tid) usleep(100);
                say((long)thread_tid, (long)thread_sp);
            }
        } else if (!strcmp(word, "fork")) {
            pid_t pid = fork();
            if (pid == 0) { say(getpid(), 0); continue; }
            int status; /* the child has the strings until it goes */
            waitpid(pid, &status, 0);
            say(status, 0);
        } else if (!strcmp(word, "back")) {
            _exit(0);
        } else if (!strcmp(word, "exit_leader")) {
            say(0, 0);
            pthread_exit(NULL);
        } else say(-9999, 0);
    }
    return 0;
}
