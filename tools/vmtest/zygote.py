"""`pagelens` in guests without importing everything anew: a process that has, and is forked for each command.

Under emulation the imports of one command (numpy, pyarrow, duckdb) take longer than what it then does, and tests
start some hundred commands. So inside a guest, a Popen of exactly `PYTHON -m pagelens.cli.main …` (or, for an
ordinary user, `support.nobody_main`) is served from here: the clone is made with CLONE_PARENT, so it is a child of the
test itself (signals, wait and exit codes are the real ones), with the descriptors, directory, environment, session and
process group that Popen asked for. Whatever asks for more (another user, a function before exec, other libraries) is
started as ever.

Rejected: fork in pytest's own process (its memory, warnings, signal handlers and capture would be the command's);
a launcher that asks a server (the command would not be the test's child).
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

MODULES = ("pagelens.cli.main", "support.nobody_main")
_CLONE_PARENT = 0x8000
_SYS_CLONE = 56
_HIGH = 500  # descriptors are parked from here on while they find their places
# What is read when an interpreter or a library starts: too late for us.
_EARLY = ("LD_", "PYTHON", "PAGELENS_LIB_DIR", "OPENBLAS", "ARROW_", "MALLOC_")
_Request = dict[str, Any]


class Zygote:
    """The tests' end: starts the process, and takes over Popen where it can."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vmtest.zygote", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            # No threads that a clone would leave behind.
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"},
            cwd="/",
            start_new_session=True,
        )
        theirs.close()
        self._lock = threading.Lock()
        self._environment = {k: v for k, v in os.environ.items() if k.startswith(_EARLY)}

    def takes(self, args: Any, executable: Any, preexec_fn: Any, env: Any, rest: dict[str, Any]) -> bool:
        """Whether this start is one that we can serve."""
        if not isinstance(args, list | tuple) or len(args) < 3 or self._process.poll() is not None:
            return False
        if [os.fspath(a) for a in args[:2]] != [sys.executable, "-m"] or args[2] not in MODULES:
            return False
        early = {k: v for k, v in (env or os.environ).items() if k.startswith(_EARLY) and k != "PYTHONPATH"}
        known = {k: v for k, v in self._environment.items() if k != "PYTHONPATH"}
        plain = rest["uid"] is rest["gid"] is rest["gids"] is None and rest["umask"] < 0
        return (
            early == known
            and plain
            and preexec_fn is None
            and not rest["shell"]
            and executable in (None, args[0])
        )

    def start(
        self,
        args: Any,
        cwd: Any,
        env: Any,
        place: tuple[bool, int | None],
        streams: tuple[int, int, int],
        passed: Any,
    ) -> int:
        """The new process's id. place: (a new session, its process group or -1)."""
        targets = [0, 1, 2, *passed]
        sources = [*streams, *passed]
        request: _Request = {
            "argv": [os.fspath(a) for a in args[2:]],
            "cwd": str(Path(cwd or ".").absolute()),
            "env": {os.fsdecode(k): os.fsdecode(v) for k, v in (env or os.environ).items()},
            "session": place[0],
            "group": -1 if place[1] is None else place[1],
            "cpus": sorted(os.sched_getaffinity(0)),
            "targets": targets,
        }
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", sources))]
        with self._lock:
            self._socket.sendmsg([json.dumps(request).encode()], rights)
            answer = self._socket.recv(64)
        if not answer:
            raise OSError("the zygote is gone")
        return int(answer)


def install() -> None:
    """Popen of `pagelens` is served by a zygote from now on."""
    zygote = Zygote()
    execute: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]
    names = (
        *("startupinfo", "creationflags", "shell", "p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread"),
        *("errwrite", "restore_signals", "gid", "gids", "uid", "umask", "start_new_session", "process_group"),
    )

    def start(
        self: Any,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: Any,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        *more: Any,
    ) -> None:
        rest = dict(zip(names, more, strict=True))
        if not zygote.takes(args, executable, preexec_fn, env, rest):
            execute(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)
            return
        ends = [rest[n] for n in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        streams = [end if end != -1 else own for own, end in enumerate((ends[0], ends[3], ends[5]))]
        try:
            place = rest["start_new_session"], rest["process_group"]
            self.pid = zygote.start(args, cwd, env, place, (streams[0], streams[1], streams[2]), pass_fds)
        except OSError:  # it is gone
            execute(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)
            return
        self._child_created = True
        self._close_pipe_fds(*ends)

    subprocess.Popen._execute_child = start  # type: ignore[attr-defined]


def _clone() -> int:
    # fork(), but as a child of our parent. Python's own preparations, and no thread but ours: _serve sees to it.
    api = ctypes.PyDLL(None)
    api.syscall.restype = ctypes.c_long
    api.PyOS_BeforeFork()
    pid: int = api.syscall(
        ctypes.c_long(_SYS_CLONE),
        ctypes.c_long(_CLONE_PARENT | signal.SIGCHLD),
        *(ctypes.c_long(0) for _ in range(4)),
    )
    if pid:
        api.PyOS_AfterFork_Parent()
    else:
        api.PyOS_AfterFork_Child()
    return pid


def _become(request: _Request, received: list[int]) -> None:
    # In the new process: what exec and Popen would have set up.
    parked = [fcntl.fcntl(fd, fcntl.F_DUPFD, _HIGH) for fd in received]
    os.closerange(0, _HIGH)
    for fd, target in zip(parked, request["targets"], strict=True):
        os.dup2(fd, target, inheritable=True)
    os.closerange(_HIGH, _HIGH + 100)
    os.environ.clear()
    os.environ.update(request["env"])
    os.sched_setaffinity(0, request["cpus"])
    if request["session"]:
        os.setsid()
    if request["group"] >= 0:
        os.setpgid(0, request["group"])
    os.chdir(request["cwd"])
    sys.path += [p for p in os.environ.get("PYTHONPATH", "").split(":") if p and p not in sys.path]
    sys.argv = request["argv"]
    streams: Any = sys
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        errors, buffering = ("backslashreplace", 1) if fd == 2 else (None, -1)
        stream = os.fdopen(fd, mode, buffering, errors=errors, closefd=False)
        setattr(streams, name, stream)
        setattr(streams, f"__{name}__", stream)


def _serve(ours: socket.socket) -> None:
    # Returns in the processes that are to run a command.
    size = array.array("i").itemsize
    while True:
        data, control, _, _ = ours.recvmsg(1 << 18, socket.CMSG_SPACE(64 * size))
        if not data:
            os._exit(0)
        fds = array.array("i")
        for _, _, content in control:
            fds.frombytes(content[: len(content) - len(content) % size])
        waits, ready = os.pipe()
        pid = _clone()
        if not pid:
            ours.detach()
            told = fcntl.fcntl(ready, fcntl.F_DUPFD, _HIGH + 100)
            _become(json.loads(data), list(fds))
            os.close(told)
            return
        for fd in (*fds, ready):
            os.close(fd)
        os.read(
            waits, 1
        )  # as Popen returns once exec is done: its session and directory are what was asked for
        os.close(waits)
        ours.send(str(pid).encode())


def main() -> None:
    """The process itself: imports, then serves until its tests are over."""
    ours = socket.socket(fileno=int(sys.argv[1]))
    from pagelens.cli import main as cli

    for name in ("numpy", "pyarrow", "pyarrow.parquet", "pyarrow.compute", "duckdb"):
        importlib.import_module(name)
    for name in cli.available():
        cli.command_parser(name)
    # Also what a command imports late: a recording's own modules and those of its causes take three seconds.
    import pagelens

    for module in pkgutil.walk_packages(pagelens.__path__, "pagelens."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    threads = list(Path("/proc/self/task").iterdir())
    if len(threads) > 1:
        sys.exit(f"vmtest: the zygote has {len(threads)} threads: commands are started as ever")
    gc.collect()
    gc.freeze()
    _serve(ours)
    try:
        if sys.argv[0] == MODULES[0]:
            sys.argv[0] = cli.__file__
            cli.entry()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


if __name__ == "__main__":
    main()
