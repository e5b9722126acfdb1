"""`pagelens model step`: operations from a terminal or a pipe, each fault in stages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable

from pagelens.cli.model_show import show
from pagelens.model import op as ops
from pagelens.model.explain import access_stages
from pagelens.model.op import Op
from pagelens.model.runner import ModelWorld
from pagelens.model.scenario import Scenario, parse_op
from pagelens.vm.errors import DamagedInputError
from pagelens.vm.units import PAGE_SIZE

HELP = """\
an operation     a = mmap 4 rw private anon | write a[0] | munmap a[1:3] | q = fork | q: write a[0] | ...
maps smaps pagemap tables events    what the model has now
help, quit
An access of one page is told in stages; on a terminal, Enter goes on to the next one."""
_SHOWS = ("maps", "smaps", "pagemap", "tables", "events")


def step(world: ModelWorld, scenario: Scenario | None) -> int:
    """Run operations one at a time. Returns 0, or 5 if a line of a pipe made no sense."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history of input())
    print(f"model {world.machine.profile.name}; help for help" if terminal else world.machine.profile.name)
    for op in scenario.operations if scenario else ():
        print(f"> {op}")
        _do(world, op, terminal)
    bad = 0
    for line in _lines(terminal):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if text in ("quit", "exit", "q"):
            break
        if text == "help":
            print(HELP)
        elif text in _SHOWS:
            print(show(world, text))
        else:
            try:
                op = parse_op(text)
            except DamagedInputError as error:
                expects = text.split(":")[-1].split()[:1] == ["expect"]
                print("? expectations are for scenarios (pagelens model run)" if expects else f"? {error}")
                bad = 5
                continue
            if not terminal:
                print(f"> {op}")
            _do(world, op, terminal)
    return 0 if terminal else bad


def _lines(terminal: bool) -> Iterable[str]:
    if not terminal:
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _enter() -> bool:
    # False at the end of input: the access is told to its end without waiting, and the next prompt ends all.
    try:
        input("  (Enter) ")
    except EOFError:
        print()
        return False
    return True


def _do(world: ModelWorld, op: Op, terminal: bool) -> None:
    if obstacle := world.obstacle(op):
        print(f"  {obstacle}")
        return
    process = world.processes[op.proc]
    if op.name in ops.ACCESSES and op.place is not None and op.length <= PAGE_SIZE:
        addr = world.names.resolve(op.place)
        for i, stage in enumerate(access_stages(process, addr, op.name)):
            if i and terminal:
                terminal = _enter()
            where = f"   [{stage.kernel}]" if stage.kernel else ""
            print(f"  {stage.name:<11} {stage.text}{where}")
        return
    before = {str(v) for v in world.vmas(op.proc)}
    outcome = world.apply(op)
    print(f"  = {outcome.text(op) if outcome else 'left out'}")
    if op.proc in world.processes:
        after = {str(v) for v in world.vmas(op.proc)}
        for text in sorted(before - after):
            print(f"  - {text}")
        for text in sorted(after - before):
            print(f"  + {text}")
