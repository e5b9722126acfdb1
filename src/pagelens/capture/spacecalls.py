"""What each recorded call does to the replayed areas of an address space (`spaces`).

Each call that returned well is applied as the kernel does it: in which order it unmaps, splits and merges
decides what is one vma afterwards. A call that failed with ENOMEM at a hole has done its work before (and
madvise also behind) that hole, and is applied so far.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pagelens.capture.areas import Area, Space, shifted
from pagelens.capture.merging import Rules, insert, modify, prepare
from pagelens.vm.units import page_down, page_up
from pagelens.vm.vma import Prot, Vma

CALLS = frozenset(
    ("mmap", "munmap", "mprotect", "pkey_mprotect", "mremap", "brk", "madvise", "mlock", "mlock2", "munlock",
     "mlockall", "munlockall", "shmat", "shmdt", "mbind", "mseal", "prctl", "ioctl")
)  # fmt: skip
# At its entry takes effect what unmaps, at its return what maps: an address is free before anybody gets it.
AT_ENTRY = frozenset(("munmap", "shmdt", "madvise"))
# Calls that may have changed a part before they failed with ENOMEM.
_PARTIAL = frozenset(("mprotect", "pkey_mprotect", "madvise", "mlock", "mlock2", "munlock"))
_ENOMEM, _EFAULT = -12, -14
_ADVICE: dict[int, tuple[str, str]] = {  # advice -> (flag set, flags cleared)
    0: ("", "sr rr"), 1: ("rr", "sr"), 2: ("sr", "rr"), 10: ("dc", ""), 11: ("", "dc"), 12: ("mg", ""),
    13: ("", "mg"), 14: ("hg", "nh"), 15: ("nh", "hg"), 16: ("dd", ""), 17: ("", "dd"), 18: ("wf", ""),
    19: ("", "wf"),
}  # fmt: skip
_POPULATE_WRITE, _GUARD_INSTALL = 23, 102
MAP_SHARED, MAP_ANON, MAP_GROWSDOWN, MAP_LOCKED, MAP_NORESERVE, MAP_POPULATE, MAP_STACK, MAP_HUGETLB = (
    1, 0x20, 0x100, 0x2000, 0x4000, 0x8000, 0x20000, 0x40000,
)  # fmt: skip
MREMAP_FIXED, MREMAP_DONTUNMAP = 2, 4
_PR_SET_VMA = 0x53564D41
_UFFD_MODES = ((1, "um"), (2, "uw"), (4, "ui"))
_NOTHING: frozenset[str] = frozenset()
_LOCKED = frozenset(("lo", "lf"))
_UNLOCKABLE = frozenset(("ht", "io", "de", "pf", "mm"))
_LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib", "/usr/local/lib",
)  # fmt: skip


def counts(name: str, result: int) -> bool:
    """Whether a call with that result has changed anything."""
    return result >= 0 or (name in _PARTIAL and result == _ENOMEM) or (name == "mremap" and result == _EFAULT)


class Calls:
    """Applies rows of `events` to a `Space`. paths: (dev, inode) -> path, added to. segments: System V segment
    -> bytes. notes: what could not be known, added to."""

    def __init__(
        self, rules: Rules, paths: dict[tuple[str, int], str], segments: Mapping[int, int], notes: list[str]
    ) -> None:
        self.rules = rules
        self._paths = paths
        self._segments = segments
        self._notes = notes
        self._do: dict[str, Callable[[Space, dict[str, Any], list[int]], None]] = {
            "mmap": self._mmap,
            "munmap": self._munmap,
            "mprotect": self._mprotect,
            "pkey_mprotect": self._mprotect,
            "mremap": self._mremap,
            "brk": self._brk,
            "madvise": self._madvise,
            "mlock": self._mlock,
            "mlock2": self._mlock,
            "munlock": self._mlock,
            "mlockall": self._mlockall,
            "munlockall": self._mlockall,
            "shmat": self._shmat,
            "shmdt": self._shmdt,
            "mbind": self._mbind,
            "mseal": self._mseal,
            "prctl": self._prctl,
            "ioctl": self._ioctl,
        }

    def apply(self, space: Space, row: dict[str, Any]) -> None:
        """Apply one call: a row with name, args, result, seq, detail, file_dev, file_inode, gup."""
        args = [*(row["args"] or ()), 0, 0, 0, 0, 0, 0]
        self._do[row["name"]](space, row, args)

    def _flags(
        self,
        space: Space,
        start: int,
        end: int,
        on: frozenset[str],
        off: frozenset[str],
        *,
        gaps: bool = True,
    ) -> None:
        def change(area: Area) -> Vma:
            flags = area.vma.vm_flags or _NOTHING
            return area.vma.replaced(vm_flags=flags - off | on)

        modify(space, start, end, change, self.rules, gaps=gaps)

    @staticmethod
    def _populated(space: Space, start: int, end: int, flag: str = "", failed: bool = False) -> None:
        # Write faults by the kernel for private writable memory (populate_vma_page_range); flag: only what has it.
        i = space.after(start)
        while i < len(space.areas) and space.areas[i].vma.start < end:
            vma = space.areas[i].vma
            if failed and not vma.prot:
                return  # mlock ends where it may not read; the others go on
            if not vma.shared and vma.prot & Prot.WRITE and (not flag or flag in (vma.vm_flags or ())):
                prepare(space, i)
            i += 1

    def _munmap(self, space: Space, _row: dict[str, Any], args: list[int]) -> None:
        space.cut(args[0], page_up(args[0] + args[1]))

    def _mprotect(self, space: Space, row: dict[str, Any], args: list[int]) -> None:
        prot = Prot(args[2] & 7)
        key = args[3] & 0xFFFFFFFF if row["name"] == "pkey_mprotect" else 0xFFFFFFFF

        def change(area: Area) -> Vma:
            vma = area.vma
            flags = vma.vm_flags or _NOTHING
            if key != 0xFFFFFFFF:
                flags = frozenset(f for f in flags if not f.startswith("key")) | {f"key{key}"}
            if prot & Prot.WRITE:
                if not vma.prot & Prot.WRITE and not vma.shared and not flags & {"nr", "ht"}:
                    flags |= {"ac"}
            elif self.rules.unaccounts and prot != vma.prot and _anonymous(vma) and not area.anon:
                flags -= {"ac"}
            return vma.replaced(prot=prot, vm_flags=flags)

        end = page_up(args[0] + args[1])
        modify(space, args[0], end, change, self.rules, gaps=False)
        if row["gup"]:  # locked areas became writable
            self._populated(space, args[0], end, "lo")

    def _madvise(self, space: Space, row: dict[str, Any], args: list[int]) -> None:
        start, end = args[0], page_up(args[0] + args[1])
        if args[2] in _ADVICE:
            on, off = _ADVICE[args[2]]
            self._flags(space, start, end, frozenset(on.split()), frozenset(off.split()))
        elif (args[2] == _POPULATE_WRITE and row["gup"]) or (
            args[2] == _GUARD_INSTALL and self.rules.guard_prepares
        ):
            self._populated(space, start, end)

    def _mlock(self, space: Space, row: dict[str, Any], args: list[int]) -> None:
        on = (
            _NOTHING
            if row["name"] == "munlock"
            else _LOCKED
            if args[2] & 1 and row["name"] == "mlock2"
            else frozenset({"lo"})
        )
        start, end = page_down(args[0]), page_up(args[0] + args[1])
        self._lock(space, start, end, on, gaps=False)
        if row["gup"]:
            self._populated(space, start, end, failed=row["result"] < 0)

    def _lock(self, space: Space, start: int, end: int, on: frozenset[str], *, gaps: bool) -> None:
        def change(area: Area) -> Vma:
            flags = area.vma.vm_flags or _NOTHING
            if flags & _UNLOCKABLE or area.vma.name.startswith("[v"):
                return area.vma
            return area.vma.replaced(vm_flags=flags - _LOCKED | on)

        modify(space, start, end, change, self.rules, gaps=gaps)

    def _mlockall(self, space: Space, row: dict[str, Any], args: list[int]) -> None:
        how = args[0] if row["name"] == "mlockall" else 0
        on = _LOCKED if how & 4 else frozenset({"lo"})
        space.locks = on if how & 2 else _NOTHING
        if how & 1 or not how:
            self._lock(space, 0, 1 << 63, on if how else _NOTHING, gaps=True)
        if row["gup"]:
            self._populated(space, 0, 1 << 63)

    def _mmap(self, space: Space, row: dict[str, Any], args: list[int]) -> None:
        result, flags = row["result"], args[3]
        end = result + page_up(args[1])
        extra = set(space.locks)
        reserve = not flags & MAP_NORESERVE or self.rules.overcommit == 2
        for bit, code in ((MAP_LOCKED, "lo"), (MAP_GROWSDOWN, "gd"), (MAP_HUGETLB, "ht")):
            if flags & bit:
                extra.add(code)
        if not reserve:
            extra.add("nr")
        if flags & MAP_STACK and self.rules.stack_nohuge:
            extra.add("nh")
        shared = flags & 3 in (1, 3)
        if args[2] & 2 and not shared and reserve and not flags & MAP_HUGETLB:
            extra.add("ac")
        dev, inode, name = "00:00", 0, ""
        if row["file_inode"]:
            major, minor = row["file_dev"] >> 8 & 0xFFF, row["file_dev"] & 0xFF
            dev, inode = f"{major:02x}:{minor:02x}", row["file_inode"]
            name = self._path(dev, inode, row["detail"] or "")
        elif shared and flags & MAP_ANON:
            name = "/dev/zero (deleted)"
        offset = args[5] if inode else 0
        vma = Vma(result, end, Prot(args[2] & 7), shared, offset, dev, inode, name, frozenset(extra))
        space.cut(result, end)
        insert(space, Area(vma, row["seq"], bool(flags & MAP_STACK)), self.rules)
        if row["gup"]:
            self._populated(space, result, end)

    def _path(self, dev: str, inode: int, name: str) -> str:
        # An event has a file's name without its directory; snapshots have whole paths. Without them, the
        # usual library directories are tried, and the inode number decides.
        key = (dev, inode)
        if key not in self._paths:
            found = name
            for directory in _LIBRARIES if name and "/" not in name else ():
                path = os.path.join(directory, name)  # noqa: PTH118 (a few strings for each file)
                with contextlib.suppress(OSError):
                    if os.stat(path).st_ino == inode:  # noqa: PTH116 (likewise)
                        found = path
                        break
            self._paths[key] = found
        return self._paths[key]

    def _mremap(self, space: Space, row: dict[str, Any], args: list[int]) -> None:
        old, old_len, new_len, flags = args[0], page_up(args[1]), page_up(args[2]), args[3]
        result = row["result"]
        i = space.index(old)
        if result < 0:
            if self.rules.unmaps_first and flags & MREMAP_FIXED and i >= 0:
                space.cut(args[4], args[4] + new_len)
            return
        if i < 0:
            return
        if result == old:
            if new_len < old_len:
                space.cut(old + new_len, old + old_len)
            elif new_len > old_len:
                end = space.areas[i].vma.end
                grown = _moved(space.areas[i], end, end, old + new_len)
                insert(space, grown, self.rules)
        else:
            if new_len < old_len:
                space.cut(old + new_len, old + old_len)
                old_len = new_len
            if old_len == new_len:
                self._move(space, old, old_len, result, flags)
            else:
                space.cut(result, result + new_len)
                area = space.areas[space.index(old)]
                insert(space, _moved(area, old, result, result + new_len), self.rules)
                space.cut(old, old + old_len)
        if row["gup"]:
            self._populated(space, result, result + new_len)

    def _move(self, space: Space, old: int, length: int, new: int, flags: int) -> None:
        # Each area of the range, gaps kept, and what lies at gaps of the target too (remap_move; several areas
        # only since 6.17).
        rules = self.rules
        at = old
        while at < old + length:
            i = space.after(at)
            if i == len(space.areas) or space.areas[i].vma.start >= old + length:
                return
            area = space.areas[i]
            low, high = max(at, area.vma.start), min(area.vma.end, old + length)
            moved = _moved(area, low, low - old + new, high - old + new)
            space.cut(moved.vma.start, moved.vma.end)
            if not flags & MREMAP_DONTUNMAP:
                insert(space, moved, rules)
                space.cut(low, high)
            else:
                apart = (
                    not area.anon
                    and not rules.keeps_offset
                    and new in (area.vma.end, area.vma.start - length)
                )
                if apart:
                    here = space.place(moved.vma.start)
                    space.set(here, here, [moved])
                else:
                    insert(space, moved, rules)
                self._emptied(space, low, high)
            at = high

    def _emptied(self, space: Space, low: int, high: int) -> None:
        # dontunmap_complete: the source is unlocked, and has no anon_vma if it moved whole.
        i = space.index(low)
        area = space.areas[i]
        flags = (area.vma.vm_flags or _NOTHING) - _LOCKED
        new = replace(area, vma=area.vma.replaced(vm_flags=flags))
        if (area.vma.start, area.vma.end) == (low, high):
            new = replace(new, anon=0, forked=False, shift=area.shift if self.rules.keeps_offset else 0)
        space.set(i, i + 1, [new])

    def _brk(self, space: Space, row: dict[str, Any], _args: list[int]) -> None:
        result = row["result"]
        heap = next((a.vma for a in space.areas if a.vma.name == "[heap]"), None)
        old = space.brk or (heap.end if heap else result)
        space.brk = result
        low, high = page_up(old), page_up(result)
        if high > low:
            rw = Prot.READ | Prot.WRITE
            space.cut(low, high)
            vma = Vma(low, high, rw, name="[heap]", vm_flags=frozenset(("ac",)) | space.locks)
            insert(space, Area(vma, row["seq"]), self.rules, left_only=True)
            if row["gup"]:
                self._populated(space, low, high)
        elif high < low:
            space.cut(high, low)

    def _shmat(self, space: Space, row: dict[str, Any], args: list[int]) -> None:
        size, start = self._segments.get(args[0]), row["result"]
        if size is None:
            self._notes.append(f"shmat of segment {args[0]}: its size is not in the capture")
            return
        prot = Prot(1 if args[2] & 0o10000 else 3)
        name = f"/SYSV{0:08x} (deleted)"
        vma = Vma(start, start + size, prot, True, 0, "00:01", args[0], name, space.locks)
        space.cut(vma.start, vma.end)
        insert(space, Area(vma, row["seq"]), self.rules)

    def _shmdt(self, space: Space, _row: dict[str, Any], args: list[int]) -> None:
        # Every piece of the attachment goes: those of the segment whose offset is their distance from its start.
        i = space.index(args[0])
        if i < 0:
            return
        segment = space.areas[i].vma.inode
        for area in list(space.areas[i:]):
            vma = area.vma
            if vma.inode == segment and vma.shared and vma.start - args[0] == vma.offset:
                space.cut(vma.start, vma.end)

    def _mbind(self, space: Space, _row: dict[str, Any], args: list[int]) -> None:
        # Which nodes is behind a pointer; MPOL_DEFAULT is no policy at all.
        policy = frozenset((f"policy{args[2]}:{args[3]:#x}",)) if args[2] & 0xFF else _NOTHING

        def change(area: Area) -> Vma:
            flags = frozenset(f for f in area.vma.vm_flags or _NOTHING if not f.startswith("policy"))
            return area.vma.replaced(vm_flags=flags | policy)

        modify(space, args[0], page_up(args[0] + args[1]), change, self.rules)

    def _mseal(self, space: Space, _row: dict[str, Any], args: list[int]) -> None:
        self._flags(space, args[0], page_up(args[0] + args[1]), frozenset(("sl",)), _NOTHING, gaps=False)

    def _prctl(self, space: Space, row: dict[str, Any], args: list[int]) -> None:
        if args[0] != _PR_SET_VMA or args[1] != 0:
            return
        # The name itself is behind a pointer; what is named from one place has one name.
        name = f"[anon:{row['detail'] or hex(args[4])}]" if args[4] else ""

        def change(area: Area) -> Vma:
            vma = area.vma
            return vma if vma.inode or vma.shared else vma.replaced(name=name)

        modify(space, args[2], page_up(args[2] + args[3]), change, self.rules)

    def _ioctl(self, space: Space, _row: dict[str, Any], args: list[int]) -> None:
        command, start, end = args[1] & 0xFFFF, args[3], args[3] + page_up(args[4])
        every = frozenset(code for _, code in _UFFD_MODES)
        if command == 0xAA00:  # UFFDIO_REGISTER
            on = frozenset(code for bit, code in _UFFD_MODES if args[5] & bit) or frozenset(("um",))
            self._flags(space, start, end, on, every)
        elif command == 0xAA01:  # UFFDIO_UNREGISTER
            self._flags(space, start, end, _NOTHING, every)


def _anonymous(vma: Vma) -> bool:
    return not vma.inode and not vma.shared


def _moved(area: Area, old: int, new: int, end: int) -> Area:
    # The copy of `area` from address `old` on, at [new, end) (copy_vma): an anonymous area that was never
    # written counts its pages from its new address, any other keeps its page offsets.
    vma = shifted(area.vma, old) if old > area.vma.start else area.vma
    shift = area.shift + old - new if area.anon and not vma.inode else 0
    return replace(area, vma=vma.replaced(start=new, end=end), shift=shift)
