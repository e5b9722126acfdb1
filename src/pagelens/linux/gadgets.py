"""Code that another process already has, by which it can make a system call for us and come back (`inject`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pagelens.linux.memory import read_memory
from pagelens.linux.procfs import Process
from pagelens.vm.errors import CapabilityMissingError
from pagelens.vm.vma import Prot, Vma, VmaList

_SYSCALL_RET = b"\x0f\x05\xc3"
_RESTORERS = (b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05", b"\xb8\x0f\x00\x00\x00\x0f\x05")  # mov $15; syscall
_POP_RAX_RET = b"\x58\xc3"
_CHUNK = 1 << 19


@dataclass(frozen=True, slots=True)
class Gadgets:
    """Addresses, in the target, of code that it already has."""

    syscall_ret: int
    sigreturn: int = 0
    pop_rax: int = 0


class NoCodeError(CapabilityMissingError):
    """The target has no code that it could run for us."""


def find_gadgets(proc: Process, vmas: VmaList) -> Gadgets:
    """Code in the target's executable mappings that ends a system call with `ret`, and code that returns from
    a signal. The C library first, then the loader, the program, the rest; the vDSO last."""
    syscall_ret = sigreturn = pop_rax = 0
    for vma in sorted((v for v in vmas if v.prot & Prot.EXEC and v.prot & Prot.READ), key=_preference):
        for at, data in _text(proc.mm_tid, vma.start, vma.end):
            if not syscall_ret and (found := data.find(_SYSCALL_RET)) >= 0:
                syscall_ret = at + found
            for pattern in () if sigreturn else _RESTORERS:
                if (found := data.find(pattern)) >= 0:
                    sigreturn = at + found
                    break
            if not pop_rax and (found := data.find(_POP_RAX_RET)) >= 0:
                pop_rax = at + found
            if syscall_ret and sigreturn:
                return Gadgets(syscall_ret, sigreturn)
    if syscall_ret and pop_rax:
        return Gadgets(syscall_ret, 0, pop_rax)
    raise NoCodeError(
        f"process {proc.pid} has no code to make a system call with and come back from safely"
        " (no `syscall; ret` beside a signal return in its executable mappings)",
        capability="ptrace",
    )


def _preference(vma: Vma) -> int:
    name = vma.name
    base = name.rsplit("/", 1)[-1]
    if base.startswith(("libc.", "libc-", "ld-musl", "libpthread")):
        return 0
    if base.startswith("ld-"):
        return 1
    if name.startswith("/"):
        return 2
    return 4 if name == "[vdso]" else 3


def _text(pid: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    # In chunks that overlap by more than a pattern's length.
    while start < end:
        size = min(_CHUNK, end - start)
        yield start, read_memory(pid, start, size)
        if start + size >= end:
            return
        start += size - 16
