/* The few kernel structures that we read, by name: CO-RE relocates every field against the running kernel's BTF.
 *
 * Rejected: a generated vmlinux.h (3 MB that ties the source to one kernel, for forty fields).
 */
#ifndef PL_KERNEL_H
#define PL_KERNEL_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef short __s16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;
typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __s32 s32;
typedef __u64 u64;
typedef __s64 s64;
typedef _Bool bool;

enum { BPF_ANY = 0 };
enum { BPF_LOCAL_STORAGE_GET_F_CREATE = 1 };
enum { BPF_RB_NO_WAKEUP = 1 };
enum { BPF_F_USER_STACK = 256 };
enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_ARRAY_OF_MAPS = 12,
	BPF_MAP_TYPE_RINGBUF = 27,
	BPF_MAP_TYPE_TASK_STORAGE = 29,
};
enum { BPF_F_NO_PREALLOC = 1 };

#define PF_IO_WORKER 0x10
#define PF_MEMALLOC 0x800       /* in direct reclaim */
#define PF_KTHREAD 0x200000
#define TASK_DEAD 0x80
#define TS_COMPAT 2

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di;
	unsigned long orig_ax, ip, cs, flags, sp, ss;
};
struct pid_namespace;
struct upid {
	int nr;
	struct pid_namespace *ns;
};
struct pid {
	unsigned int level;
	struct upid numbers[1];
};
struct thread_info {
	unsigned int status;
};
struct qstr {
	const unsigned char *name;
};
struct dentry {
	struct dentry *d_parent;
	struct qstr d_name;
};
struct path {
	struct dentry *dentry;
};
struct super_block {
	u32 s_dev;
	unsigned long s_magic;
};
struct inode {
	struct super_block *i_sb;
	unsigned long i_ino;
	void *i_private;
};
struct address_space {
	struct inode *host;
};
struct folio {
	struct address_space *mapping;
};
struct file {
	struct inode *f_inode;
	struct path f_path;
	const void *f_op;
	void *private_data;
	s64 f_pos;
};
struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};
struct files_struct {
	struct fdtable *fdt;
};
struct mm_struct {
	unsigned long start_brk;
};
struct task_struct {
	struct thread_info thread_info;
	unsigned int __state;
	unsigned int flags;
	int pid;
	int tgid;
	int exit_code;
	int pagefault_disabled;
	unsigned long min_flt;
	unsigned long maj_flt;
	struct mm_struct *mm;
	struct task_struct *group_leader;
	struct task_struct *real_parent;
	u64 start_time; /* ns, as bpf_ktime_get_ns() */
	struct pid *thread_pid;
	struct files_struct *files;
	char comm[16];
	unsigned long sas_ss_sp; /* the alternate signal stack, as sigaltstack(2) set it */
	unsigned long sas_ss_size;
	unsigned int sas_ss_flags;
};
struct linux_binprm {
	const char *filename;
};

struct seq_file;
struct bpf_iter_meta {
	struct seq_file *seq;
};
struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};

#pragma clang attribute pop

/* Context of a perf_event program: struct bpf_perf_event_data with x86-64 registers. */
struct perf_context {
	u64 r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss;
	u64 sample_period;
	u64 addr;
};
#endif
