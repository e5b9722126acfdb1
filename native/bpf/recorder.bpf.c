/* The recorder's programs: completed and failed faults, memory system calls, tasks, switches, daemons.
 *
 * Why BPF: the kernel's own counters can be read in the very task and at the very call (so GUP faults are known
 * call by call), and what other processes do is turned away by one pointer test, before it costs a ring anything.
 * Membership is a task-storage value: NULL for everyone but the recorded tree. Children inherit it in
 * task_newtask, before they run.
 *
 * Rejected: inherited perf events (a new thread pays for each of them); kprobes and fentry (not in every kernel);
 * one shared ring (CPUs contend, and order must be restored anyway).
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include "record.h"

char LICENSE[] SEC("license") = "GPL";

const volatile struct pl_settings cfg = {};
struct pl_totals totals = {};

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct pl_task);
} tasks SEC(".maps");

struct inner_ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);         /* set to the number of CPUs */
	__type(key, u32);
	__array(values, struct inner_ring);
} rings SEC(".maps");

/* 0: not wanted; 1: always; else a class of conditions, see wanted_call(). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 512);
	__type(key, u32);
	__type(value, u8);
} wanted SEC(".maps");

struct mm_entry {
	u32 id, users;
};
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, struct mm_entry);
} mms SEC(".maps");

/* Where a record with a tail of unknown length is put together. It is per task, so that neither preemption nor
 * a nested program can touch it. */
struct scratch {
	struct pl_rec_call call;
	u64 tail[160];  /* more than 127 frames and 255 bytes: what the masks below allow */
};
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct scratch);
} scratches SEC(".maps");

#define ADD(field, n) __sync_fetch_and_add(&totals.field, (n))

static __always_inline void *my_ring(u32 cpu)
{
	return bpf_map_lookup_elem(&rings, &cpu);
}

static __always_inline int ns_pid(struct task_struct *t)
{
	struct pid *p;

	if (!totals.pid_level)
		return t->pid;
	p = t->thread_pid;
	if (!p)
		return 0;
	int nr = 0;
	bpf_probe_read_kernel(&nr, sizeof(nr),
			      (char *)&p->numbers[0] + (totals.pid_level & 31) * bpf_core_type_size(struct upid));
	return nr;
}

static __always_inline u64 counted(struct task_struct *t)
{
	return t->min_flt + t->maj_flt;
}

static __always_inline void fill(struct pl_head *h, struct pl_task *s, u8 kind, u8 flags)
{
	h->kind = kind;
	h->flags = flags;
	h->nframes = 0;
	h->ntext = 0;
	h->nr = s->nr;
	h->cpu = bpf_get_smp_processor_id();
	h->pid = s->pid;
	h->tid = s->tid;
	h->mm = s->mm;
	h->extra = 0;
	h->latency_ns = 0;
}

static __always_inline u64 user_ip(struct task_struct *t)
{
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(t);

	return (regs->cs & 3) == 3 ? regs->ip : 0;
}

/* A fault that was entered and that nothing completed. */
static __always_inline void flush_failed(struct pl_task *s)
{
	struct pl_rec_fault *r;
	void *ring;

	if (!s->pend)
		return;
	s->failed++;
	ring = my_ring(bpf_get_smp_processor_id());
	r = ring ? bpf_ringbuf_reserve(ring, sizeof(*r), 0) : NULL;
	if (r) {
		fill(&r->h, s, PL_FAULT, PL_F_FAILED | PL_F_ERROR | (s->pend >> 8));
		r->h.extra = s->pend_error;
		r->h.time_ns = s->pend_time;
		r->h.ip = s->pend_ip;
		r->addr = s->pend_addr;
		bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	} else {
		ADD(lost_records, 1);
	}
	s->pend = 0;
}

/* The state of the running task if it is recorded. io_uring's workers start without task_newtask: adopted here. */
static __always_inline struct pl_task *member(struct task_struct *t)
{
	struct pl_task *s = bpf_task_storage_get(&tasks, t, 0, 0);

	if (!s || s->state != PL_T_LIVE)
		return NULL;
	return s;
}

static __always_inline int completed(struct perf_context *ctx, u8 major)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct pl_task *s = member(t);
	struct pl_rec_fault *r;
	u8 flags = major | ((ctx->cs & 3) == 3 ? PL_F_USER : 0);
	u64 addr = ctx->addr, now, ip = ctx->ip;
	void *ring;

	if (!s)
		return 0;
	if (cfg.entry && s->pend && s->pend_addr != addr)
		flush_failed(s);
	if (!(flags & PL_F_USER))
		ip = user_ip(t);
	ring = my_ring(bpf_get_smp_processor_id());
	if (!ring)
		return 0;
	now = bpf_ktime_get_ns();
	if (cfg.stacks) {
		struct scratch *x = bpf_task_storage_get(&scratches, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
		long n;

		if (!x)
			goto lost;
		r = (struct pl_rec_fault *)&x->call;
		fill(&r->h, s, PL_FAULT, flags);
		r->h.time_ns = now;
		r->h.ip = ip;
		r->addr = addr;
		if (s->pend) {
			r->h.flags |= PL_F_LATENCY | PL_F_ERROR;
			r->h.extra = s->pend_error;
			r->h.latency_ns = now - s->pend_time;
			s->pend = 0;
		}
		s->walking = 1;
		n = bpf_get_stack(ctx, (char *)x + sizeof(*r), PL_MAX_FRAMES * 8, BPF_F_USER_STACK);
		s->walking = 0;
		if (n < 0 || n > PL_MAX_FRAMES * 8)
			n = 0;
		r->h.nframes = n >> 3;
		if (bpf_ringbuf_output(ring, x, sizeof(*r) + (n & 1023), BPF_RB_NO_WAKEUP))
			goto lost;
		s->recorded++;
		return 0;
	}
	r = bpf_ringbuf_reserve(ring, sizeof(*r), 0);
	if (!r)
		goto lost;
	fill(&r->h, s, PL_FAULT, flags);
	r->h.time_ns = now;
	r->h.ip = ip;
	r->addr = addr;
	if (cfg.entry && s->pend) {
		r->h.flags |= PL_F_LATENCY | PL_F_ERROR;
		r->h.extra = s->pend_error;
		r->h.latency_ns = now - s->pend_time;
		s->pend = 0;
	}
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	s->recorded++;
	return 0;
lost:
	s->lost++;
	s->pend = 0;
	return 0;
}

SEC("perf_event")
int fault_minor(struct perf_context *ctx)
{
	return completed(ctx, 0);
}

SEC("perf_event")
int fault_major(struct perf_context *ctx)
{
	return completed(ctx, PL_F_MAJOR);
}

static __always_inline int fault_entry(u64 addr, struct pt_regs *regs, u64 error, u32 user)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct pl_task *s = member(t);

	if (!s)
		return 0;
	if (!user) {
		if (addr >> 47)
			return 0;       /* a kernel address: spurious, or a probe of the kernel's own */
		if (t->pagefault_disabled) {
			if (!s->walking)
				s->nofault++;   /* the caller expects to be refused */
			return 0;
		}
	}
	flush_failed(s);
	s->pend_addr = addr;
	s->pend_error = error;
	s->pend_ip = user ? regs->ip : user_ip(t);
	s->pend_time = bpf_ktime_get_ns();
	s->pend = 1 | (user ? PL_F_USER << 8 : 0);
	return 0;
}

SEC("tp_btf/page_fault_user")
int BPF_PROG(entry_user, unsigned long addr, struct pt_regs *regs, unsigned long error)
{
	return fault_entry(addr, regs, error, 1);
}

SEC("tp_btf/page_fault_kernel")
int BPF_PROG(entry_kernel, unsigned long addr, struct pt_regs *regs, unsigned long error)
{
	return fault_entry(addr, regs, error, 0);
}

/* Counter increments since the last look that neither an event nor a call explains. */
static __always_inline u64 unaccounted(struct task_struct *t, struct pl_task *s)
{
	u64 n = counted(t) - s->base - s->recorded - s->lost - s->gup - s->missed;

	return (s64)n > 0 ? n : 0;
}

enum { W_ALWAYS = 1, W_PRCTL, W_PRLIMIT, W_IOCTL, W_EXEC, W_WRITE, W_CLONE };

SEC("tp_btf/sys_enter")
int BPF_PROG(call_enter, struct pt_regs *regs, long nr)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct pl_task *s = bpf_task_storage_get(&tasks, t, 0, 0);

	if (!s)
		return 0;
	if (s->state == PL_T_ARMED) {
		/* The first task is recorded from its execve on: what it did before was ours. */
		if (nr != 59 && nr != 322)
			return 0;
		if (t->thread_pid)
			totals.pid_level = t->thread_pid->level;
		s->state = PL_T_LIVE;
		s->base_min = t->min_flt;
		s->base = counted(t);
		s->recorded = s->lost = s->gup = s->missed = s->failed = s->nofault = 0;
	}
	if (s->state != PL_T_LIVE)
		return 0;
	flush_failed(s);
	s->missed += unaccounted(t, s);
	s->nr = nr;
	s->compat = t->thread_info.status & TS_COMPAT;
	s->args[0] = regs->di;
	s->args[1] = regs->si;
	s->args[2] = regs->dx;
	s->args[3] = regs->r10;
	s->args[4] = regs->r8;
	s->args[5] = regs->r9;
	s->enter_time = bpf_ktime_get_ns();
	return 0;
}

static __always_inline int wanted_call(struct pl_task *s)
{
	u32 key = s->nr;
	u8 *w;

	if (s->compat)
		return 0;
	w = bpf_map_lookup_elem(&wanted, &key);
	if (!w || !*w)
		return 0;
	switch (*w) {
	case W_PRCTL:   /* PR_SET_THP_DISABLE, PR_SET_MM, PR_SET_VMA, PR_SET_MDWE, PR_SET_MEMORY_MERGE */
		return s->args[0] == 41 || s->args[0] == 35 || s->args[0] == 0x53564d41 || s->args[0] == 65 ||
		       s->args[0] == 67;
	case W_PRLIMIT: /* a new limit of DATA, STACK, RSS, MEMLOCK or AS */
		return s->args[2] && (s->args[1] == 2 || s->args[1] == 3 || s->args[1] == 5 || s->args[1] == 8 ||
				      s->args[1] == 9);
	case W_IOCTL:   /* userfaultfd's are of type 0xaa */
		return ((s->args[1] >> 8) & 0xff) == 0xaa;
	default:
		return 1;
	}
}

/* The file behind a descriptor; 0 when there is none. */
static __always_inline struct file *file_of(struct task_struct *t, u64 fd)
{
	struct fdtable *fdt = t->files ? t->files->fdt : NULL;
	struct file *f = NULL;

	if (!fdt || fd >= fdt->max_fds)
		return NULL;
	bpf_probe_read_kernel(&f, sizeof(f), fdt->fd + (u32)fd);
	return f;
}

/* Emit a record whose tail (frames, then text) stands in the scratch. */
static __always_inline void emit_tail(struct scratch *x, u32 frames, u32 text)
{
	void *ring = my_ring(bpf_get_smp_processor_id());
	u32 size = sizeof(x->call) + (frames & 127) * 8 + (text & 255);

	if (!ring || bpf_ringbuf_output(ring, x, size, BPF_RB_NO_WAKEUP))
		ADD(lost_records, 1);
}

/* Text goes behind the frames; its length is rounded up to 8 (the rest is zero or old text after the NUL). */
static __always_inline u32 put_text(struct scratch *x, u32 frames, const void *from)
{
	long n;

	frames &= 127;
	if (frames > PL_MAX_FRAMES)
		frames = PL_MAX_FRAMES;
	n = bpf_probe_read_kernel_str(&x->tail[frames], PL_MAX_TEXT, from);
	if (n <= 0 || n > PL_MAX_TEXT)
		return 0;
	n = (n + 7) & ~7L;
	x->call.h.ntext = n;
	return n;
}

SEC("tp_btf/sys_exit")
int BPF_PROG(call_exit, struct pt_regs *regs, long ret)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct pl_task *s = member(t);
	struct scratch *x;
	struct file *f;
	u64 gup, now;
	u32 frames = 0, text = 0;
	int nr;

	if (!s)
		return 0;
	flush_failed(s);
	gup = unaccounted(t, s);
	nr = s->nr;
	if (nr < 0)
		return 0;
	if (s->mm == 0 && (nr == 59 || nr == 322) && ret < 0 && s->state == PL_T_LIVE) {
		s->state = PL_T_ARMED;  /* the launcher's execve failed: not part of the program */
		s->nr = -1;
		return 0;
	}
	s->gup += gup;
	if (!s->enter_time) {           /* a new task's return from its parent's clone */
		s->nr = -1;
		if (!gup)
			return 0;
	} else if (!wanted_call(s) && !gup) {
		s->nr = -1;
		return 0;
	}
	x = bpf_task_storage_get(&scratches, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!x) {
		ADD(lost_records, 1);
		s->nr = -1;
		return 0;
	}
	now = bpf_ktime_get_ns();
	fill(&x->call.h, s, PL_SYSCALL, s->compat ? PL_F_COMPAT : 0);
	x->call.h.nr = nr;
	x->call.h.extra = gup;
	x->call.h.time_ns = s->enter_time ? s->enter_time : now;
	x->call.h.latency_ns = s->enter_time ? now - s->enter_time : 0;
	if (s->enter_time)
		x->call.h.flags |= PL_F_LATENCY;
	x->call.h.ip = regs->ip;
	x->call.result = ret;
	__builtin_memcpy(x->call.args, s->args, sizeof(s->args));
	x->call.dev = x->call.ino = 0;
	if (nr == 16) { /* userfaultfd's: the range stands in the structure, and ioctl has but three arguments */
		u64 words[3] = {};

		s->walking = 1;
		if (!bpf_probe_read_user(words, sizeof(words), (void *)s->args[2]))
			__builtin_memcpy(&x->call.args[3], words, sizeof(words));
		s->walking = 0;
	}
	if (cfg.stacks) {
		long n;

		s->walking = 1;
		n = bpf_get_stack(ctx, x->tail, PL_MAX_FRAMES * 8, BPF_F_USER_STACK);
		s->walking = 0;
		if (n > 0 && n <= PL_MAX_FRAMES * 8)
			frames = n >> 3;
		x->call.h.nframes = frames;
	}
	f = NULL;
	if (nr == 9 && !(s->args[3] & 0x20) && ret >= 0)        /* mmap without MAP_ANONYMOUS */
		f = file_of(t, s->args[4]);
	else if (nr == 18 || nr == 296 || nr == 328 || nr == 74 || nr == 75 || nr == 77 || nr == 285)
		f = file_of(t, s->args[0]);     /* pwrite64, pwritev, pwritev2, fsync, fdatasync, ftruncate, fallocate */
	if (f) {
		struct inode *inode = BPF_CORE_READ(f, f_inode);

		x->call.dev = BPF_CORE_READ(inode, i_sb, s_dev);
		x->call.ino = BPF_CORE_READ(inode, i_ino);
		x->call.h.flags |= PL_F_FILE;
		text = put_text(x, frames, BPF_CORE_READ(f, f_path.dentry, d_name.name));
	}
	s->nr = -1;
	s->enter_time = 0;
	emit_tail(x, frames, text);
	return 0;
}

static __always_inline void mm_use(u64 ptr, u32 id)
{
	struct mm_entry *e = bpf_map_lookup_elem(&mms, &ptr), fresh = { id, 1 };

	if (e && e->id == id)
		__sync_fetch_and_add(&e->users, 1);
	else
		bpf_map_update_elem(&mms, &ptr, &fresh, BPF_ANY);
}

static __always_inline void mm_drop(u64 ptr, u32 id)
{
	struct mm_entry *e = bpf_map_lookup_elem(&mms, &ptr);

	if (e && e->id == id && __sync_fetch_and_add(&e->users, -1) == 1)
		bpf_map_delete_elem(&mms, &ptr);
}

static __always_inline void emit_task(struct task_struct *t, struct pl_task *s, u8 kind, u64 *args, const void *text)
{
	struct scratch *x = bpf_task_storage_get(&scratches, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	u32 n = 0;

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
	if (!c) {
		ADD(tasks_untracked, 1);
		return 0;
	}
	c->tid = ns_pid(child);
	c->pid = clone_flags & 0x10000 ? s->pid : c->tid;      /* CLONE_THREAD */
	if (clone_flags & 0x100) {                              /* CLONE_VM */
		c->mm = s->mm;
	} else {
		c->mm = ADD(next_mm, 1) + 1;
	}
	c->mm_ptr = (u64)child->mm;
	mm_use(c->mm_ptr, c->mm);
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
	s->tid = s->pid;        /* de_thread() gave it the leader's number */
	if (old)
		mm_drop(old, s->mm);
	s->mm = ADD(next_mm, 1) + 1;
	s->mm_ptr = (u64)p->mm;
	mm_use(s->mm_ptr, s->mm);
	args[1] = s->mm;
	emit_task(p, s, PL_EXEC, args, bprm->filename);
	return 0;
}

/* The last switch away from a dead task: exit_mm() is over, so that exit-time faults are in its counters. */
static __always_inline void task_gone(struct task_struct *t, struct pl_task *s)
{
	u64 min = t->min_flt - s->base_min, all = counted(t) - s->base, maj = all - min, gup;
	struct pl_rec_call *r;
	void *ring;

	flush_failed(s);
	gup = unaccounted(t, s);
	s->gup += gup;
	ring = my_ring(bpf_get_smp_processor_id());
	r = ring ? bpf_ringbuf_reserve(ring, sizeof(*r), 0) : NULL;
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
	} else {
		ADD(lost_records, 1);
	}
	mm_drop(s->mm_ptr, s->mm);
	ADD(min_flt, min);
	ADD(maj_flt, maj);
	ADD(recorded, s->recorded);
	ADD(lost, s->lost);
	ADD(gup, s->gup);
	ADD(missed, s->missed);
	ADD(failed, s->failed);
	ADD(nofault, s->nofault);
	s->state = PL_T_NEW;
	ADD(tasks_gone, 1);     /* last: user space waits for it */
}

static __always_inline void switched(struct pl_task *s, u8 flags, u64 state, u64 now)
{
	void *ring = my_ring(bpf_get_smp_processor_id());
	struct pl_rec_fault *r = ring ? bpf_ringbuf_reserve(ring, sizeof(*r), 0) : NULL;

	if (!r) {
		ADD(lost_records, 1);
		return;
	}
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
		if (s)
			task_gone(prev, s);
	} else if (cfg.switches) {
		s = member(prev);
		if (s)
			switched(s, PL_F_OUT, preempt ? 0x100 : prev->__state, bpf_ktime_get_ns());
	}
	if (cfg.switches) {
		s = member(next);
		if (s)
			switched(s, 0, 0, bpf_ktime_get_ns());
	}
	return 0;
}
