/* Threads that come and go while signals with values arrive: every one of them must be delivered.
 * churn WORKERS: prints "ready", then on end of stdin "got COUNT SUM BADCODE made THREADS". */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static atomic_long got, sum, bad, made, spins;
static atomic_int stop;

static void on_signal(int number, siginfo_t *info, void *context) {
    (void)number;
    (void)context;
    got++;
    sum += info->si_value.sival_int;
    if (info->si_code != SI_QUEUE)
        bad++;
}

static void *brief(void *arg) {
    spins++;
    return arg;
}

static void *maker(void *arg) {
    pthread_t thread;
    while (!stop)
        if (!pthread_create(&thread, NULL, brief, NULL)) {
            pthread_join(thread, NULL);
            made++;
        }
    return arg;
}

int main(int argc, char **argv) {
    int workers = argc > 1 ? atoi(argv[1]) : 2;
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGRTMIN, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
    pthread_t threads[64];
    for (int i = 0; i < workers; i++)
        pthread_create(&threads[i], NULL, maker, NULL);
    puts("ready");
    fflush(stdout);
    char buffer[16];
    while (read(0, buffer, sizeof buffer) > 0)
        ;
    stop = 1;
    for (int i = 0; i < workers; i++)
        pthread_join(threads[i], NULL);
    printf("got %ld %ld %ld made %ld\n", (long)got, (long)sum, (long)bad, (long)made);
    return 0;
}
