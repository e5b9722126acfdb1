/* System calls of the tree: which are kept, their files, the faults that the kernel made for them. */
#ifndef PL_CALLS
#define PL_CALLS

enum { W_ALWAYS = 1, W_PRCTL, W_PRLIMIT, W_IOCTL };

#define PAGEMAP_SCAN 0x6610     /* type and number */
#define NR_WRITE 1
#define NR_PROCESS_VM_WRITEV 311

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
	case W_IOCTL:   /* userfaultfd's are of type 0xaa; PAGEMAP_SCAN */
		return ((s->args[1] >> 8) & 0xff) == 0xaa || (s->args[1] & 0xffff) == PAGEMAP_SCAN;
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

/* Writes to clear_refs, by anyone: they change what the tree's page tables say. The file is known by its operations,
 * whose address we learn from a write of our own (it is not in kallsyms everywhere). */
static __always_inline int is_clear_refs(struct task_struct *t, u64 fd)
{
	struct file *f;
	u64 op;

	if (!totals.clear_refs && !totals.learn)
		return 0;
	f = file_of(t, fd);
	if (!f)
		return 0;
	op = (u64)BPF_CORE_READ(f, f_op);
	if (totals.learn && totals.learn == (u32)t->tgid) {
		totals.clear_refs = op;
		totals.learn = 0;
		return 0;
	}
	return op == totals.clear_refs;
}

/* The number that a text begins with, at most 10 digits. */
static __always_inline u32 decimal(const char *text)
{
	u32 n = 0;

	for (int i = 0; i < 10; i++) {
		if (text[i] < '0' || text[i] > '9')
			break;
		n = n * 10 + (text[i] - '0');
	}
	return n;
}

/* The address space of the tree that task `tid` has, as the caller numbers it; 0: not of the tree. A caller in another
 * pid namespace means somebody else by the same number: PL_NO_MM, it may act on the tree. */
static __always_inline u32 acts_on(struct task_struct *t, u32 tid)
{
	u32 *mm;

	if (!t->thread_pid || t->thread_pid->level != totals.pid_level)
		return PL_NO_MM;
	mm = bpf_map_lookup_elem(&members, &tid);
	return mm ? *mm : 0;
}

/* Calls of others that act on the tree, and clear_refs by anyone: `mm` is the space that they act on, the text of a write
 * the directory of its file, which is the target's pid. */
static __always_inline int foreign_call(struct task_struct *t, struct pt_regs *regs, long ret)
{
	struct pl_rec_call *r;
	struct file *f;
	void *ring;
	char name[16] = {};
	long nr = regs->orig_ax;
	u64 byte = 0;
	u32 mm;

	if (nr == NR_WRITE) {
		if (!is_clear_refs(t, regs->di) || ret <= 0)
			return 0;
		f = file_of(t, regs->di);
		bpf_probe_read_kernel_str(name, sizeof(name), BPF_CORE_READ(f, f_path.dentry, d_parent, d_name.name));
		mm = acts_on(t, decimal(name));
	} else if (nr != NR_PROCESS_VM_WRITEV || ret <= 0) {
		return 0;
	} else {
		mm = acts_on(t, regs->di);
	}
	if (!mm)
		return 0;
	ring = my_ring(bpf_get_smp_processor_id());
	r = ring ? bpf_ringbuf_reserve(ring, sizeof(*r) + 16, 0) : NULL;
	if (!r) {
		ADD(lost_records, 1);
		return 0;
	}
	__builtin_memset(r, 0, sizeof(*r) + 16);
	r->h.kind = PL_SYSCALL;
	r->h.nr = nr;
	r->h.cpu = bpf_get_smp_processor_id();
	r->h.pid = ns_tgid(t);
	r->h.tid = ns_pid(t);
	r->h.mm = mm;
	r->h.time_ns = bpf_ktime_get_ns();
	r->h.ip = regs->ip;
	r->result = ret;
	r->args[0] = regs->di;
	r->args[1] = regs->si;
	r->args[2] = regs->dx;
	r->args[3] = regs->r10;
	r->args[4] = regs->r8;
	r->args[5] = regs->r9;
	if (nr == NR_WRITE) {
		bpf_probe_read_user(&byte, 1, (void *)regs->si);
		r->args[1] = byte;      /* what was written: 1 to 5 */
		r->h.ntext = 16;
		__builtin_memcpy((char *)r + sizeof(*r), name, 16);
	}
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	return 0;
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
	if (nr == NR_WRITE && is_clear_refs(t, s->args[0]))
		foreign_call(t, regs, ret);
	if (!s->enter_time) {           /* a new task's return from its parent's clone */
		s->nr = PL_NO_CALL;
		if (!gup)
			return 0;
	} else if (!wanted_call(s) && !gup) {
		s->nr = PL_NO_CALL;
		return 0;
	}
	x = bpf_task_storage_get(&scratches, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!x) {
		ADD(lost_records, 1);
		s->nr = PL_NO_CALL;
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
		u64 words[3] = {}, at = s->args[2];

		if ((s->args[1] & 0xffff) == PAGEMAP_SCAN)
			at += 8;        /* behind its own size: flags, start, end */
		s->walking = 1;
		if (!bpf_probe_read_user(words, sizeof(words), (void *)at))
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
	s->nr = PL_NO_CALL;
	s->enter_time = 0;
	emit_tail(x, frames, text);
	return 0;
}

#endif
