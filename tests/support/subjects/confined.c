/* confined docker|systemd CMD…: executes CMD under a seccomp filter that refuses (EPERM)
 *   docker    what Docker's default profile refuses without capabilities
 *   systemd   what a unit with SystemCallFilter=@system-service and MemoryDenyWriteExecute=yes is refused: ptrace too, and
 *             memory that is writable and executable
 */
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NR_PIDFD_GETFD 438
#define REFUSE(nr) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 1)
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
/* If the call is nr and its third argument has all these bits, refuse it. */
#define REFUSE_PROT(call, bits)                                            \
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 5), LOAD(args[2]),      \
	BPF_STMT(BPF_ALU | BPF_AND | BPF_K, bits),                         \
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, bits, 0, 1),                   \
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 1), LOAD(nr)
#define COMMON REFUSE(SYS_perf_event_open), REFUSE(SYS_bpf), REFUSE(SYS_userfaultfd), REFUSE(SYS_mount), REFUSE(NR_PIDFD_GETFD)

int main(int argc, char **argv)
{
	struct sock_filter docker[] = { LOAD(nr), COMMON, BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW) };
	struct sock_filter systemd[] = { LOAD(nr), COMMON, REFUSE(SYS_ptrace), REFUSE_PROT(SYS_mmap, 6),
					 REFUSE_PROT(SYS_mprotect, 6), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW) };
	struct sock_fprog program = { sizeof(docker) / sizeof(*docker), docker };

	if (argc < 3)
		return 98;
	if (!strcmp(argv[1], "systemd"))
		program = (struct sock_fprog){ sizeof(systemd) / sizeof(*systemd), systemd };
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) {
		perror("confined");
		return 99;
	}
	execvp(argv[2], argv + 2);
	return 98;
}
