/* System calls of the tree: which are kept, their files, the faults that the kernel made for them. */
#ifndef PL_CALLS
#define PL_CALLS

#include "reach.h"

enum { W_ALWAYS = 1, W_PRCTL, W_PRLIMIT, W_IOCTL, W_OPEN };

#define NR_OPEN 2
#define NR_TRUNCATE 76
#define NR_CREAT 85
#define NR_OPENAT 257
#define NR_OPENAT2 437
#define O_TRUNC 01000

#define PAGEMAP_SCAN 0x6610     /* type and number */

/* exit and exit_group return to nobody: they are kept as they begin. */
static __always_inline void ending_call(void *ctx, struct task_struct *t, struct pl_task *s, struct pt_regs *regs)
{
	struct scratch *x = bpf_task_storage_get(&scratches, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	u32 frames;

	if (!x) {
		ADD(lost_records, 1);
		return;
	}
	fill(&x->call.h, s, PL_SYSCALL, 0);
	x->call.h.time_ns = s->enter_time;
	x->call.h.ip = regs->ip;
	x->call.result = 0;
	__builtin_memcpy(x->call.args, s->args, sizeof(s->args));
	x->call.dev = x->call.ino = 0;
	frames = call_stack(ctx, s, x);
	emit_tail(x, frames, 0);
}

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
	if ((nr == NR_EXIT || nr == NR_EXIT_GROUP) && !s->compat)
		ending_call(ctx, t, s, regs);
	return 0;
}

/* Whether a call that opened a file has emptied it. */
static __always_inline int empties(struct pl_task *s, long ret)
{
	u64 flags = s->nr == NR_CREAT ? O_TRUNC : s->nr == NR_OPEN ? s->args[1] : s->args[2];

	if (ret < 0 || s->compat)
		return 0;
	if (s->nr == NR_OPENAT2) {      /* the first word of struct open_how */
		u64 at = flags;

		flags = 0;
		s->walking = 1;
		bpf_probe_read_user(&flags, sizeof(flags), (void *)at);
		s->walking = 0;
	}
	return (flags & O_TRUNC) != 0;
}

static __always_inline int opens(long nr)
{
	return nr == NR_OPEN || nr == NR_CREAT || nr == NR_OPENAT || nr == NR_OPENAT2;
}

/* truncate(2) names its file by a path: which one it is, shows when its pages leave the page cache. What reclaim takes
 * meanwhile, in this task, is not meant. */
SEC("tp_btf/mm_filemap_delete_from_page_cache")
int BPF_PROG(page_cut, struct folio *folio)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct pl_task *s = member(t);
	struct scratch *x;
	struct inode *inode;

	if (!s || s->nr != NR_TRUNCATE || s->compat || t->flags & PF_MEMALLOC)
		return 0;
	x = bpf_task_storage_get(&scratches, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!x || x->cut_at == s->enter_time)
		return 0;
	inode = BPF_CORE_READ(folio, mapping, host);
	x->cut_dev = BPF_CORE_READ(inode, i_sb, s_dev);
	x->cut_ino = BPF_CORE_READ(inode, i_ino);
	x->cut_at = s->enter_time;
	return 0;
}

static __always_inline int wanted_call(struct pl_task *s, long ret)
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
	case W_IOCTL:   /* userfaultfd's are of type 0xaa; PAGEMAP_SCAN */
		return ((s->args[1] >> 8) & 0xff) == 0xaa || (s->args[1] & 0xffff) == PAGEMAP_SCAN;
	case W_OPEN:
		return empties(s, ret);
	default:
		return 1;
	}
}

SEC("tp_btf/sys_exit")
int BPF_PROG(call_exit, struct pt_regs *regs, long ret)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct pl_task *s = member(t);
	struct scratch *x;
	struct file *f;
	u64 gup, now;
	u32 frames, text = 0, on = 0;
	int nr, acts = ACTS_NOT;

	if (!s)
		return foreign_call(t, regs, ret);
	flush_failed(s);
	gup = unaccounted(t, s);
	nr = s->nr;
	if (nr == PL_OLD_CALL) {        /* it began before we looked */
		nr = (int)regs->orig_ax;
		s->nr = nr;
		s->enter_time = 0;
	}
	if (nr < 0)
		return 0;
	if (s->mm == 0 && (nr == 59 || nr == 322) && ret < 0 && s->state == PL_T_LIVE) {
		s->state = PL_T_ARMED;  /* the launcher's execve failed: not part of the program */
		s->nr = PL_NO_CALL;
		return 0;
	}
	s->gup += gup;
	f = NULL;
	if (writes(nr) && ret > 0 && !s->compat) {
		f = file_of(t, regs->di);
		acts = by_file(f);
		on = acts ? acts_on(t, owner_of(f)) : 0;
	}
	if (!s->enter_time) {           /* a new task's return from its parent's clone */
		s->nr = PL_NO_CALL;
		if (!gup)
			return 0;
	} else if (!wanted_call(s, ret) && !gup && !on) {
		s->nr = PL_NO_CALL;
		return 0;
	}
	x = bpf_task_storage_get(&scratches, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!x) {
		ADD(lost_records, 1);
		s->nr = PL_NO_CALL;
		return 0;
	}
	if (cfg.batch)
		flush_batch(s); /* before what may unmap it */
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
		u64 words[3] = {}, at = s->args[2];

		if ((s->args[1] & 0xffff) == PAGEMAP_SCAN)
			at += 8;        /* behind its own size: flags, start, end */
		s->walking = 1;
		if (!bpf_probe_read_user(words, sizeof(words), (void *)at))
			__builtin_memcpy(&x->call.args[3], words, sizeof(words));
		s->walking = 0;
	}
	frames = call_stack(ctx, s, x);
	if (on) {
		x->call.h.mm = on;
		if (acts == ACTS_REFS) {
			s->walking = 1;
			x->call.args[1] = digit_of(nr, s->args[1]);
			s->walking = 0;
			text = put_text(x, frames, BPF_CORE_READ(f, f_path.dentry, d_parent, d_name.name));
			f = NULL;
		} else {
			x->call.args[3] = written_at(f, nr, s->args[3], ret);
		}
	} else if (nr == 9 && !(s->args[3] & 0x20) && ret >= 0) {       /* mmap without MAP_ANONYMOUS */
		f = file_of(t, s->args[4]);
	} else if (nr == 18 || nr == 296 || nr == 328 || nr == 74 || nr == 75 || nr == 77 || nr == 285) {
		f = file_of(t, s->args[0]);     /* pwrite64, pwritev, pwritev2, fsync, fdatasync, ftruncate, fallocate */
	} else if (opens(nr) && empties(s, ret)) {
		f = file_of(t, ret);
	} else {
		f = NULL;
	}
	if (nr == NR_TRUNCATE && !s->compat && ret >= 0 && x->cut_at && x->cut_at == s->enter_time) {
		x->call.dev = x->cut_dev;
		x->call.ino = x->cut_ino;
		x->call.h.flags |= PL_F_FILE;
	}
	if (reaches(nr) && !s->compat) {
		s->walking = 1;
		text = put_vectors(x, frames, s->args[3], s->args[4]);
		s->walking = 0;
	}
	if (f) {
		struct inode *inode = BPF_CORE_READ(f, f_inode);

		x->call.dev = BPF_CORE_READ(inode, i_sb, s_dev);
		x->call.ino = BPF_CORE_READ(inode, i_ino);
		x->call.h.flags |= PL_F_FILE;
		text = put_text(x, frames, BPF_CORE_READ(f, f_path.dentry, d_name.name));
	}
	s->nr = PL_NO_CALL;
	s->enter_time = 0;
	emit_tail(x, frames, text);
	return 0;
}

#endif
