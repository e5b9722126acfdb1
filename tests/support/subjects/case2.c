/* Case 2: one page of initialised data and one of uninitialised data, read and written on command.
 * Commands: "forget data", "read data", "write data", "read bss", "write bss"; each is answered when done.
 * "forget data" unmaps the page (MADV_DONTNEED): at start the kernel had mapped it around another fault.
 * Its own buffer is on the stack, so that the two pages are touched by nothing else. */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

__attribute__((aligned(4096))) char initialised[4096] = {1};
__attribute__((aligned(4096))) char uninitialised[4096];

static void answer(const char *text)
{
    if (write(1, text, strlen(text)) < 0) _exit(3);
}

int main(void)
{
    char line[64], c;
    int n = snprintf(line, sizeof line, "%d\n", (int)getpid());
    line[n] = 0;
    answer(line);
    for (n = 0; read(0, &c, 1) == 1;) {
        if (c != '\n') {
            if (n < 63) line[n++] = c;
            continue;
        }
        line[n] = 0;
        n = 0;
        volatile char sink = 0;
        if (!strcmp(line, "forget data")) madvise(initialised, 4096, MADV_DONTNEED);
        if (!strcmp(line, "read data")) sink = initialised[5]; /* the load of the data page */
        if (!strcmp(line, "write data")) initialised[7] = 9;   /* the store to the data page */
        if (!strcmp(line, "read bss")) sink = uninitialised[5];
        if (!strcmp(line, "write bss")) uninitialised[7] = 9; /* the store to the bss page */
        (void)sink;
        answer("done\n");
    }
    return 0;
}
