/* Calls that act on memory that is not the caller's own, or by way of a file of /proc/PID: whose memory it is, and the
 * records of such calls by processes that are not of the tree. */
#ifndef PL_REACH
#define PL_REACH

#define NR_WRITE 1
#define NR_PWRITE64 18
#define NR_WRITEV 20
#define NR_EXIT 60
#define NR_EXIT_GROUP 231
#define NR_MIGRATE_PAGES 256
#define NR_MOVE_PAGES 279
#define NR_PWRITEV 296
#define NR_PROCESS_VM_READV 310
#define NR_PROCESS_VM_WRITEV 311
#define NR_PWRITEV2 328
#define NR_PROCESS_MADVISE 440
#define NR_PROCESS_MRELEASE 448

#define PIDFS_MAGIC 0x50494446

/* What a write does by the file that it goes into. */
enum { ACTS_NOT = 0, ACTS_REFS, ACTS_MEM };

static __always_inline int writes(long nr)
{
	return nr == NR_WRITE || nr == NR_PWRITE64 || nr == NR_WRITEV || nr == NR_PWRITEV || nr == NR_PWRITEV2;
}

static __always_inline int reaches(long nr)
{
	return nr == NR_PROCESS_VM_READV || nr == NR_PROCESS_VM_WRITEV;
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

/* Writes to clear_refs change what page tables say, those to mem what pages hold. The files are known by their
 * operations, whose addresses we learn from writes of our own (they are not in kallsyms everywhere). */
static __always_inline int by_file(struct file *f)
{
	u64 op;

	if (!f || (!totals.clear_refs && !totals.mem))
		return ACTS_NOT;
	op = (u64)BPF_CORE_READ(f, f_op);
	return !op ? ACTS_NOT : op == totals.clear_refs ? ACTS_REFS : op == totals.mem ? ACTS_MEM : ACTS_NOT;
}

static __always_inline void learn(struct file *f)
{
	if (totals.learn == LEARN_REFS)
		totals.clear_refs = (u64)BPF_CORE_READ(f, f_op);
	else if (totals.learn == LEARN_MEM)
		totals.mem = (u64)BPF_CORE_READ(f, f_op);
	totals.learn = 0;
}

/* The number that the name of a file's directory begins with (at most 10 digits): the PID of /proc/PID/FILE. */
static __always_inline u32 owner_of(struct file *f)
{
	char text[16] = {};
	u32 n = 0;

	bpf_probe_read_kernel_str(text, sizeof(text), BPF_CORE_READ(f, f_path.dentry, d_parent, d_name.name));
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

	if (!tid)
		return 0;
	if (!t->thread_pid || t->thread_pid->level != totals.pid_level)
		return PL_NO_MM;
	mm = bpf_map_lookup_elem(&members, &tid);
	return mm ? *mm : 0;
}

/* The address space of the tree that the process of a pidfd has. A pidfd is an inode of pidfs since 6.9, before that a
 * file without one of its own. Only for calls that took the descriptor as a pidfd. */
static __always_inline u32 acts_on_pidfd(struct task_struct *t, u64 fd)
{
	struct file *f = file_of(t, fd);
	struct inode *inode;
	struct pid *pid;
	u32 tid, *mm;
	int global = 0;

	if (!f)
		return 0;
	inode = BPF_CORE_READ(f, f_inode);
	pid = BPF_CORE_READ(inode, i_sb, s_magic) == PIDFS_MAGIC ? BPF_CORE_READ(inode, i_private)
								  : BPF_CORE_READ(f, private_data);
	bpf_probe_read_kernel(&global, sizeof(global), &pid->numbers[0].nr);
	tid = number_of(pid, global);
	mm = bpf_map_lookup_elem(&members, &tid);
	return mm ? *mm : 0;
}

/* The address that a write to /proc/PID/mem began at. */
static __always_inline u64 written_at(struct file *f, long nr, u64 offset, long ret)
{
	return nr == NR_WRITE || nr == NR_WRITEV ? (u64)BPF_CORE_READ(f, f_pos) - ret : offset;
}

/* The digit that a write puts into clear_refs. */
static __always_inline u64 digit_of(long nr, u64 from)
{
	u64 base = from;
	u8 digit = 0;

	if (nr != NR_WRITE && nr != NR_PWRITE64)
		bpf_probe_read_user(&base, sizeof(base), (void *)from); /* iov_base of the first */
	bpf_probe_read_user(&digit, 1, (void *)base);
	return digit;
}

/* A call of somebody else that acts on the tree: `mm` is the space that it acts on; the text of a write to clear_refs the
 * directory of its file, which is the target's pid. It comes without stack, dated when it ended. */
static __always_inline int foreign_call(struct task_struct *t, struct pt_regs *regs, long ret)
{
	struct pl_rec_call *r;
	struct file *f = NULL;
	long nr = regs->orig_ax;
	int acts = ACTS_NOT;
	u32 mm;

	if (writes(nr)) {
		f = file_of(t, regs->di);
		if (totals.learn && totals.learner == (u32)t->tgid && f) {
			learn(f);
			return 0;
		}
		acts = ret > 0 ? by_file(f) : ACTS_NOT;
		if (!acts)
			return 0;
		mm = acts_on(t, owner_of(f));
	} else if (reaches(nr) ? ret > 0 : (nr == NR_MOVE_PAGES || nr == NR_MIGRATE_PAGES) && ret >= 0) {
		mm = acts_on(t, regs->di);
	} else if (nr == NR_PROCESS_MADVISE ? ret > 0 : nr == NR_PROCESS_MRELEASE && !ret) {
		mm = acts_on_pidfd(t, regs->di);
	} else {
		return 0;
	}
	if (!mm)
		return 0;
	r = reserve(sizeof(*r) + 16 * PL_MAX_VECTORS);
	if (!r)
		return 0;
	__builtin_memset(r, 0, sizeof(*r) + 16 * PL_MAX_VECTORS);
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
	if (acts == ACTS_REFS) {
		r->args[1] = digit_of(nr, regs->si);
		r->h.ntext = 16;
		bpf_probe_read_kernel_str((char *)r + sizeof(*r), 16,
					  BPF_CORE_READ(f, f_path.dentry, d_parent, d_name.name));
	} else if (acts == ACTS_MEM) {
		r->h.flags = PL_F_FILE;
		r->dev = BPF_CORE_READ(f, f_inode, i_sb, s_dev);
		r->ino = BPF_CORE_READ(f, f_inode, i_ino);
		r->args[3] = written_at(f, nr, regs->r10, ret);
		r->h.ntext = 16;
		bpf_probe_read_kernel_str((char *)r + sizeof(*r), 16, BPF_CORE_READ(f, f_path.dentry, d_name.name));
	}
	if (reaches(nr)) {
		for (int i = 0; i < PL_MAX_VECTORS; i++) {
			if ((u64)i >= regs->r8 ||
			    bpf_probe_read_user((char *)r + sizeof(*r) + 16 * i, 16, (void *)(regs->r10 + 16 * i)))
				break;
			r->h.ntext = 16 * (i + 1);
		}
		r->h.flags = PL_F_VECTORS;
	}
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	return 0;
}

/* The user stack, where stacks are wanted, into the tail. Returns the frames. */
static __always_inline u32 call_stack(void *ctx, struct pl_task *s, struct scratch *x)
{
	u32 frames = 0;
	long n;

	if (!cfg.stacks)
		return 0;
	s->walking = 1;
	n = bpf_get_stack(ctx, x->tail, PL_MAX_FRAMES * 8, BPF_F_USER_STACK);
	s->walking = 0;
	if (n > 0 && n <= PL_MAX_FRAMES * 8)
		frames = n >> 3;
	x->call.h.nframes = frames;
	return frames;
}

#endif
