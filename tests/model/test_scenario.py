"""The scenario language: text to operations and back; errors name line and cause."""

import pytest

from pagelens.model.op import Op, Place
from pagelens.model.runner import ModelWorld
from pagelens.model.scenario import Expectation, parse, parse_op
from pagelens.vm.errors import DamagedInputError

TEXT = """\
# a title
a = mmap 4 rw private anon
f = memfd 16
b = mmap 8 at arena[3] rw shared fixed file f[2]
write a[0:2]
expect faults 2
q = fork
q: write a[0]
q: expect page a[0] present !file exclusive
c = mremap a 8 maymove
on linux-6.1, linux-6.12: expect vmas 1 in a
madvise c dontneed
expect signal SEGV 1
munmap a[1]+5~123
brk heap[-3]
mmap ~5 none private anon flags=0x80000000
msync b sync
fallocate f[0:3] punch keep
t = thread
t: exit
clear_refs 4
mlockall current onfault
mprotect 0x10000[0:2] rx
ftruncate f 3
pwrite f[1:2]
expect vma b rw-s
expect result ENOMEM
expect result a[3]
"""


def test_parse():
    scenario = parse(TEXT)
    assert scenario.title == "a title"
    assert scenario.operations[2] == Op(
        "mmap", "main", "b", Place("arena", 3 * 4096), 8 * 4096, prot=3, flags=0x11, file="f", offset=2 * 4096
    )
    assert scenario.lines[3].item == Op("write", "main", "", Place("a"), 2 * 4096)
    on = next(line for line in scenario.lines if line.profiles)
    assert on.profiles == ("linux-6.1", "linux-6.12")
    assert on.item == Expectation("vmas", value=1, place=Place("a"), length=4 * 4096)


def test_every_operation_reads_back():
    for op in parse(TEXT).operations:
        assert parse_op(str(op)) == op


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("mmap 4 rw private anom", "unknown word 'anom'"),
        ("mmop 4", "did you mean 'mmap'"),
        ("write z[0]", "no region 'z' so far"),
        ("q: write arena[0]", "no process or thread 'q'"),
        (
            "on linux-6.l: expect vmas 1 in arena",
            "no kernel profile 'linux-6.l'; profiles: linux-6.1, linux-6.12",
        ),
        ("write arena[5:3]", "ends before it starts"),
        ("madvise arena[0] dontwant", "no advice 'dontwant'"),
        ("fork", "needs a name"),
        ("mmap 4 rq private anon", "not a protection"),
        ("mmap 4 rw shared file g", "no file 'g'"),
        ("expect page arena[0] wet", "no page state 'wet'"),
        ("expect vma arena rw", "not permissions"),
        ("on linux-6.1: write arena[0]", "only expectations"),
        ("brk", "the new break"),
        ("munlockall now", "too much"),
        ("expect signal SEGV ADRERR", "no si_code 'ADRERR' of SEGV; known: MAPERR ACCERR PKUERR"),
    ],
)
def test_an_error_names_line_and_cause(line, cause):
    with pytest.raises(DamagedInputError, match=r"x\.plscn, line 2: ") as error:
        parse("a = mmap 1 rw private anon\n" + line + "\n", "x.plscn")
    assert cause in str(error.value)


def test_what_follows_the_protection_comes_in_any_order():
    lines = [
        "mmap 8 at arena[3] rw shared fixed file f[2]",
        "mmap 8 rw file f[2] shared at arena[3] fixed",
        "mmap 8 rw shared at arena[3] file f[2] fixed",
    ]
    assert len({str(parse_op(line)) for line in lines}) == 1
    assert parse_op("mremap a 8 fixed to arena[3] maymove") == parse_op(
        "mremap a 8 maymove fixed to arena[3]"
    )


def test_si_codes_have_names():
    codes = ["SEGV MAPERR", "SEGV SEGV_MAPERR", "SEGV 1", "SEGV PKUERR", "BUS ADRERR"]
    lines = "".join(f"expect signal {code}\n" for code in codes)
    values = [line.item.value for line in parse("write arena[0]\n" + lines).lines[1:]]
    assert values == [1, 1, 1, 4, 2]
    op = parse_op("exec heap[0]")
    outcome = ModelWorld("linux-6.18").apply(op)
    assert outcome is not None
    assert outcome.text(op) == "0 pages, 0 faults, SIGSEGV (SEGV_MAPERR) at 0x10001000"


def test_empty_is_refused():
    with pytest.raises(DamagedInputError, match="no operation"):
        parse("# nothing\n")


def test_what_is_left_out_has_a_reason() -> None:
    world = ModelWorld("linux-6.18")
    for op in parse("a = mmap 1 rw private anon\nt = thread\nq = vfork\n").operations:
        world.apply(op)
    for text, reason in (
        ("write a[0]", "'main' stands still until 'q' exits"),
        ("t: write a[0]", ""),
        ("write b[0]", "there are: arena heap a"),
        ("r: write a[0]", "no process 'r'; there are: main t q"),
        ("q: exit", ""),
        ("write a[0]", ""),
    ):
        op = parse_op(text)
        obstacle = world.obstacle(op)
        assert reason in obstacle
        assert bool(obstacle) == bool(reason) == (world.apply(op) is None)
