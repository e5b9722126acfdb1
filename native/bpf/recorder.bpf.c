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

#include "state.h"
#include "faults.h"
#include "calls.h"
#include "tasks.h"
#include "daemons.h"
#include "iterators.h"
