/* Keeps a pattern in every vector register that the CPU has (zmm, ymm or xmm; opmasks; mxcsr; x87), for some
 * milliseconds a round, and ends with code 9 at the first register that differs. Memory says which pattern: if memory
 * goes back and a register does not, or the other way round, it notices. The argument is the width in bytes, 64, 32 or 16;
 * a CPU that has less is told with code 3. Prints its pid; then rounds in answer to each line. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static volatile uint64_t rounds, seed;
static int width;
static uint64_t in[32][8] __attribute__((aligned(64))), out[32][8] __attribute__((aligned(64)));

#define SPIN "mov $2000000, %%rcx\n1: dec %%rcx\n jnz 1b\n"
#define EACH16(m) m(0) m(1) m(2) m(3) m(4) m(5) m(6) m(7) m(8) m(9) m(10) m(11) m(12) m(13) m(14) m(15)
#define EACH32(m) EACH16(m) m(16) m(17) m(18) m(19) m(20) m(21) m(22) m(23) m(24) m(25) m(26) m(27) m(28) m(29) m(30) m(31)
#define LOADZ(n) "vmovdqa64 " #n "*64(%0), %%zmm" #n "\n"
#define KEEPZ(n) "vmovdqa64 %%zmm" #n ", " #n "*64(%1)\n"
#define LOADY(n) "vmovdqa " #n "*64(%0), %%ymm" #n "\n"
#define KEEPY(n) "vmovdqa %%ymm" #n ", " #n "*64(%1)\n"
#define LOADX(n) "movdqa " #n "*64(%0), %%xmm" #n "\n"
#define KEEPX(n) "movdqa %%xmm" #n ", " #n "*64(%1)\n"

#define USED "memory", "rcx", "st", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
	"xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

#define UPPER "k3", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", \
	"xmm27", "xmm28", "xmm29", "xmm30", "xmm31"

/* What the assembler changes lies in memory. Only these functions may be compiled for a CPU that is not the least one. */
static struct { uint64_t mask; unsigned mxcsr; double x87; } now;

__attribute__((noinline, target("avx512f,avx512bw"))) static void wide64(void)
{
	__asm__ volatile("ldmxcsr %3\n fldl %4\n" EACH32(LOADZ) "kmovq %2, %%k3\n" SPIN EACH32(KEEPZ) "kmovq %%k3, %2\n"
			 "stmxcsr %3\n fstpl %4\n"
			 : : "r"(in), "r"(out), "m"(now.mask), "m"(now.mxcsr), "m"(now.x87) : USED, UPPER);
}

__attribute__((noinline, target("avx2"))) static void wide32(void)
{
	__asm__ volatile("ldmxcsr %2\n fldl %3\n" EACH16(LOADY) SPIN EACH16(KEEPY) "stmxcsr %2\n fstpl %3\n"
			 : : "r"(in), "r"(out), "m"(now.mxcsr), "m"(now.x87) : USED);
}

__attribute__((noinline)) static void wide16(void)
{
	__asm__ volatile("ldmxcsr %2\n fldl %3\n" EACH16(LOADX) SPIN EACH16(KEEPX) "stmxcsr %2\n fstpl %3\n"
			 : : "r"(in), "r"(out), "m"(now.mxcsr), "m"(now.x87) : USED);
}

static void once(void)
{
	const uint64_t mask = seed * 0x9E3779B97F4A7C15ull;
	const unsigned normal = 0x1f80, round = normal | (unsigned)(seed & 3) << 13;
	const double x87 = (double)(seed + 1);
	now.mask = mask;
	now.mxcsr = round;
	now.x87 = x87;
	for (int r = 0; r < 32; r++)
		for (int k = 0; k < 8; k++)
			in[r][k] = seed * 1000003 + (uint64_t)(r * 8 + k);
	memset(out, 0, sizeof out);
	if (width == 64)
		wide64();
	else if (width == 32)
		wide32();
	else
		wide16();
	__asm__ volatile("ldmxcsr %0" : : "m"(normal));
	int registers = width == 64 ? 32 : 16;
	for (int r = 0; r < registers; r++)
		if (memcmp(in[r], out[r], (size_t)width))
			_exit(9);
	if ((now.mxcsr & 0xffc0) != (round & 0xffc0) || now.x87 != x87 || (width == 64 && now.mask != mask))
		_exit(8);
	rounds++;
	seed = rounds * 77;
}

static void *work(void *unused)
{
	for (;;)
		once();
	return unused;
}

int main(int argc, char **argv)
{
	width = argc > 1 ? atoi(argv[1]) : 16;
	if ((width == 64 && !__builtin_cpu_supports("avx512bw")) || (width == 32 && !__builtin_cpu_supports("avx2")))
		return 3;
	pthread_t thread;
	pthread_create(&thread, NULL, work, NULL);
	printf("%d\n", getpid());
	fflush(stdout);
	char line[64];
	while (fgets(line, sizeof line, stdin)) {
		printf("%lu\n", (unsigned long)rounds);
		fflush(stdout);
	}
	return 0;
}
