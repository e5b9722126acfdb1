/* Tasks: who belongs to the tree, address spaces, ends, context switches. */
#ifndef PL_TASKS
#define PL_TASKS

static __always_inline void emit_task(struct task_struct *t, struct pl_task *s, u8 kind, u64 *args, const void *text)
{
	struct scratch *x = bpf_task_storage_get(&scratches, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	u32 n = 0;

	if (cfg.batch)
		flush_batch(s);
	if (!x) {
		ADD(lost_records, 1);
		return;
	}
	fill(&x->call.h, s, kind, 0);
	x->call.h.time_ns = bpf_ktime_get_ns();
	x->call.h.ip = 0;
	x->call.result = 0;
	__builtin_memcpy(x->call.args, args, 6 * sizeof(u64));
	x->call.dev = x->call.ino = 0;
	if (text)
		n = put_text(x, 0, text);
	emit_tail(x, 0, n);
}

SEC("tp_btf/task_newtask")
int BPF_PROG(task_new, struct task_struct *child, u64 clone_flags)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct pl_task *s = member(t), *c;
	u64 args[6] = {};

	if (!s || totals.stopped)
		return 0;
	c = bpf_task_storage_get(&tasks, child, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!c)
		return 0;       /* see began_unseen() */
	c->tid = ns_pid(child);
	c->pid = clone_flags & 0x10000 ? s->pid : c->tid;      /* CLONE_THREAD */
	if (clone_flags & 0x100) {                              /* CLONE_VM */
		c->mm = s->mm;
	} else {
		c->mm = ADD(next_mm, 1) + 1;
	}
	c->mm_ptr = (u64)child->mm;
	mm_use(c->mm_ptr, c->mm);
	member_add(c->tid, c->mm);
	c->nr = s->nr;          /* it returns from the same call */
	c->state = PL_T_LIVE;
	ADD(tasks_started, 1);
	args[0] = c->pid;
	args[1] = c->tid;
	args[2] = clone_flags;
	args[3] = c->mm;
	emit_task(t, s, PL_FORK, args, NULL);
	return 0;
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(task_exec, struct task_struct *p, int old_pid, struct linux_binprm *bprm)
{
	struct pl_task *s = member(p);
	u64 args[6] = {}, old;

	if (!s)
		return 0;
	old = s->mm_ptr;
	args[0] = s->mm;
	args[2] = s->tid;
	if (s->tid != s->pid)
		member_drop(s->tid);
	s->tid = s->pid;        /* de_thread() gave it the leader's number */
	if (old)
		mm_drop(old, s->mm);
	s->mm = ADD(next_mm, 1) + 1;
	s->mm_ptr = (u64)p->mm;
	mm_use(s->mm_ptr, s->mm);
	member_add(s->tid, s->mm);
	args[1] = s->mm;
	emit_task(p, s, PL_EXEC, args, bprm->filename);
	return 0;
}

/* The last switch away from a dead task: exit_mm() is over, so that exit-time faults are in its counters. */
static __always_inline void task_gone(struct task_struct *t, struct pl_task *s)
{
	u64 min = t->min_flt - s->base_min, all = counted(t) - s->base, maj = all - min, gup;
	struct pl_rec_call *r;

	if (__sync_lock_test_and_set(&s->state, PL_T_NEW) != PL_T_LIVE)
		return;         /* `adopt` has just taken its mark back */
	flush_failed(s);
	if (cfg.batch)
		flush_batch(s);
	gup = unaccounted(t, s);
	s->gup += gup;
	r = reserve(sizeof(*r));
	if (r) {
		fill(&r->h, s, PL_EXIT, 0);
		r->h.extra = gup;
		r->h.time_ns = bpf_ktime_get_ns();
		r->h.ip = 0;
		r->result = t->exit_code;
		r->args[0] = min;
		r->args[1] = maj;
		r->args[2] = s->recorded;
		r->args[3] = s->gup;
		r->args[4] = s->lost;
		r->args[5] = s->failed;
		r->dev = s->missed;
		r->ino = s->nofault;
		bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	}
	mm_drop(s->mm_ptr, s->mm);
	member_drop(s->tid);
	ADD(min_flt, min);
	ADD(maj_flt, maj);
	ADD(recorded, s->recorded);
	ADD(lost, s->lost);
	ADD(gup, s->gup);
	ADD(missed, s->missed);
	ADD(failed, s->failed);
	ADD(nofault, s->nofault);
	ADD(tasks_gone, 1);     /* last: user space waits for it */
}

static __always_inline void switched(struct pl_task *s, u8 flags, u64 state, u64 now)
{
	struct pl_rec_fault *r = reserve(sizeof(*r));

	if (!r)
		return;
	fill(&r->h, s, PL_SWITCH, flags);
	r->h.time_ns = now;
	r->h.ip = 0;
	r->addr = state;
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
}

SEC("tp_btf/sched_switch")
int BPF_PROG(task_switch, bool preempt, struct task_struct *prev, struct task_struct *next)
{
	struct pl_task *s;

	if (prev->__state & TASK_DEAD) {
		s = member(prev);
		if (!s)
			s = io_worker(prev);
		if (s)
			task_gone(prev, s);
		else if (cfg.batch)
			flush_rest(prev);
	} else if (cfg.switches || cfg.batch) {
		s = member(prev);
		if (s && cfg.batch)
			flush_batch(s);
		if (s && cfg.switches)
			switched(s, PL_F_OUT, preempt ? 0x100 : prev->__state, bpf_ktime_get_ns());
	}
	if (next->start_time >= totals.begun && !bpf_task_storage_get(&tasks, next, 0, 0))
		began_unseen(next, 0);
	if (cfg.switches) {
		s = member(next);
		if (s)
			switched(s, 0, 0, bpf_ktime_get_ns());
	}
	return 0;
}

#endif
