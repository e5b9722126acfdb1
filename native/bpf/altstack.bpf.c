/* The alternate signal stacks of a process's threads: the one part of a thread's state that neither ptrace nor /proc
 * shows. An object of its own, because it needs nothing of the recorder and must load quickly.
 *
 * Rejected: letting each thread call sigaltstack(2) (a call per thread while the process is held, and a signal frame
 * written onto each stack that is to be saved as it is).
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "GPL";

struct altstack {
	u64 sp, size;
	u32 tid, flags;
};

u32 wanted = 0; /* process id, in the reader's namespace */

static __always_inline int number_at(struct pid *pid, u32 level)
{
	struct upid u = {};

	if (!pid || pid->level < level)
		return 0;
	bpf_core_read(&u, sizeof(u), &pid->numbers[level]);
	return u.nr;
}

SEC("iter/task")
int altstacks(struct bpf_iter__task *ctx)
{
	struct task_struct *t = ctx->task, *me = bpf_get_current_task_btf();
	struct altstack out = {};
	u32 level;

	if (!t || !t->group_leader || !me->thread_pid)
		return 0;
	level = me->thread_pid->level;
	if (number_at(t->group_leader->thread_pid, level) != (int)wanted)
		return 0;
	out.tid = number_at(t->thread_pid, level);
	out.sp = t->sas_ss_sp;
	out.size = t->sas_ss_size;
	out.flags = t->sas_ss_flags;
	if (out.tid)
		bpf_seq_write(ctx->meta->seq, &out, sizeof(out));
	return 0;
}
