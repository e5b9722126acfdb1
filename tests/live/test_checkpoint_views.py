"""Rollback of one memfd that is mapped more than once, and of one that others have open and do not map."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from live.test_checkpoint_rollback import settle
from pagelens.checkpoint import views
from pagelens.checkpoint.dump import dump
from pagelens.checkpoint.fast import Checkpoint
from pagelens.checkpoint.rollback import rollback
from pagelens.checkpoint.stored import Stored
from pagelens.linux import mappers, maps
from pagelens.linux.memory import read_memory
from pagelens.vm.errors import UsageError
from pagelens.vm.vma import Prot, Vma, VmaList
from support.puppet import MAP_SHARED, PAGE, PROT_EXEC, PROT_READ, RW, Puppet
from support.scribe import process_state
from support.subjects import Subjects


@pytest.fixture
def puppet(subjects: Subjects) -> Iterator[Puppet]:
    with Puppet(subjects("puppet")) as puppet:
        puppet.tell("malloc", 100)
        yield puppet


def memfd(puppet: Puppet, pages: int, name: bytes = b"views", flags: int = 0) -> int:
    with open(f"/proc/{puppet.pid}/mem", "r+b", buffering=0) as mem:
        mem.seek(puppet.line + 2048)
        mem.write(name + b"\0")
    fd = puppet.sys("memfd_create", puppet.line + 2048, flags)
    puppet.sys("ftruncate", fd, pages * PAGE)
    return fd


def saved(puppet: Puppet, path: Path) -> Stored:
    settle(puppet.pid)
    dump(puppet.pid, path)
    return Stored.open(path)


def bytes_of(puppet: Puppet, addr: int, pages: int) -> bytes:
    return read_memory(puppet.pid, addr, pages * PAGE)[::PAGE]


def test_views_of_one_memfd_go_back_once_through_the_writable_one(puppet: Puppet, tmp_path: Path) -> None:
    fd = memfd(puppet, 8)
    code = puppet.mmap(8, PROT_READ | PROT_EXEC, MAP_SHARED, fd=fd)  # as a JIT compiler has them
    data = puppet.mmap(8, RW, MAP_SHARED, fd=fd)
    shown = puppet.mmap(4, PROT_READ, MAP_SHARED, fd=fd, offset=2 * PAGE)
    again = puppet.mmap(4, RW, MAP_SHARED, fd=fd, offset=4 * PAGE)
    for page in range(6):
        puppet.write(data + page * PAGE, 1, value=page + 1)
    for view, pages in ((code, 6), (shown, 4), (again, 2)):
        puppet.read(view, pages)
    store = saved(puppet, tmp_path / "c")
    puppet.read(data + PAGE, 2)
    puppet.read(again + PAGE, 3)
    settle(puppet.pid)
    before = rollback(puppet.pid, store)  # what the commands themselves change
    puppet.write(data + PAGE, 2, value=99)
    puppet.write(again + PAGE, 3, value=98)  # one page that was there, two that were not
    settle(puppet.pid)
    done = rollback(puppet.pid, store)
    assert done.accepted == ()
    assert done.dropped_pages == 2
    # Each once (through all their views 7); the page of rseq too, where the thread came to another CPU.
    assert done.written_pages - before.written_pages in (3, 4)
    assert bytes_of(puppet, data, 8) == bytes_of(puppet, code, 8) == b"\1\2\3\4\5\6\0\0"
    assert bytes_of(puppet, shown, 4) == b"\3\4\5\6"
    assert bytes_of(puppet, again, 4) == b"\5\6\0\0"
    puppet.sys("munmap", shown, 4 * PAGE)
    puppet.write(data, 8, value=5)
    settle(puppet.pid)
    rollback(puppet.pid, store)
    assert bytes_of(puppet, shown, 4) == b"\3\4\5\6"
    settle(puppet.pid)
    assert process_state(puppet.pid)[1] == 0


def test_memory_that_only_read_only_views_show_goes_back_through_its_file(
    puppet: Puppet, tmp_path: Path
) -> None:
    fd = memfd(puppet, 4)
    first = puppet.mmap(4, RW, MAP_SHARED, fd=fd)
    puppet.write(first, 3, value=1)
    puppet.sys("munmap", first, 4 * PAGE)
    shown = puppet.mmap(4, PROT_READ, MAP_SHARED, fd=fd)
    second = puppet.mmap(4, PROT_READ, MAP_SHARED, fd=fd)
    puppet.read(shown, 3)
    store = saved(puppet, tmp_path / "c")
    assert rollback(puppet.pid, store).accepted == ()
    for _ in range(2):
        settle(puppet.pid)
        first = puppet.mmap(4, RW, MAP_SHARED, fd=fd)
        puppet.write(first + PAGE, 3, value=9)
        puppet.sys("munmap", first, 4 * PAGE)
        settle(puppet.pid)
        assert bytes_of(puppet, second, 4) == b"\1\x09\x09\x09"
        done = rollback(puppet.pid, store)
        assert done.accepted == ()
        assert done.dropped_pages == 1
        assert bytes_of(puppet, second, 4) == bytes_of(puppet, shown, 4) == b"\1\1\1\0"
    settle(puppet.pid)
    assert process_state(puppet.pid)[1] == 0


def test_who_has_it_open_without_mapping_it_is_found_before_anything_is_touched(
    puppet: Puppet, tmp_path: Path
) -> None:
    fd = memfd(puppet, 2)
    data = puppet.mmap(2, RW, MAP_SHARED, fd=fd)
    puppet.write(data, 2, value=1)
    alone = puppet.mmap(2)
    puppet.write(alone, 2, value=1)
    store = saved(puppet, tmp_path / "c")
    settle(puppet.pid)
    # As a Wayland client passes its buffers: over a socket, to a process that need not map them.
    left, right = socket.socketpair()
    mine = os.open(f"/proc/{puppet.pid}/fd/{fd}", os.O_RDONLY)
    left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [mine]))])
    child = os.fork()
    if child == 0:
        right.recvmsg(1, socket.CMSG_SPACE(4))
        os.close(mine)
        right.send(b"y")
        right.recv(1)
        os._exit(0)
    os.close(mine)
    try:
        assert left.recv(1) == b"y"
        puppet.write(data, 2, value=2)
        puppet.write(alone, 2, value=2)
        settle(puppet.pid)
        with pytest.raises(UsageError, match=rf"process {child} \(.*\) has it open: .*\[shared\]; --accept"):
            rollback(puppet.pid, store)
        assert bytes_of(puppet, data, 2) == bytes_of(puppet, alone, 2) == b"\2\2"
        done = rollback(puppet.pid, store, accept=("shared",))
        assert any("has it open" in text for text in done.accepted)
        assert bytes_of(puppet, data, 2) == b"\1\1"
    finally:
        left.send(b"z")
        os.waitpid(child, 0)
        left.close()
        right.close()
    puppet.write(data, 2, value=2)
    settle(puppet.pid)
    assert rollback(puppet.pid, store).accepted == ()
    assert bytes_of(puppet, data, 2) == b"\1\1"


def test_a_ring_of_the_kernel_does_not_go_back(puppet: Puppet, tmp_path: Path) -> None:
    with open(f"/proc/{puppet.pid}/mem", "r+b", buffering=0) as mem:
        mem.seek(puppet.line + 2048)
        mem.write(bytes(8))
        puppet.sys("io_setup", 100, puppet.line + 2048)
        mem.seek(puppet.line + 2048)
        ring = int.from_bytes(mem.read(8), "little")
    event = ring + 2048
    alone = puppet.mmap(1)
    puppet.write(alone, 1, value=1)
    store = saved(puppet, tmp_path / "c")
    settle(puppet.pid)
    assert rollback(puppet.pid, store).accepted == ()
    puppet.write(event, 1, value=7)
    puppet.write(alone, 1, value=2)
    settle(puppet.pid)
    with pytest.raises(UsageError, match=r"/\[aio\].* has changed, and the kernel goes on .*\[shared\]"):
        rollback(puppet.pid, store)
    assert bytes_of(puppet, alone, 1) == b"\2"
    assert len(rollback(puppet.pid, store, accept=("shared",)).accepted) == 1
    assert bytes_of(puppet, alone, 1) == b"\1"
    assert read_memory(puppet.pid, event, 1) == b"\7"


@pytest.mark.requires("uffd-wp-async")
def test_fast_rollbacks_of_views_and_of_memory_that_others_have_open(puppet: Puppet) -> None:
    fd = memfd(puppet, 4)
    shown = puppet.mmap(4, PROT_READ, MAP_SHARED, fd=fd)
    data = puppet.mmap(4, RW, MAP_SHARED, fd=fd)
    puppet.write(data, 3, value=1)
    settle(puppet.pid)
    with Checkpoint.take(puppet.pid) as point:
        for _ in range(3):
            puppet.write(data + PAGE, 3, value=2)
            settle(puppet.pid)
            assert point.rollback().fast
            assert bytes_of(puppet, shown, 4) == bytes_of(puppet, data, 4) == b"\1\1\1\0"
        puppet.sys("munmap", shown, 4 * PAGE)
        puppet.write(data + PAGE, 3, value=2)
        settle(puppet.pid)
        assert not point.rollback().fast
        assert bytes_of(puppet, shown, 4) == bytes_of(puppet, data, 4) == b"\1\1\1\0"
    mine = os.open(f"/proc/{puppet.pid}/fd/{fd}", os.O_RDONLY)
    try:
        with Checkpoint.take(puppet.pid) as point:
            puppet.write(data, 1, value=2)
            settle(puppet.pid)
            with pytest.raises(UsageError, match=r"or have open.*\[shared\]"):
                point.rollback()
            assert bytes_of(puppet, data, 1) == b"\2"
            assert point.rollback(accept=("shared",)).fast
            assert bytes_of(puppet, data, 1) == b"\1"
    finally:
        os.close(mine)


def test_only_descriptors_with_the_name_and_inode_are_asked_for_more(
    puppet: Puppet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # stat of another file, of a dead FUSE or NFS mount, could block for ever.
    fd, other = memfd(puppet, 1), memfd(puppet, 1)
    puppet.mmap(1, RW, MAP_SHARED, fd=fd)
    with open(f"/proc/{puppet.pid}/maps", encoding="ascii") as file:
        fields = next(line.split() for line in file if "/memfd:views" in line)
    key, name = (fields[3], int(fields[4])), "/memfd:views (deleted)"
    asked: list[str] = []
    stat = os.stat

    def told(path: str) -> os.stat_result:
        asked.append(path)
        return stat(path)

    (tmp_path / "x").touch()
    with open(tmp_path / "x", "rb"):
        mine = [os.open(f"/proc/{puppet.pid}/fd/{n}", os.O_RDONLY) for n in (fd, other)]
        try:
            monkeypatch.setattr(mappers.os, "stat", told)
            found = mappers.others(puppet.pid, {key: name})
        finally:
            monkeypatch.undo()
            for n in mine:
                os.close(n)
    assert found.of == {}
    assert [pid for pid, _ in found.holders[key]] == [os.getpid()]
    assert asked == [f"/proc/{os.getpid()}/fd/{mine[0]}"]
    assert key in found
    assert key not in mappers.others(puppet.pid, {key: name})


def test_each_page_of_an_object_has_one_place() -> None:
    def vma(start: int, pages: int, offset: int, perms: str, inode: int) -> Vma:
        line = (
            f"{start:x}-{start + pages * PAGE:x} {perms} {offset * PAGE:08x} 00:01 {inode} /memfd:x (deleted)"
        )
        return maps.parse_line(line.encode())

    rng = np.random.default_rng(5)
    for _ in range(200):
        at, vmas = 0x10000, []
        for _ in range(int(rng.integers(1, 8))):
            pages = int(rng.integers(1, 9))
            prot = ("rw-s", "r--s")[int(rng.integers(2))]
            vmas.append(vma(at, pages, int(rng.integers(0, 10)), prot, int(rng.integers(5, 7))))
            at += (pages + int(rng.integers(0, 2))) * PAGE
        found = views.find(VmaList(vmas))
        place: dict[tuple[int, int], int] = {}
        for view in found:
            for number in range(0, view.end - view.start, PAGE):
                page = (view.vma.inode, view.vma.offset + view.start + number - view.vma.start)
                assert place.setdefault(page, view.at + number) == view.at + number
        assert sum(v.end - v.start for v in found) == sum(v.size for v in vmas)
        assert sum(v.end - v.start for v in found if v.at == v.start) == len(place) * PAGE
        for (inode, offset), addr in place.items():
            owner = next(v for v in vmas if v.start <= addr < v.end)
            assert (owner.inode, owner.offset + addr - owner.start) == (inode, offset)
            covering = [v for v in vmas if v.inode == inode and v.offset <= offset < v.offset + v.size]
            assert bool(owner.prot & Prot.WRITE) == any(v.prot & Prot.WRITE for v in covering)
