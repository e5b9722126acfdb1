"""The process in which a student's code runs: `python -P -m pagelens.lab.student FILE FUNCTION IN OUT SECONDS LEVELS`.

One JSON line a call comes in, one goes out, over two descriptors that are not standard output, so that a
solution may print. It has limits of its own: CPU time and memory; what ends a call is told in one sentence.
This guards against mistakes, not against malice: it is the student's own machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import math
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, TextIO

from pagelens import lab
from pagelens.lab import mini, wire
from pagelens.lab.mini import MiniMm, Vma, Vmas
from pagelens.vm.units import task_size

MEMORY = 512 << 20  # bytes of address space


_LIMIT = {"seconds": 2.0}  # CPU time of one call


class _TimeIsUp(BaseException):
    pass


class _Printed(io.TextIOBase):
    # Standard output and error of the student's code: counted, the first line kept.
    def __init__(self) -> None:
        self.lines = 0
        self.first = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not self.lines and len(self.first) < 200:
            self.first += text.split("\n", 1)[0][:200]
        self.lines += text.count("\n")
        return len(text)


def main(argv: list[str]) -> int:
    """Serve calls until the grader closes its end."""
    path, function = argv[0], argv[1]
    calls, replies = os.fdopen(int(argv[2]), "r"), os.fdopen(int(argv[3]), "w")
    _LIMIT["seconds"] = float(argv[4])
    lab.TASK_SIZE = mini.TASK_SIZE = task_size(int(argv[5]))
    printed = _Printed()
    sys.stdout = sys.stderr = printed
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _alarm(replies))
    module, bad = _guarded(lambda: _load(path), path)
    if bad is None and isinstance(module, ModuleType):
        made = getattr(module, function, None)
        if made is None:
            bad = {"no_function": True}
        elif not callable(made):
            bad = {"wrong": f"{function} is a {type(made).__name__}, not a function"}
    _say(replies, bad or {"loaded": True})
    if bad:
        return 0
    for line in calls:
        reply = _call(module, function, json.loads(line), path)
        reply |= {"printed": printed.lines, "first": printed.first}
        _say(replies, reply)
    return 0


def _alarm(replies: TextIO) -> Any:
    # The first alarm is an exception inside the call; if the code catches it and goes on, the second ends all.
    fired = [0]

    def alarm(_number: int, _frame: FrameType | None) -> None:
        fired[0] += 1
        if fired[0] > 1:
            _say(replies, {"time": True})
            os._exit(0)
        raise _TimeIsUp

    return alarm


def _say(replies: TextIO, value: dict[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


def _load(path: str) -> ModuleType:
    directory = str(Path(path).resolve().parent)
    sys.path.append(directory)  # last, so that a file beside it cannot stand in for one of Python's own
    spec = importlib.util.spec_from_file_location("student", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _guarded(work: Any, path: str) -> tuple[Any, dict[str, Any] | None]:
    # (result, None), or (None, what went wrong).
    soft = math.ceil(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) + _LIMIT["seconds"]) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
    try:
        signal.setitimer(signal.ITIMER_PROF, _LIMIT["seconds"], 0.5)
        try:
            return work(), None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except _TimeIsUp:
        return None, {"time": True}
    except SystemExit:
        return None, {"exit": True}
    except MemoryError:
        return None, {"memory": True}
    except RecursionError as error:
        return None, {"raised": f"RecursionError: {error}", "line": _line(error, path)}
    except SyntaxError as error:
        return None, {"raised": f"{type(error).__name__}: {error.msg}", "line": error.lineno or 0}
    except BaseException as error:
        return None, {"raised": _one_line(error), "line": _line(error, path)}


def _one_line(error: BaseException) -> str:
    text = ""
    with contextlib.suppress(Exception):
        text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _line(error: BaseException, path: str) -> int:
    # The last line of the student's own file in the traceback; 0 if there is none.
    own = [f.lineno or 0 for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return own[-1] if own else 0


def _call(module: ModuleType, function: str, call: dict[str, Any], path: str) -> dict[str, Any]:
    frames = wire.load_frames(call["frames"])
    mm = wire.load(call["mm"], frames)
    mm.withheld = frozenset(call["withheld"])
    args: list[Any] = [mm]
    child = None
    for arg in call["args"]:
        if isinstance(arg, dict) and "vma" in arg:
            vma = wire.load_vma(arg["vma"])
            args.append(next((v for v in list.__iter__(mm.vmas) if v == vma), vma))
        elif isinstance(arg, dict):
            child = MiniMm(frames)
            child.brk, child.start_brk, child.mmap_base = mm.brk, mm.start_brk, mm.mmap_base
            child.max_map_count, child.rules = mm.max_map_count, mm.rules
            args.append(child)
        else:
            args.append(arg)
    made = getattr(module, function)
    try:
        inspect.signature(made).bind(*args)
    except (TypeError, ValueError) as error:
        return {"wrong": f"{function} cannot be called with {len(args)} arguments: {error}"}
    result, bad = _guarded(lambda: made(*args), path)
    if bad is not None:
        return bad
    looked = mm.vmas.looked if isinstance(mm.vmas, Vmas) else 0
    if isinstance(result, Vma):
        result = {"vma": wire.dump_vma(result)}
    elif result is not None and type(result) not in (int, bool, str):
        return {"wrong": f"{function} returned a {type(result).__name__} ({result!r:.80})"}
    try:
        reply = {"result": result, "looked": looked, "mm": wire.dump(mm)}
        reply["frames"] = wire.dump_frames(frames)
        if child is not None:
            reply["child"] = wire.dump(child)
    except wire.WrongTypeError as error:
        return {"wrong": str(error)}
    return reply


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
