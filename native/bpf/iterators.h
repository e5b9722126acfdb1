/* Iterators over all tasks, run from user space: `adopt` marks the tasks of processes that run already, `collect` ends
 * the recording of those that still run and writes their counters. */
#ifndef PL_ITERATORS
#define PL_ITERATORS

SEC("iter/task")
int adopt(struct bpf_iter__task *ctx)
{
	struct task_struct *t = ctx->task, *me = bpf_get_current_task_btf();
	struct pl_rec_call *r;
	struct mm_entry *e;
	struct pl_task *s;
	u32 tgid;
	u64 ptr;

	if (!t)
		return 0;
	if (me->thread_pid)
		totals.pid_level = me->thread_pid->level;
	tgid = ns_tgid(t);
	if (!bpf_map_lookup_elem(&targets, &tgid) || !t->mm || (t->__state & TASK_DEAD))
		return 0;
	s = bpf_task_storage_get(&tasks, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!s) {
		if (!(t->__state & TASK_DEAD))  /* else it has come to its end just now */
			ADD(unmarked, 1);
		return 0;
	}
	if (s->state != PL_T_NEW || s->tid)
		return 0;
	ptr = (u64)t->mm;
	e = bpf_map_lookup_elem(&mms, &ptr);
	s->mm = e ? e->id : (u32)(ADD(next_mm, 1) + 1);
	s->mm_ptr = ptr;
	mm_use(ptr, s->mm);
	s->pid = tgid;
	s->tid = ns_pid(t);
	member_add(s->tid, s->mm);
	s->nr = PL_OLD_CALL;
	s->base_min = t->min_flt;
	s->base = counted(t);
	s->fresh = 1;
	ADD(tasks_started, 1);
	ADD(adopted, 1);
	s->state = PL_T_LIVE;
	if (t->__state & TASK_DEAD && __sync_lock_test_and_set(&s->state, PL_T_NEW) == PL_T_LIVE) {
		/* It ended before it was marked, or its last switch is yet to come, and will find it unmarked. */
		mm_drop(ptr, s->mm);
		member_drop(s->tid);
		ADD(tasks_started, -1);
		ADD(adopted, -1);
		return 0;
	}
	r = reserve(sizeof(*r) + 16);
	if (!r)
		return 0;
	__builtin_memset(r, 0, sizeof(*r) + 16);
	fill(&r->h, s, PL_START, 0);
	r->h.nr = PL_NO_CALL;
	r->h.time_ns = bpf_ktime_get_ns();
	r->args[0] = s->pid;
	r->args[1] = s->tid;
	r->args[3] = s->mm;
	r->h.ntext = 16;
	bpf_probe_read_kernel_str((char *)r + sizeof(*r), 16, t->comm);
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	return 0;
}

SEC("iter/task")
int collect(struct bpf_iter__task *ctx)
{
	struct task_struct *t = ctx->task;
	struct pl_rec_call r = {};
	struct pl_task *s;
	u64 rest;

	if (!t)
		return 0;
	s = member(t);
	if (!s)
		return 0;
	if (__sync_lock_test_and_set(&s->state, PL_T_NEW) != PL_T_LIVE) /* from here on nothing of it is recorded */
		return 0;       /* it has just ended by itself */
	r.args[0] = t->min_flt - s->base_min;
	r.args[1] = counted(t) - s->base - r.args[0];
	rest = r.args[0] + r.args[1] - s->recorded - s->lost - s->gup - s->missed;
	if (s->nr == PL_NO_CALL && rest == 1) {
		/* In user mode with one fault counted: it is just being completed on another CPU, and we have turned
		 * its event away. It belongs to the time after the recording. */
		r.args[0]--;
		rest = 0;
	}
	s->gup += rest;         /* of the call that it is in */
	fill(&r.h, s, PL_EXIT, 0);
	r.h.time_ns = bpf_ktime_get_ns();
	r.args[2] = s->recorded;
	r.args[3] = s->gup;
	r.args[4] = s->lost;
	r.args[5] = s->failed;
	r.dev = s->missed;
	r.ino = s->nofault;
	ADD(min_flt, r.args[0]);
	ADD(maj_flt, r.args[1]);
	ADD(recorded, s->recorded);
	ADD(lost, s->lost);
	ADD(gup, s->gup);
	ADD(missed, s->missed);
	ADD(failed, s->failed);
	ADD(nofault, s->nofault);
	ADD(tasks_gone, 1);
	bpf_seq_write(ctx->meta->seq, &r, sizeof(r));
	return 0;
}

/* After `collect`, when no program runs any more that had begun before it: faults of tasks that still run. */
SEC("iter/task")
int leftover(struct bpf_iter__task *ctx)
{
	struct task_struct *t = ctx->task;

	if (t)
		flush_rest(t);
	return 0;
}

#endif
