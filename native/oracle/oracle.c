/* The oracle child: a process that does what it is told, and nothing else.
 *
 * A proof compares page tables, vmas and fault counts of a real process with those of the model, so that process
 * must contain nothing that faults by itself. A libc child takes 5 faults for one write (measured): its stack, its
 * heap, its lazy binding. This one has no libc, no data, no heap: one text page from its file and one shared
 * anonymous region at a fixed address, in which its stacks and its scratch memory lie. Shared, because fork() does not
 * write-protect shared pages: neither parent nor child takes a copy-on-write fault of its own afterwards.
 * Everything else that exec made (stack, vdso, vvar) is unmapped before the first command.
 *
 * Rejected: ptrace injection into an ordinary child (several stops for each call, signals interfere);
 * a private stack (each fork would add faults on both sides).
 *
 * Protocol: fixed-size commands on descriptor 100+2*slot, fixed-size replies on 101+2*slot. A slot is one thread
 * or process; `clone` starts another slot. Fault counts are those of the calling thread (getrusage RUSAGE_THREAD),
 * read immediately before and after the operation.
 */
#include <stdint.h>

#define REGION 0x20000000UL
#define SLOT_SIZE 0x8000UL /* room for a signal frame with all of AVX-512 and AMX (12 KiB) */
#define SLOTS 16
#define REGION_SIZE (SLOT_SIZE * SLOTS)
#define TASK_END 0x7ffffffff000UL
#define FD_CMD(slot) (100 + 2 * (slot))
#define FD_REPLY(slot) (101 + 2 * (slot))

enum { OP_SYSCALL = 1, OP_READ, OP_WRITE, OP_EXEC, OP_CLONE, OP_SETTLE, OP_UNMAP_REST, OP_EXECVE };

struct command { uint64_t op, nr, a[6]; };
struct reply { int64_t ret; uint64_t min_flt, maj_flt; int64_t sig, code; uint64_t addr, done, spare; };

/* At the low end of the slot; the stack grows down from its high end. */
struct slot {
  struct command cmd;
  struct reply reply;
  uint64_t number;
  uint64_t recover; /* where the handler goes on */
  uint64_t target;  /* page that OP_EXEC jumps to */
  int64_t sig, code;
  uint64_t addr;
  int64_t usage[18]; /* struct rusage: min_flt is word 8, maj_flt word 9 */
};

struct sigaction_k { void (*handler)(int, void *, void *); uint64_t flags; void (*restorer)(void); uint64_t mask; };

enum {
  NR_READ = 0, NR_WRITE = 1, NR_MMAP = 9, NR_MUNMAP = 11, NR_RT_SIGACTION = 13, NR_CLONE = 56, NR_EXECVE = 59,
  NR_EXIT = 60, NR_GETRUSAGE = 98, NR_PERSONALITY = 135, NR_PRCTL = 157, NR_EXIT_GROUP = 231
};

static inline long sys6(long nr, long a, long b, long c, long d, long e, long f) {
  long ret;
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  __asm__ volatile("syscall" : "=a"(ret) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return ret;
}
#define sys3(nr, a, b, c) sys6(nr, (long)(a), (long)(b), (long)(c), 0, 0, 0)

static inline struct slot *slot_at(uint64_t number) { return (struct slot *)(REGION + number * SLOT_SIZE); }
static inline struct slot *own_slot(void) {
  return (struct slot *)((uint64_t)__builtin_frame_address(0) & ~(SLOT_SIZE - 1));
}

void pl_restorer(void);
__asm__(".text\n.globl pl_restorer\n.hidden pl_restorer\npl_restorer:\n  mov $15, %eax\n  syscall\n");

/* The frame lies on the slot's stack, which is resident: delivery takes no fault. */
static void handler(int sig, void *info, void *context) {
  struct slot *s = own_slot();
  uint64_t *rip = (uint64_t *)((char *)context + 40) + 16; /* uc_mcontext.gregs[REG_RIP] */
  s->code = *(int32_t *)((char *)info + 8);
  s->addr = *(uint64_t *)((char *)info + 16);
  /* OP_EXEC: the fetch succeeded, and the zeros there (add %al,(%rax) with a non-canonical rax) raised #GP,
   * which is no page fault. SI_KERNEL (0x80) at that very address says so. */
  if (s->target && s->code == 0x80 && *rip == s->target) s->sig = 0;
  else s->sig = sig;
  if (!s->recover) sys3(NR_EXIT_GROUP, 127, 0, 0);
  *rip = s->recover;
}

static void catch_signals(void) {
  static const int caught[] = {4, 5, 7, 8, 11};
  struct sigaction_k act = {handler, 0x44000004UL, pl_restorer, 0}; /* SIGINFO | RESTORER | NODEFER */
  for (unsigned i = 0; i < sizeof caught / sizeof *caught; i++)
    sys6(NR_RT_SIGACTION, caught[i], (long)&act, 0, 8, 0, 0);
}

/* Touch every page of the harness, by an atomic write that changes nothing, until none would fault. */
static void settle(uint64_t text, uint64_t text_pages) {
  for (uint64_t p = REGION; p < REGION + REGION_SIZE; p += 4096)
    __asm__ volatile("lock orb $0, (%0)" : : "r"(p) : "memory", "cc");
  for (uint64_t i = 0; i < text_pages; i++) (void)*(volatile char *)(text + i * 4096);
}

static void touch(struct slot *s, uint64_t kind, uint64_t addr, uint64_t pages) {
  uint64_t i;
  for (i = 0; i < pages; i++, addr += 4096) {
    s->sig = 0;
    s->target = kind == OP_EXEC ? addr : 0;
    if (kind == OP_READ)
      __asm__ volatile("lea 1f(%%rip), %%rax\n mov %%rax, %0\n movb (%1), %%al\n1:"
                       : "=m"(s->recover) : "r"(addr) : "rax", "memory");
    else if (kind == OP_WRITE)
      __asm__ volatile("lea 1f(%%rip), %%rax\n mov %%rax, %0\n movb $0, (%1)\n1:"
                       : "=m"(s->recover) : "r"(addr) : "rax", "memory");
    else
      __asm__ volatile("lea 1f(%%rip), %%rax\n mov %%rax, %0\n mov $1, %%eax\n shl $63, %%rax\n jmp *%1\n1:"
                       : "=m"(s->recover) : "r"(addr) : "rax", "memory", "cc");
    s->recover = 0;
    if (s->sig) break;
  }
  s->target = 0;
  s->reply.done = i;
  if (s->sig) {
    s->reply.sig = s->sig;
    s->reply.code = s->code;
    s->reply.addr = s->addr;
  }
}

void pl_serve(uint64_t number);

/* This program again, in the same slot; descriptors stay. It answers when it is there (pl_main). */
static long again(uint64_t number) {
  char path[] = "/proc/self/exe", digits[] = {(char)('0' + number / 10), (char)('0' + number % 10), 0};
  char *argv[] = {path, digits, 0}, *envp[] = {0};
  return sys3(NR_EXECVE, path, argv, envp);
}

/* clone(2) onto the stack of another slot; the child starts in pl_serve(number). */
static long start_slot(uint64_t flags, uint64_t number) {
  uint64_t *stack = (uint64_t *)(REGION + (number + 1) * SLOT_SIZE - 64);
  long ret;
  stack[0] = number;
  register long r10 __asm__("r10") = 0;
  register long r8 __asm__("r8") = 0;
  __asm__ volatile("syscall\n test %%rax, %%rax\n jnz 1f\n mov (%%rsp), %%rdi\n xor %%ebp, %%ebp\n call pl_serve\n"
                   " ud2\n1:"
                   : "=a"(ret) : "a"(NR_CLONE), "D"(flags), "S"(stack), "d"(0), "r"(r10), "r"(r8)
                   : "rcx", "r11", "memory");
  return ret;
}

__attribute__((used)) void pl_serve(uint64_t number) {
  struct slot *s = slot_at(number);
  s->number = number;
  s->recover = s->target = 0;
  sys3(NR_PRCTL, 1, 9, 0); /* PR_SET_PDEATHSIG, SIGKILL: no orphan outlives the proof */
  for (;;) {
    uint64_t got = 0;
    while (got < sizeof s->cmd) {
      long n = sys3(NR_READ, FD_CMD(number), (char *)&s->cmd + got, sizeof s->cmd - got);
      if (n <= 0) sys3(NR_EXIT_GROUP, n ? 126 : 0, 0, 0);
      got += (uint64_t)n;
    }
    struct command *c = &s->cmd;
    __builtin_memset(&s->reply, 0, sizeof s->reply);
    sys3(NR_GETRUSAGE, 1, s->usage, 0);
    int64_t min_flt = s->usage[8], maj_flt = s->usage[9];
    switch (c->op) {
      case OP_SYSCALL:
        s->reply.ret = sys6((long)c->nr, (long)c->a[0], (long)c->a[1], (long)c->a[2], (long)c->a[3], (long)c->a[4],
                            (long)c->a[5]);
        break;
      case OP_READ: case OP_WRITE: case OP_EXEC: touch(s, c->op, c->a[0], c->a[1]); break;
      case OP_CLONE: s->reply.ret = start_slot(c->a[0], c->a[1]); break;
      case OP_SETTLE: settle(c->a[0], c->a[1]); break;
      case OP_UNMAP_REST: /* all that exec left above the region: stack, vvar, vdso */
        s->reply.ret = sys3(NR_MUNMAP, REGION + REGION_SIZE, TASK_END - REGION - REGION_SIZE, 0);
        break;
      case OP_EXECVE: s->reply.ret = again(number); break;
      default: s->reply.ret = -38;
    }
    sys3(NR_GETRUSAGE, 1, s->usage, 0);
    s->reply.min_flt = (uint64_t)(s->usage[8] - min_flt);
    s->reply.maj_flt = (uint64_t)(s->usage[9] - maj_flt);
    if (sys3(NR_WRITE, FD_REPLY(number), &s->reply, sizeof s->reply) != sizeof s->reply)
      sys3(NR_EXIT_GROUP, 126, 0, 0);
  }
}

__attribute__((used, noreturn)) void pl_main(char **stack) {
  long argc = *(long *)stack;
  char **argv = stack + 1, **envp = argv + argc + 1;
  long persona = sys3(NR_PERSONALITY, 0xffffffff, 0, 0);
  if (persona >= 0 && !(persona & 0x40000) && sys3(NR_PERSONALITY, persona | 0x40000, 0, 0) >= 0)
    sys3(NR_EXECVE, argv[0], argv, envp); /* again, without randomised addresses; on failure go on as we are */
  sys6(NR_PRCTL, 41, 1, 0, 0, 0, 0);      /* PR_SET_THP_DISABLE */
  /* MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_POPULATE */
  if (sys6(NR_MMAP, REGION, REGION_SIZE, 3, 0x108021, -1, 0) != (long)REGION) sys3(NR_EXIT_GROUP, 125, 0, 0);
  catch_signals();
  uint64_t number = argc > 1 ? (uint64_t)(10 * (argv[1][0] - '0') + argv[1][1] - '0') : 0;
  if (argc > 1) {
    struct reply reply;
    __builtin_memset(&reply, 0, sizeof reply);
    sys3(NR_WRITE, FD_REPLY(number), &reply, sizeof reply);
  }
  uint64_t top = REGION + (number + 1) * SLOT_SIZE - 64;
  __asm__ volatile("mov %0, %%rsp\n mov %1, %%rdi\n xor %%ebp, %%ebp\n call pl_serve\n ud2"
                   : : "r"(top), "r"(number) : "rdi", "memory");
  __builtin_unreachable();
}

__asm__(".text\n.globl _start\n_start:\n  mov %rsp, %rdi\n  and $-16, %rsp\n  call pl_main\n  ud2\n");
