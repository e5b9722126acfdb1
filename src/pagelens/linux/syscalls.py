"""Which system calls shape memory, so that the recorder keeps them.

The values are the conditions of wanted_call() in native/bpf/recorder.bpf.c; a call that is not here is kept
only when it made the kernel fault pages in (gup > 0).
"""

from __future__ import annotations

from pagelens.vm.names import SYSCALL_NUMBERS as NUMBERS

_ALWAYS, _PRCTL, _PRLIMIT, _IOCTL, _OPEN = 1, 2, 3, 4, 5

_NAMES = """
mmap munmap mprotect pkey_mprotect mremap madvise process_madvise brk
mlock mlock2 mlockall munlock munlockall msync mbind set_mempolicy set_mempolicy_home_node migrate_pages
move_pages mseal map_shadow_stack remap_file_pages
memfd_create memfd_secret ftruncate truncate fallocate shmat shmdt
userfaultfd setrlimit personality arch_prctl modify_ldt
io_setup io_destroy io_uring_setup io_uring_register
fork vfork clone clone3 unshare execve execveat exit exit_group
pwrite64 pwritev pwritev2 fsync fdatasync sync_file_range process_vm_readv process_vm_writev
process_mrelease
"""

WANTED: dict[int, int] = {
    **{NUMBERS[name]: _ALWAYS for name in _NAMES.split()},
    NUMBERS["prctl"]: _PRCTL,
    NUMBERS["prlimit64"]: _PRLIMIT,
    NUMBERS["ioctl"]: _IOCTL,
    **{NUMBERS[name]: _OPEN for name in ("open", "openat", "creat", "openat2")},  # with O_TRUNC
}
