/* Known faults in known functions: 2,000 first touches in touch, 4 x 300 in worker (each thread in a mapping of its
 * own, unmapped again), 100 copies on write in a forked child's touch. */
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static void touch(char *p, int n)
{
    for (int i = 0; i < n; i++) p[i * 4096L] = 1; /* TOUCH LINE */
}

static void *worker(void *unused)
{
    (void)unused;
    char *p = mmap(NULL, 300 * 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); /* rights of its own: merges with nothing */
    for (int i = 0; i < 300; i++) p[i * 4096L] = 1;
    munmap(p, 300 * 4096);
    return NULL;
}

int main(void)
{
    char *p = mmap(NULL, 2000 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    touch(p, 2000);
    for (int i = 0; i < 4; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, worker, NULL);
        pthread_join(thread, NULL);
    }
    if (!fork()) {
        touch(p, 100);
        _exit(0);
    }
    wait(NULL);
    return 0;
}
