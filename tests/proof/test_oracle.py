"""The oracle child on the running kernel: exact figures, and that it adds nothing of its own."""

import pytest

from pagelens.model.op import ARENA_BASE
from pagelens.model.runner import ModelWorld
from pagelens.model.scenario import parse, parse_op
from pagelens.proof.compare import Comparison
from pagelens.proof.oracle import Oracle
from pagelens.proof.randomprog import Generator
from support.machine import HERE, lives


@pytest.fixture
def oracle():
    with Oracle(HERE) as oracle:
        yield oracle


def do(oracle, text):
    return [oracle.apply(op) for op in parse(text).operations]


def test_the_fence_is_verified(oracle):
    """All but what only the machine's owner can close: a DAMON scheme is named where there is one."""
    assert [fence for fence in oracle.fences if not fence.ok and fence.name != "damon"] == []
    assert {fence.name for fence in oracle.fences} >= {
        "aslr", "thp", "ksm", "numa", "swap", "damon", "cpu", "harness"
    }  # fmt: skip


def test_exact_faults(oracle):
    """One fault for a page, two for read-then-write, none for the second time."""
    outcomes = do(
        oracle,
        """\
        mmap 8 at arena[0] rw private anon fixed
        write arena[0:4]
        write arena[0:4]
        read arena[4]
        write arena[4]
        madvise arena[0:8] populate_write
        madvise arena[0:8] dontneed
        read arena[0:8]
        """,
    )
    assert [o.faults for o in outcomes] == [0, 4, 0, 1, 1, 3, 0, 8]


def test_signals_carry_code_and_address(oracle):
    outcomes = do(
        oracle,
        """\
        f = memfd 1
        mmap 4 at arena[0] rw shared fixed file f
        mmap 1 at arena[4] r private anon fixed
        write arena[0:4]
        write arena[4]
        write arena[5]
        exec arena[4]
        mprotect arena[4] rx
        exec arena[4]
        """,
    )
    bus, acc, maperr, nx, _, ran = outcomes[3:]
    assert (bus.signal, bus.code, bus.addr, bus.result) == (7, 2, ARENA_BASE + 4096, 1)
    assert (acc.signal, acc.code, acc.addr) == (11, 2, ARENA_BASE + 4 * 4096)
    assert (maperr.signal, maperr.code) == (11, 1)
    assert (nx.signal, nx.code) == (11, 2)
    assert (ran.signal, ran.result) == (0, 1)


def test_fork_thread_exit(oracle):
    outcomes = do(
        oracle,
        """\
        mmap 4 at arena[0] rw private anon fixed
        write arena[0:4]
        q = fork
        q: write arena[0:2]
        write arena[0:4]
        t = thread
        t: write arena[0:4]
        q: exit
        t: exit
        """,
    )
    assert [o.faults for o in outcomes] == [0, 4, 0, 2, 4, 0, 0, 0, 0]
    assert oracle.alive() == ["main"]


def test_what_it_shows_is_the_kernels_own(oracle):
    do(oracle, "mmap 4 at arena[0] rw private anon fixed\nwrite arena[1]\n")
    (vma,) = oracle.vmas("main")
    assert (vma.start, vma.pages, vma.perms) == (ARENA_BASE, 4, "rw-p")
    assert [int(e) >> 63 for e in oracle.pagemap("main", ARENA_BASE, 4)] == [0, 1, 0, 0]
    vmas, accounting = oracle.accounting("main")
    row = [v.start for v in vmas].index(ARENA_BASE)
    assert int(accounting.column("Private_Dirty")[row]) == 4096


def test_a_name_that_was_never_mapped_is_left_out(oracle):
    assert oracle.apply(parse_op("write nowhere[0]")) is None
    assert oracle.apply(parse_op("ghost: write arena[0]")) is None


@pytest.mark.parametrize("first, left_out", [(3, True), (7, False)])
def test_what_would_unmap_the_harness_is_left_out(oracle, first, left_out):
    """Lengths near 2^64 that shrink by five pages, to six below the start: to 6.16 the kernel unmaps what is there."""
    do(oracle, "brk heap[16]\n")
    op = parse_op(f"mremap heap[{first}:{first + 2**52 - 1}] {2**52 - 6}")
    model = ModelWorld("linux-6.12", oracle.setting)
    model.apply(parse_op("brk heap[16]"))
    assert (oracle.apply(op) is None, model.apply(op) is None) == (left_out, left_out)
    assert oracle.alive() == ["main"]


def beyond_batches(found):
    """Without pages of which one child alone has drained the batch of MADV_FREE (docs/fidelity.md, left out, 1):
    anonymous ones whose flags differ by KPF_SWAPBACKED alone."""
    anon, swapbacked = 1 << 12, 1 << 14
    kept = []
    for d in found:
        here, there = (
            int(text.rpartition(" ")[2], 16) if "flags" in text else 0 for text in (d.kernel, d.model)
        )
        if d.kind != "frames" or not here & there & anon or here ^ there != swapbacked:
            kept.append(d)
    return kept


def test_two_children_agree():
    """Kernel against kernel: what differs here is the oracle's own noise, so nothing may."""
    for seed in range(5):
        generator = Generator(seed)
        with Oracle(HERE) as one, Oracle(HERE) as two:
            comparison = Comparison(one, two, soft_dirty=False)
            for _ in range(250):
                assert comparison.step(generator.next(one)) == []
            assert beyond_batches(comparison.checkpoint()) == []
            assert comparison.agreement.succeeded > 0.6 * comparison.agreement.operations


def test_nothing_is_left_behind():
    with Oracle(HERE) as oracle:
        oracle.apply(parse_op("q = fork"))
        pids = sorted(oracle.pids)
        assert len(pids) == 2
        assert all(lives(pid) for pid in pids)
    assert not any(lives(pid) for pid in pids)
