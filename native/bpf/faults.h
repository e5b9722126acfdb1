/* Completed faults (perf software events) and their entries (exceptions tracepoints). */
#ifndef PL_FAULTS
#define PL_FAULTS

#define WRITE_PRESENT 3         /* bits of the error code */
#define GFP_OF_USERS 0x0a       /* __GFP_HIGHMEM | __GFP_MOVABLE: the same bits from 6.1 to 7.2 */

/* The user registers, and what can be read of PL_RAW_STACK bytes from the stack pointer up; returns the bytes. For
 * code without frame pointers: unwound later (native/unwind.c). Near the end of a stack the copy ends with its page. */
static __always_inline long raw_stack(struct task_struct *t, u64 *to)
{
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(t);
	u64 sp = regs->sp;
	u32 page = (4096 - (sp & 4095)) & 0xff8;

	to[0] = regs->ax;
	to[1] = regs->dx;
	to[2] = regs->cx;
	to[3] = regs->bx;
	to[4] = regs->si;
	to[5] = regs->di;
	to[6] = regs->bp;
	to[7] = sp;
	to[8] = regs->r8;
	to[9] = regs->r9;
	to[10] = regs->r10;
	to[11] = regs->r11;
	to[12] = regs->r12;
	to[13] = regs->r13;
	to[14] = regs->r14;
	to[15] = regs->r15;
	to[16] = regs->ip;
	if (!bpf_probe_read_user(to + PL_RAW_REGS, PL_RAW_STACK, (void *)sp))
		return PL_RAW_REGS * 8 + PL_RAW_STACK;
	if (page < PL_RAW_STACK && !bpf_probe_read_user(to + PL_RAW_REGS, page & (PL_RAW_STACK - 1), (void *)sp))
		return PL_RAW_REGS * 8 + (page & (PL_RAW_STACK - 1));
	return PL_RAW_REGS * 8;
}

/* The first event of a task that was adopted while it ran: if nothing was counted since, this fault had been counted
 * just before the base was read (mm_account_fault counts, then fires the event). It is ours: the base takes it back. */
static __always_inline void first_event(struct task_struct *t, struct pl_task *s, u8 major)
{
	s->fresh = 0;
	if (counted(t) != s->base)
		return;
	s->base--;
	if (!major)
		s->base_min--;
}

/* A fault is put down in the task's own memory, and PL_BATCH of them go into the ring at once: a record there for each
 * costs half as much as all the rest, mostly for the lines of cache that the drain has to give back. 0: does not fit. */
static __always_inline int batch_fault(struct pl_task *s, u8 flags, u64 now, u64 addr, u64 ip)
{
	struct pl_batch *b = &s->batch;
	u32 n = s->batched;
	u64 since = now - b->h.time_ns;

	if (n && (b->h.nr != s->nr || b->h.cpu != bpf_get_smp_processor_id() || since >> PL_SHORT_TIME)) {
		flush_batch(s);
		n = 0;
	}
	if ((addr | ip) >> PL_SHORT_ADDR)
		return 0;
	if (!n) {
		fill(&b->h, s, PL_FAULT_BATCH, 0);
		b->h.time_ns = now;
		since = 0;
	}
	b->faults[n & (PL_BATCH - 1)].addr_time = addr | since << PL_SHORT_ADDR;
	b->faults[n & (PL_BATCH - 1)].ip_time_flags =
		ip | (since >> 16) << PL_SHORT_ADDR | (u64)(flags & (PL_F_USER | PL_F_MAJOR)) << 62;
	s->batched = n + 1;
	if (n + 1 >= PL_BATCH)
		flush_batch(s);
	return 1;
}

/* A write to a present page copies it or makes it writable: whether the kernel took a page meanwhile, tells which. */
static __always_inline u8 pages_of(struct pl_task *s)
{
	if (!cfg.pages || (s->pend_error & WRITE_PRESENT) != WRITE_PRESENT)
		return 0;
	return PL_F_WATCHED | (s->new_page ? PL_F_NEW_PAGE : 0);
}

static __always_inline int completed(struct perf_context *ctx, u8 major)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct pl_task *s = member(t);
	struct pl_rec_fault *r;
	u8 flags = major | ((ctx->cs & 3) == 3 ? PL_F_USER : 0);
	u64 addr = ctx->addr, now, ip = ctx->ip;
	void *ring;

	if (!s) {
		s = io_worker(t);
		if (!s && t->start_time >= totals.begun)
			s = began_unseen(t, 1);
		if (!s)
			return 0;
	}
	if (cfg.entry && s->pend && s->pend_addr != addr)
		flush_failed(s);
	if (!(flags & PL_F_USER))
		ip = user_ip(t);
	ring = cfg.batch ? NULL : my_ring(bpf_get_smp_processor_id());
	if (!ring && !cfg.batch)
		return 0;
	now = bpf_ktime_get_ns();
	if (s->fresh)
		first_event(t, s, major);
	/* Claimed before it is written: `collect` may end the recording of this task on another CPU meanwhile. */
	if (*(volatile u32 *)&s->state != PL_T_LIVE)
		return 0;
	s->recorded++;
	if (cfg.batch) {
		if (batch_fault(s, flags, now, addr, ip))
			return 0;
		ring = my_ring(bpf_get_smp_processor_id());
		if (!ring)
			goto lost;
	}
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
			r->h.flags |= PL_F_LATENCY | PL_F_ERROR | pages_of(s);
			r->h.extra = s->pend_error;
			r->h.latency_ns = now - s->pend_time;
			s->pend = 0;
		}
		s->walking = 1;
		if (cfg.raw) {
			n = raw_stack(t, (u64 *)((char *)x + sizeof(*r)));
			r->h.flags |= PL_F_RAW;
		} else {
			n = bpf_get_stack(ctx, (char *)x + sizeof(*r), PL_MAX_FRAMES * 8, BPF_F_USER_STACK);
			if (n < 0 || n > PL_MAX_FRAMES * 8)
				n = 0;
		}
		s->walking = 0;
		r->h.nframes = n >> 3;
		if (bpf_ringbuf_output(ring, x, sizeof(*r) + (n & 2047), BPF_RB_NO_WAKEUP))
			goto lost;
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
		r->h.flags |= PL_F_LATENCY | PL_F_ERROR | pages_of(s);
		r->h.extra = s->pend_error;
		r->h.latency_ns = now - s->pend_time;
		s->pend = 0;
	}
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	return 0;
lost:
	s->recorded--;
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
	s->new_page = 0;
	s->pend = 1 | (user ? PL_F_USER << 8 : 0);
	return 0;
}

/* wp_page_copy() (mm/memory.c) takes one page of GFP_HIGHUSER_MOVABLE, as nothing that interrupts a fault does. */
SEC("tp_btf/mm_page_alloc")
int BPF_PROG(page_taken, void *page, unsigned int order, unsigned int gfp)
{
	struct pl_task *s;

	if (order || (gfp & GFP_OF_USERS) != GFP_OF_USERS || !page)
		return 0;
	s = member(bpf_get_current_task_btf());
	if (s && s->pend && (s->pend_error & WRITE_PRESENT) == WRITE_PRESENT)
		s->new_page = 1;
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

#endif
