/* Maps, and what all programs share: the state of a task, records into the ring of the CPU. */
#ifndef PL_STATE
#define PL_STATE

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

/* Processes that the iterator `adopt` is to mark. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u32);
	__type(value, u8);
} targets SEC(".maps");

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

/* The address space number of each task of the tree, by tid: whom a call of somebody else acts upon. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u32);
	__type(value, u32);
} members SEC(".maps");

/* Where a record with a tail of unknown length is put together. It is per task, so that neither preemption nor
 * a nested program can touch it. */
struct scratch {
	struct pl_rec_call call;
	u64 tail[160];  /* more than 127 frames and 255 bytes: what the masks below allow */
	u64 cut_at, cut_dev, cut_ino;   /* the file that a truncate(2), entered at cut_at (ns), took pages from */
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

/* Room for a record in the ring of the CPU; NULL, and counted as lost, where there is none. */
static __always_inline void *reserve(u64 size)
{
	void *ring = my_ring(bpf_get_smp_processor_id());
	void *room = ring ? bpf_ringbuf_reserve(ring, size, 0) : NULL;

	if (!room)
		ADD(lost_records, 1);
	return room;
}

static __always_inline int number_of(struct pid *p, int global)
{
	int nr = 0;

	if (!totals.pid_level)
		return global;
	if (p)
		bpf_probe_read_kernel(&nr, sizeof(nr), (char *)&p->numbers[0] + (totals.pid_level & 31) *
				      bpf_core_type_size(struct upid));
	return nr;
}

/* Numbers in the recorder's pid namespace. */
static __always_inline int ns_pid(struct task_struct *t)
{
	return number_of(t->thread_pid, t->pid);
}

static __always_inline int ns_tgid(struct task_struct *t)
{
	return t->group_leader ? number_of(t->group_leader->thread_pid, t->tgid) : 0;
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

/* Sends the faults that stand in a task's batch. Whoever takes the count has them: the task itself, the switch away from
 * it or, when all is over, `leftover`. Returns how many found no room. */
static __always_inline u32 flush_batch(struct pl_task *s)
{
	u32 n = __sync_lock_test_and_set(&s->batched, 0);
	void *ring;

	if (!n)
		return 0;
	if (n > PL_BATCH)
		n = PL_BATCH;
	s->batch.h.nframes = n;
	ring = my_ring(bpf_get_smp_processor_id());
	if (ring && !bpf_ringbuf_output(ring, &s->batch, sizeof(s->batch.h) + (n & (2 * PL_BATCH - 1)) * sizeof(struct pl_short_fault),
					BPF_RB_NO_WAKEUP))
		return 0;
	s->recorded -= n;
	s->lost += n;
	return n;
}

/* What stands in the batch of a task whose recording has been ended (`collect`): it was counted among the recorded. */
static __always_inline void flush_rest(struct task_struct *t)
{
	struct pl_task *s = bpf_task_storage_get(&tasks, t, 0, 0);
	u32 n;

	if (!s || s->state != PL_T_NEW)
		return;
	n = flush_batch(s);
	if (n) {
		ADD(recorded, -n);
		ADD(lost, n);
	}
}

static __always_inline u64 user_ip(struct task_struct *t)
{
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(t);

	return (regs->cs & 3) == 3 ? regs->ip : 0;
}

static __always_inline void member_add(u32 tid, u32 mm)
{
	bpf_map_update_elem(&members, &tid, &mm, BPF_ANY);
}

static __always_inline void member_drop(u32 tid)
{
	bpf_map_delete_elem(&members, &tid);
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

/* A fault that was entered and that nothing completed. */
static __always_inline void flush_failed(struct pl_task *s)
{
	struct pl_rec_fault *r;

	if (!s->pend)
		return;
	s->failed++;
	r = reserve(sizeof(*r));
	if (r) {
		fill(&r->h, s, PL_FAULT, PL_F_FAILED | PL_F_ERROR | (s->pend >> 8));
		r->h.extra = s->pend_error;
		r->h.time_ns = s->pend_time;
		r->h.ip = s->pend_ip;
		r->addr = s->pend_addr;
		bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	}
	s->pend = 0;
}

/* The state of a task if it is recorded. */
static __always_inline struct pl_task *member(struct task_struct *t)
{
	struct pl_task *s = bpf_task_storage_get(&tasks, t, 0, 0);

	if (!s || s->state != PL_T_LIVE)
		return NULL;
	return s;
}

/* io_uring's workers start without task_newtask (create_io_thread): adopted from their group's leader at their first
 * fault, or at their end. Their counters began at 0, so nothing is missed. */
static __always_inline struct pl_task *io_worker(struct task_struct *t)
{
	struct task_struct *leader;
	struct pl_task *g, *s;

	if (!(t->flags & PF_IO_WORKER))
		return NULL;
	leader = t->group_leader;
	if (!leader)
		return NULL;
	g = member(leader);
	if (!g)
		return NULL;
	s = bpf_task_storage_get(&tasks, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!s || s->state != PL_T_NEW || s->tid)
		return NULL;
	s->pid = g->pid;
	s->tid = ns_pid(t);
	s->mm = g->mm;
	s->mm_ptr = g->mm_ptr;
	s->nr = PL_NO_CALL;
	s->state = PL_T_LIVE;
	mm_use(s->mm_ptr, s->mm);
	member_add(s->tid, s->mm);
	ADD(tasks_started, 1);
	return s;
}

/* Since 7.0 the programs of most tracepoints can be preempted, and are skipped for whatever else that CPU meets
 * meanwhile; and where a task was preempted amid its use of a storage, the CPU has no new storage for anyone
 * (bpf_task_storage_trylock). So a task without a mark becomes a member when it is about to run for the first time, or
 * with its first fault: its counters were 0 until then. most: faults that it may have counted. Not found is one whose
 * starter has ended. */
static __always_inline struct pl_task *began_unseen(struct task_struct *t, u64 most)
{
	struct task_struct *leader, *by;
	struct pl_task *s, *c;
	struct pl_rec_call *r;
	int thread;

	if (t->flags & (PF_KTHREAD | PF_IO_WORKER) || totals.stopped)
		return NULL;
	if (counted(t) > most)
		return NULL;    /* it has run before: nobody of ours */
	thread = t->pid != t->tgid;
	leader = t->group_leader;
	by = t->real_parent;
	if (!leader || !by)
		return NULL;
	s = thread ? member(leader) : member(by);
	if (!s)
		return NULL;
	c = bpf_task_storage_get(&tasks, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!c) {
		if (most)
			ADD(tasks_untracked, 1);
		return NULL;
	}
	if (c->state != PL_T_NEW || c->tid)
		return NULL;
	c->tid = ns_pid(t);
	c->pid = thread ? s->pid : c->tid;
	c->mm_ptr = (u64)t->mm;
	c->mm = c->mm_ptr == s->mm_ptr ? s->mm : ADD(next_mm, 1) + 1;
	mm_use(c->mm_ptr, c->mm);
	member_add(c->tid, c->mm);
	c->nr = PL_NO_CALL;
	c->state = PL_T_LIVE;
	ADD(tasks_started, 1);
	r = reserve(sizeof(*r));
	if (!r)
		return c;
	fill(&r->h, s, PL_FORK, 0);
	r->h.time_ns = bpf_ktime_get_ns();
	r->h.ip = 0;
	r->result = 0;
	r->args[0] = c->pid;
	r->args[1] = c->tid;
	/* CLONE_THREAD, CLONE_VM: the others are not known any more. */
	r->args[2] = (thread ? 0x10000 : 0) | (c->mm == s->mm ? 0x100 : 0);
	r->args[3] = c->mm;
	r->args[4] = r->args[5] = 0;
	r->dev = r->ino = 0;
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	return c;
}

/* Counter increments since the last look that neither an event nor a call explains. */
static __always_inline u64 unaccounted(struct task_struct *t, struct pl_task *s)
{
	u64 n = counted(t) - s->base - s->recorded - s->lost - s->gup - s->missed;

	return (s64)n > 0 ? n : 0;
}

/* Emit a record whose tail (frames, then text) stands in the scratch. */
static __always_inline void emit_tail(struct scratch *x, u32 frames, u32 text)
{
	void *ring = my_ring(bpf_get_smp_processor_id());
	u32 size = sizeof(x->call) + (frames & 127) * 8 + (text & 255);

	if (!ring || bpf_ringbuf_output(ring, x, size, BPF_RB_NO_WAKEUP))
		ADD(lost_records, 1);
}

/* The first iovecs of another process's memory, in the place of text. */
static __always_inline u32 put_vectors(struct scratch *x, u32 frames, u64 from, u64 count)
{
	u32 n = 0;

	frames &= 127;
	if (frames > PL_MAX_FRAMES)
		frames = PL_MAX_FRAMES;
	for (int i = 0; i < PL_MAX_VECTORS; i++) {
		if ((u64)i >= count || bpf_probe_read_user(&x->tail[frames + 2 * i], 16, (void *)(from + 16 * i)))
			break;
		n = 16 * (i + 1);
	}
	x->call.h.ntext = n;
	x->call.h.flags |= PL_F_VECTORS;
	return n;
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
#endif
