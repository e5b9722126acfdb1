"""Execute-only memory on a CPU with protection keys (seen in guests with -cpu max)."""

from __future__ import annotations

from model.support import PAGE, RW, anon, process

X = 4


def test_execute_only_memory_refuses_reads_with_code_4_even_to_the_kernel() -> None:
    for pku, outcome in ((False, (None, 0, 0)), (True, ("SEGV", 4, -12))):
        p = process(pku=pku)
        a = anon(p, 2, X)
        got = p.access(a, 1, "r")
        assert (got.signal, got.si_code, p.mlock(a, PAGE)) == outcome
    assert p.access(a, 1, "x").minor == 1
    assert [f.error_code for f in p.access(a, 1, "r").faults] == [0x25]
    assert [f.error_code for f in p.access(a, 1, "w").faults] == [0x27]
    other = p.fork()
    assert other.process_vm_readv(p, a, PAGE) == -14  # not readable at all
    p.mprotect(a, PAGE, RW)
    assert p.access(a, 1, "w").signal is None
