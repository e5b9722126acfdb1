/* execer N: a thread other than the leader execs this program again with N-1; at 0 prints "done". */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static char left[16];

static void *run(void *arg) {
    execl("/proc/self/exe", "execer", left, (char *)NULL);
    return arg;
}

int main(int argc, char **argv) {
    int n = argc > 1 ? atoi(argv[1]) : 0;
    if (n <= 0) {
        puts("done");
        return 0;
    }
    snprintf(left, sizeof left, "%d", n - 1);
    pthread_t thread;
    pthread_create(&thread, NULL, run, NULL);
    for (;;)
        pause();
}
