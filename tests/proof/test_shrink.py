"""Shrinking: the few operations that matter remain, whatever stands between them."""

from pagelens.model.scenario import parse_op
from pagelens.proof.shrink import shrink

FILLER = [parse_op(f"read arena[{i}]") for i in range(60)]
NEEDLES = [parse_op("munmap arena[3]"), parse_op("brk heap[2]"), parse_op("mprotect arena[5] r")]


def test_only_what_matters_remains():
    program = FILLER[:20] + NEEDLES[:1] + FILLER[20:45] + NEEDLES[1:2] + FILLER[45:] + NEEDLES[2:]
    trials = []

    def fails(candidate):
        trials.append(len(candidate))
        return all(needle in candidate for needle in NEEDLES)

    assert shrink(program, fails) == NEEDLES
    assert len(trials) < 200


def test_what_does_not_repeat_stays_whole():
    assert shrink(FILLER, lambda candidate: False) == FILLER


def test_operations_become_plainer():
    program = [parse_op("mmap 4 at arena[0] rw private populate fixed anon"), parse_op("write arena[0:4]")]
    small = shrink(program, lambda c: [op.name for op in c] == ["mmap", "write"])
    assert list(map(str, small)) == ["mmap 4 at arena[0] rw private fixed anon", "write arena[0]"]
