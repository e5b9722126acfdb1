"""fork, exec, exit, threads: what is copied, who pays for the copy, what comes back."""

from __future__ import annotations

import pytest

from model.support import PAGE, PRIV, PROFILES, RW, R, anon, bits, process, smaps
from pagelens.model import Layout

EXCLUSIVE, PRESENT = 56, 63


@pytest.mark.parametrize("profile", PROFILES)
def test_one_copy_a_page_and_after_exit_the_parent_reuses(profile: str) -> None:
    p = process(profile)
    a = anon(p, 100)
    p.access(a, 100 * PAGE, "w")
    child = p.fork()
    assert (bits(p, a, 100, EXCLUSIVE), smaps(p, a)["Shared_Dirty"], smaps(p, a)["Pss"]) == (0, 400, 200)
    got = child.access(a, 40 * PAGE, "w")
    assert [(f.error_code, f.count) for f in got.faults] == [(7, 40)]
    assert p.machine.frames.used == 140
    child.exit()
    assert p.machine.frames.used == 100
    assert bits(p, a, 100, EXCLUSIVE) == 100
    # One minor fault a page: the write bit was taken at the fork; nothing is copied.
    assert p.access(a, 100 * PAGE, "w").minor == 100
    assert p.machine.frames.used == 100
    p.machine.check()


@pytest.mark.parametrize("profile", PROFILES)
def test_ptes_that_a_fault_can_refill_are_not_copied(profile: str) -> None:
    p = process(profile)
    f = p.machine.file("/f", 16 * PAGE)
    shared = p.mmap(0, 16 * PAGE, RW, 1, f)
    private = p.mmap(0, 16 * PAGE, RW, 2, f)
    zeros = anon(p, 16)
    for addr in (shared, private, zeros):
        p.access(addr, 16 * PAGE, "r")
    child = p.fork()
    assert [bits(child, a, 16, PRESENT) for a in (shared, private, zeros)] == [0, 0, 0]
    p.access(private, PAGE, "w")  # now it has an anon_vma, and all its PTEs are copied
    child = p.fork()
    assert bits(child, private, 16, PRESENT) == 16


def test_dontfork_wipeonfork_and_locks() -> None:
    p = process()
    a = anon(p, 1, page=0)
    b = anon(p, 1, page=10)
    c = anon(p, 1, page=20)
    for addr in (a, b, c):
        p.access(addr, PAGE, "w")
    p.madvise(a, PAGE, 10)
    p.madvise(b, PAGE, 18)
    p.mlock(c, PAGE)
    child = p.fork()
    assert [v.start for v in child.snapshot().vmas] == [b, c]
    assert bits(child, b, 1, PRESENT) == 0
    assert "lo" not in (child.snapshot().vmas[1].vm_flags or ())
    status = child.snapshot().accounting.status  # type: ignore[union-attr]
    assert (status["VmSize"], status["VmLck"]) == (2 * PAGE, 0)
    assert p.madvise(p.mmap(0, PAGE, RW, 0x21), PAGE, 18) == -22  # WIPEONFORK is for private anonymous memory


def test_fork_fails_at_the_commit_limit_and_gives_all_back() -> None:
    p = process()
    p.machine.overcommit = 2
    p.machine.user_reserve_pages = 0
    p.machine.memory_pages, p.machine.overcommit_ratio = 100, 100
    a = anon(p, 60)
    p.access(a, 60 * PAGE, "w")
    with pytest.raises(MemoryError):
        p.fork()
    assert (p.machine.committed, p.machine.frames.used) == (60, 60)
    assert p.mmap(0, 50 * PAGE, RW, PRIV) == -12
    assert p.mmap(0, 50 * PAGE, R, PRIV) > 0
    p.machine.check()


def test_vfork_shares_until_exec_and_threads_share_until_exit() -> None:
    p = process()
    a = anon(p, 2)
    child = p.vfork()
    child.access(a, PAGE, "w")
    assert bits(p, a, 1, PRESENT) == 1
    assert (child.min_flt, p.min_flt) == (1, 0)
    old = p.mm.number
    child.exec(Layout())
    assert (child.mm.number, len(child.snapshot().vmas)) == (old + 1, 0)
    assert bits(p, a, 1, PRESENT) == 1
    t = p.thread()
    assert (t.pid, t.tid) != (p.pid, p.tid) and t.pid == p.pid
    t.access(a, 2 * PAGE, "w")
    t.exit()
    assert bits(p, a, 2, PRESENT) == 2
    p.thread()
    p.exit()
    child.exit()
    assert (p.machine.processes, p.machine.frames.used) == ([], 0)


def test_soft_dirty_survives_fork_in_both() -> None:
    p = process()
    a = anon(p, 4)
    p.access(a, 4 * PAGE, "w")
    p.clear_refs(4)
    p.access(a, 2 * PAGE, "w")
    child = p.fork()
    assert [bits(q, a, 4, 55) for q in (p, child)] == [2, 2]


def test_three_generations_keep_frames_and_counts() -> None:
    p = process()
    a = anon(p, 32)
    p.access(a, 32 * PAGE, "w")
    family = [p]
    for i in range(3):
        q = family[-1].fork()
        q.access(a + i * 8 * PAGE, 8 * PAGE, "w")
        family.append(q)
    p.machine.check()
    assert p.machine.frames.used == 32 + 24
    # By hand, pages of 4 KiB: 8 alone, 8 by 2, by 3, by 4 at the ends; by 3, 2, 3, 4 between.
    assert [smaps(q, a)["Pss"] for q in family] == [66, 45, 45, 66]
    for q in family:
        q.exit()
    assert p.machine.frames.used == 0


def test_process_vm_writev_copies_on_write_for_the_target_and_counts_for_the_caller() -> None:
    p = process()
    a = anon(p, 3)
    p.access(a, PAGE, "w")
    other = p.fork()
    anon(p, 1, R, at=a + 3 * PAGE)
    before = other.min_flt
    assert other.process_vm_writev(p, a, 3 * PAGE) == 3 * PAGE
    assert other.min_flt - before == 3
    assert p.machine.frames.used == 4  # the child's, the copy, two new ones
    assert p.machine.events.entries[-1].gup == 3
    assert other.process_vm_writev(p, a + 3 * PAGE, 1) == -14
