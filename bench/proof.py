"""Live comparison: operations a second, beside the kernel alone and the model alone, on the same program.

The limit is the kernel side: the same operations done and looked at (vma list, pagemap of every page) without a
model. CPU time of this process and its child, because wall time says little on a busy machine.
"""

import os
import resource
import time

from pagelens.model.runner import ModelWorld
from pagelens.proof.campaign import Bench, Result
from pagelens.proof.compare import windows
from pagelens.proof.machine import Local
from pagelens.proof.mix import Mix
from pagelens.proof.oracle import Oracle
from pagelens.proof.probes import probe_profile

PROGRAMS, LENGTH = 10, 400


def cpu_time() -> float:
    """CPU seconds of this process and of the children it has waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def timed(name: str, operations: int, work) -> float:
    """Run `work` and print its rate."""
    before, wall = cpu_time(), time.monotonic()
    work()
    used, took = cpu_time() - before, time.monotonic() - wall
    print(
        f"{name:<42} {operations / used:>10,.0f} op/s of CPU time {operations / took:>10,.0f} op/s of wall time"
    )
    return operations / used


def main() -> None:
    """Print the rates."""
    here = Local(max(os.sched_getaffinity(0)))
    profile = probe_profile(machine=here).profile
    bench = Bench(profile, here)
    programs = []
    result = Result(1)

    def compare() -> None:
        for seed in range(1, PROGRAMS + 1):
            program, found = bench.fuzz_one(seed, LENGTH, Mix(), result)
            assert not found, found
            programs.append(program)

    def kernel_only() -> None:
        for program in programs:
            with Oracle(here) as oracle:
                for op in program:
                    oracle.apply(op)
                    for proc in oracle.alive():
                        oracle.pages(proc, windows(oracle.keys(proc)))

    def kernel_blind() -> None:
        for program in programs:
            with Oracle(here) as oracle:
                for op in program:
                    oracle.apply(op)

    def model_only() -> None:
        for program in programs:
            world = ModelWorld(profile)
            for op in program:
                world.apply(op)

    total = PROGRAMS * LENGTH
    live = timed("model against kernel, every step compared", total, compare)
    limit = timed("kernel alone, looked at after every step", total, kernel_only)
    timed("kernel alone, not looked at", total, kernel_blind)
    timed("model alone, not looked at", total, model_only)
    print(f"comparison costs {limit / live:.1f} times what looking at the kernel costs")


if __name__ == "__main__":
    main()
