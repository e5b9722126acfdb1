/* Code made at run time, named in /tmp/perf-PID.map as runtimes do: writes one byte to each of 64 pages. */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(void)
{
    static const unsigned char code[] = {0xc6, 0x07, 0x01, 0xc3}; /* movb $1,(%rdi); ret */
    unsigned char *text = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(text + 256, code, sizeof code);
    mprotect(text, 4096, PROT_READ | PROT_EXEC);
    char name[64];
    snprintf(name, sizeof name, "/tmp/perf-%d.map", (int)getpid());
    FILE *map = fopen(name, "w");
    if (!map) return 1;
    fprintf(map, "%lx 10 Jitted::touch\n", (unsigned long)text + 256);
    fclose(map);
    char *data = mmap(NULL, 64 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 64; i++) ((void (*)(char *))(text + 256))(data + i * 4096L);
    return 0;
}
