/* Records that pass from the BPF programs through the per-CPU rings to the drain and on to the spool.
 *
 * One definition for the BPF object, the C drain and (as numpy dtypes, checked by tests/capture/test_records.py
 * against pl_record_sizes) Python. A record is a fixed part, then head.nframes stack addresses (u64), then
 * head.ntext bytes of text, padded by the ring to 8. Rejected: one struct for all kinds (faults are 95 % of a
 * recording, and would carry 64 bytes of system-call arguments each).
 */
#ifndef PL_RECORD_H
#define PL_RECORD_H

enum pl_kind {
	PL_FAULT = 1,    /* struct pl_rec_fault */
	PL_SYSCALL = 2,  /* struct pl_rec_call: result, args, latency */
	PL_FORK = 3,     /* args: child pid, child tid, clone flags, child mm */
	PL_EXEC = 4,     /* args: old mm, new mm, old tid; text: path */
	PL_EXIT = 5,     /* args: min_flt, maj_flt, recorded, gup, lost, failed; dev: missed; ino: nofault */
	PL_SWITCH = 6,   /* struct pl_rec_fault: addr = prev state (out) or 0 (in) */
	PL_DAEMON = 7,   /* args and text by daemon; result: which (enum pl_daemon) */
	PL_START = 8,    /* a task that the recording began with: args as PL_FORK; text: comm */
	PL_FAULT_BATCH = 9,   /* struct pl_batch: nframes faults of one task, on one CPU, in one system call or none */
	PL_KINDS = 10
};

enum pl_daemon {
	PL_D_KHUGEPAGED_SCAN = 1,
	PL_D_COLLAPSE = 2,
	PL_D_MIGRATE = 3,
	PL_D_COMPACTION = 4,
	PL_D_RECLAIM = 5,
	PL_D_WRITEBACK = 6,
	PL_D_KSWAPD = 7,
};

/* head.flags */
#define PL_F_USER 1      /* fault in user mode */
#define PL_F_MAJOR 2     /* counted in maj_flt */
#define PL_F_FAILED 4    /* did not complete */
#define PL_F_LATENCY 8   /* latency_ns is known */
#define PL_F_ERROR 16    /* error_code is known */
#define PL_F_COMPAT 32   /* 32-bit system call */
#define PL_F_NEW_PAGE 32 /* fault: the kernel took a page for it (if PL_F_WATCHED) */
#define PL_F_OUT 64      /* switch: left the CPU */
#define PL_F_VECTORS 64  /* call: the text is an array of iovecs, of the other process's memory */
#define PL_F_RAW 64      /* fault: the frames are PL_RAW_REGS registers, then the top of the user stack */
#define PL_F_FILE 128    /* dev and ino are those of a file */
#define PL_F_WATCHED 128 /* fault: a write to a present page, and allocations were watched */

struct pl_head {
	unsigned char kind, flags, nframes, ntext;
	short nr;               /* system call that the thread was in, -1: none */
	unsigned short cpu;
	unsigned int pid, tid;
	unsigned int mm;
	unsigned int extra;     /* fault: error code; call: gup */
	unsigned long long time_ns;
	unsigned long long latency_ns;
	unsigned long long ip;  /* user-space instruction */
};                              /* 48 bytes */

struct pl_rec_fault {
	struct pl_head h;
	unsigned long long addr;
};                              /* 56: with the ring's header 64 */

struct pl_rec_call {
	struct pl_head h;
	long long result;
	unsigned long long args[6];
	unsigned long long dev, ino;
};                              /* 120 */

/* A fault in a batch: two addresses of 48 bits; on top of them 30 bits of ns since the batch's head.time_ns (16 and 14),
 * and PL_F_USER and PL_F_MAJOR. What does not fit has a record of its own. */
struct pl_short_fault {
	unsigned long long addr_time, ip_time_flags;
};
#define PL_SHORT_ADDR 48
#define PL_SHORT_TIME 30
#define PL_BATCH 32             /* a power of two, less than 128 */

struct pl_batch {
	struct pl_head h;
	struct pl_short_fault faults[PL_BATCH];
};

#define PL_NO_MM 0xffffffffU    /* pl_head.mm: of no recorded address space */

#define PL_MAX_FRAMES 64
#define PL_RAW_REGS 17          /* by DWARF number: rax rdx rcx rbx rsi rdi rbp rsp r8-r15 rip */
#define PL_RAW_STACK 1024       /* bytes; more loses records (docs/recording.md) */
#define PL_MAX_VECTORS 4        /* of process_vm_readv and process_vm_writev */
#define PL_MAX_TEXT 248         /* ntext is a multiple of 8 */

/* Per-task state, the value of the task-storage map. Written by user space only to arm the first task. */
struct pl_task {
	unsigned int state;     /* enum pl_task_state */
	unsigned int pid, tid, mm;
	unsigned long long base;        /* min_flt + maj_flt when recording of this task began */
	unsigned long long base_min;
	unsigned long long recorded, lost, gup, missed, failed, nofault;
	unsigned long long pend_time, pend_addr, pend_ip;
	unsigned int pend, pend_error;  /* pend: 0, or 1 with the flags of the fault << 8 */
	unsigned long long enter_time, args[6];
	int nr;                 /* -1: not in a system call */
	unsigned int compat;
	unsigned long long mm_ptr;
	unsigned int walking;   /* our own stack walk: the faults it is refused do not count */
	unsigned int fresh;     /* adopted, and no event since: see first_event() */
	unsigned int batched;   /* faults that stand in `batch` */
	unsigned int new_page;  /* the kernel took a page for the fault under way */
	struct pl_batch batch;
};

/* pl_task.nr */
#define PL_NO_CALL (-1)
#define PL_OLD_CALL (-2)        /* perhaps in a call that began before we looked */

enum pl_task_state { PL_T_NEW = 0, PL_T_ARMED = 1, PL_T_LIVE = 2 };

/* Sums over tasks that are gone: exact though an exit record may be lost. */
struct pl_totals {
	unsigned long long min_flt, maj_flt, recorded, lost, gup, missed, failed, nofault;
	unsigned long long tasks_started, tasks_gone, tasks_untracked;
	unsigned long long lost_records;        /* records of other kinds that found the ring full */
	unsigned long long next_mm;
	unsigned long long pid_level;           /* depth of the recorder's pid namespace: that of the first task */
	unsigned long long stopped;             /* set by user space: no new members */
	unsigned long long clear_refs;          /* proc_clear_refs_operations, learnt from a write of our own */
	unsigned long long mem;                 /* proc_mem_operations, likewise */
	unsigned long long learner;             /* tgid of ours */
	unsigned long long learn;               /* which file its next write is to (LEARN_); 0: none */
	unsigned long long adopted;             /* tasks that `adopt` has marked */
	unsigned long long begun;               /* ns: tasks that are younger began under our eyes */
	unsigned long long unmarked;            /* tasks that `adopt` could not mark in this pass */
};

enum { LEARN_REFS = 1, LEARN_MEM };

/* Settings, written before the load; the verifier removes what is switched off. */
struct pl_settings {
	unsigned int stacks;    /* frames of user stacks, 0: none */
	unsigned int entry;     /* exceptions: error code, latency, failed faults */
	unsigned int switches;
	unsigned int daemons;
	unsigned int raw;       /* registers and the top of the stack instead of frames */
	unsigned int batch;     /* neither stacks nor entries: short records, PL_BATCH at a time */
	unsigned int pages;     /* page_taken() is attached */
};
#endif
