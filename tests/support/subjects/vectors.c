/* Stands with ymm0 (and, where the CPU has it, zmm0) holding the bytes 0, 1, 2, …, and says "zmm" or "ymm". */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>

__attribute__((target("avx512f"))) static void wide(const uint8_t *bytes)
{
    __asm__ volatile("vmovdqu64 (%0), %%zmm0\n1: pause\njmp 1b" : : "r"(bytes) : "memory");
}

__attribute__((target("avx"))) static void narrow(const uint8_t *bytes)
{
    __asm__ volatile("vmovdqu (%0), %%ymm0\n1: pause\njmp 1b" : : "r"(bytes) : "memory");
}

int main(void)
{
    uint8_t bytes[64];
    for (int i = 0; i < 64; i++) bytes[i] = (uint8_t)i;
    __builtin_cpu_init();
    int zmm = __builtin_cpu_supports("avx512f") != 0;
    if (!zmm && !__builtin_cpu_supports("avx")) return puts("neither"), 0;
    puts(zmm ? "zmm" : "ymm");
    fflush(stdout);
    zmm ? wide(bytes) : narrow(bytes);
}
