/* What the kernel does to the tree's memory outside the tree's own tasks: khugepaged, migration, compaction, reclaim,
 * writeback. Batches, not pages: few records. Only those of khugepaged name an address space. */
#ifndef PL_DAEMONS
#define PL_DAEMONS

static __always_inline void emit_daemon(u32 which, u32 mm, u64 a, u64 b, u64 c, u64 d)
{
	struct task_struct *t = bpf_get_current_task_btf();
	void *ring = my_ring(bpf_get_smp_processor_id());
	struct pl_rec_call *r = ring ? bpf_ringbuf_reserve(ring, sizeof(*r) + 16, 0) : NULL;

	if (!r) {
		ADD(lost_records, 1);
		return;
	}
	__builtin_memset(r, 0, sizeof(*r) + 16);
	r->h.kind = PL_DAEMON;
	r->h.nr = PL_NO_CALL;
	r->h.cpu = bpf_get_smp_processor_id();
	r->h.pid = t->tgid;
	r->h.tid = t->pid;
	r->h.mm = mm;
	r->h.time_ns = bpf_ktime_get_ns();
	r->result = which;
	r->args[0] = a;
	r->args[1] = b;
	r->args[2] = c;
	r->args[3] = d;
	r->h.ntext = 16;
	bpf_probe_read_kernel_str((char *)r + sizeof(*r), 16, t->comm);
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
}

static __always_inline u32 mm_number(u64 ptr)
{
	struct mm_entry *e = bpf_map_lookup_elem(&mms, &ptr);

	return e ? e->id : PL_NO_MM;
}

SEC("tp_btf/mm_khugepaged_scan_pmd")
int scan_pmd(u64 *ctx)
{
	u32 mm = mm_number(ctx[0]);

	if (mm != PL_NO_MM)
		emit_daemon(PL_D_KHUGEPAGED_SCAN, mm, 0, 0, 0, 0);
	return 0;
}

/* isolated, status (enum scan_result; 1 is success) */
SEC("tp_btf/mm_collapse_huge_page")
int collapse(u64 *ctx)
{
	u32 mm = mm_number(ctx[0]);

	if (mm != PL_NO_MM)
		emit_daemon(PL_D_COLLAPSE, mm, (u32)ctx[1], (u32)ctx[2], 0, 0);
	return 0;
}

/* succeeded, failed, reason (enum migrate_reason), mode: (succeeded, failed, thp_succeeded, thp_failed, thp_split,
 * mode, reason) before 6.18 or so, one more in between since: the first two are the same everywhere. */
SEC("tp_btf/mm_migrate_pages")
int migrate(u64 *ctx)
{
	emit_daemon(PL_D_MIGRATE, PL_NO_MM, ctx[0], ctx[1], 0, 0);
	return 0;
}

/* zone start, zone end */
SEC("tp_btf/mm_compaction_begin")
int compaction(u64 *ctx)
{
	emit_daemon(PL_D_COMPACTION, PL_NO_MM, ctx[1], ctx[2], 0, 0);
	return 0;
}

/* pages reclaimed */
SEC("tp_btf/mm_vmscan_direct_reclaim_end")
int reclaim(u64 *ctx)
{
	emit_daemon(PL_D_RECLAIM, PL_NO_MM, ctx[0], 0, 0, 0);
	return 0;
}

/* node, order */
SEC("tp_btf/mm_vmscan_kswapd_wake")
int kswapd(u64 *ctx)
{
	emit_daemon(PL_D_KSWAPD, PL_NO_MM, (u32)ctx[0], (u32)ctx[2], 0, 0);
	return 0;
}

/* pages written */
SEC("tp_btf/writeback_pages_written")
int writeback(u64 *ctx)
{
	if (ctx[0])
		emit_daemon(PL_D_WRITEBACK, PL_NO_MM, ctx[0], 0, 0, 0);
	return 0;
}

#endif
