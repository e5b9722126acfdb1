"""A kernel behind a socket: the same answers as without, and one clear sentence where nobody is there."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import socket
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from pagelens.model.op import Op
from pagelens.model.profile import PROFILES
from pagelens.proof.campaign import Bench, Result, fuzz
from pagelens.proof.distant import connected
from pagelens.proof.machine import Local
from pagelens.proof.oracle import Oracle
from pagelens.proof.probes import probe_profile
from pagelens.vm.errors import CapabilityMissingError, TargetGoneError
from support.recording import pagelens

HERE = Local(min(os.sched_getaffinity(0)))


def relay(connection: socket.socket, master: int, slave: int) -> None:
    # What a hypervisor does between its socket and the guest's port, until one of them ends. Our end of the slave is
    # closed once whoever serves has it open.
    ends = {connection.fileno(): master, master: connection.fileno()}
    with connection, contextlib.suppress(OSError):
        while True:
            for read in select.select(ends, (), ())[0]:
                data = os.read(read, 65536)
                if not data:
                    raise OSError
                while data:
                    data = data[os.write(ends[read], data) :]
                if read == master and slave >= 0:
                    os.close(slave)
                    slave = -1
    os.close(master)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A socket, and the process that serves behind it."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    path = tmp_path / "port"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        command = [sys.executable, "-m", "pagelens.cli.main", "model", "serve", os.ttyname(slave)]
        with subprocess.Popen(command) as server:
            thread = threading.Thread(target=lambda: relay(listener.accept()[0], master, slave), daemon=True)
            thread.start()
            try:
                yield path, server
            finally:
                server.kill()
                server.wait()
                thread.join(20)
                assert not thread.is_alive()


def test_the_same_as_without(served: tuple[Path, subprocess.Popen[bytes]]) -> None:
    with connected(str(served[0])) as machine:
        assert machine.facts() == HERE.facts()
        here, there = probe_profile(machine=HERE), probe_profile(machine=machine)
        assert (here.text, here.profile) == (there.text, there.profile)
        results: list[Result] = []
        for one in (HERE, machine):
            results.append(fuzz(Bench(here.profile, one), 11, 1200))
            assert results[-1].failed_seeds == []
        # All but smaps_rollup's shares, which are left out where another oracle runs as well.
        one, two = (result.agreement.text().partition("\naccounting")[0] for result in results)
        assert one == two
        assert results[0].used == results[1].used
        # A profile that is wrong is caught there as well.
        wrong = here.profile.with_rules(heap_name_overlaps=not here.profile.heap_name_overlaps)
        assert fuzz(Bench(wrong, machine), 5000, 20_000, small=False).failed_seeds


def test_errors_come_through(served: tuple[Path, subprocess.Popen[bytes]]) -> None:
    with connected(str(served[0])) as machine, Oracle(machine) as oracle:
        assert oracle.apply(Op("mmap", length=4096, prot=3, flags=0x22)) is not None
        with pytest.raises(CapabilityMissingError, match=r"/proc/\d+/nothing"):
            oracle.process("main").read("nothing")
        with pytest.raises(TargetGoneError, match="no process"):
            machine.open(1 << 22)


def test_an_answer_that_nobody_waited_for_is_passed_by(
    served: tuple[Path, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(str(served[0])) as machine:
        with monkeypatch.context() as patch:

            def interrupted() -> None:
                raise KeyboardInterrupt

            patch.setattr(machine, "_answer", interrupted)
            with pytest.raises(KeyboardInterrupt):
                machine.pin()
        assert machine.facts() == HERE.facts()


def test_an_interrupt_amid_a_clean_up_is_an_interrupt(
    served: tuple[Path, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(str(served[0])) as machine:
        shut = machine.shut

        def interrupted(handle: int, fds: Iterable[int]) -> None:
            shut(handle, fds)  # done, but its caller does not know: it does it again, and that fails
            raise KeyboardInterrupt

        monkeypatch.setattr(machine, "shut", interrupted)
        assert fuzz(Bench(PROFILES["linux-6.18"], machine), 1, 4000).interrupted


def test_whoever_serves_ends_amid(served: tuple[Path, subprocess.Popen[bytes]]) -> None:
    path, server = served
    with pytest.raises(TargetGoneError, match="the machine of the proof is gone"):  # noqa: SIM117
        with connected(str(path)) as machine:
            oracle = Oracle(machine)
            (pid,) = oracle.pids
            server.kill()
            server.wait()
            oracle.apply(Op("mmap", length=4096, prot=3, flags=0x22))
    # Its child goes with it.
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_nobody_is_there(tmp_path: Path) -> None:
    done = pagelens("model", "fuzz", "--on", str(tmp_path / "none"), "--ops", "10")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == f"pagelens: nobody serves at {tmp_path / 'none'}: No such file or directory\n"
    done = pagelens("model", "serve", str(tmp_path / "none"))
    assert (done.returncode, done.stderr) == (
        2,
        f"pagelens: cannot open the port {tmp_path / 'none'}: No such file or directory\n",
    )


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\4\0\0\0abcd", b"\0\0\0\0"])
def test_somebody_else_is_there(tmp_path: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "other"))
        listener.listen(1)

        def answer() -> None:
            with listener.accept()[0] as connection, contextlib.suppress(OSError):
                connection.recv(100)
                connection.sendall(said)
                connection.recv(100)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        done = pagelens("model", "fuzz", "--on", str(tmp_path / "other"), "--ops", "10")
        thread.join(20)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == "pagelens: what answers there is not `pagelens model serve`\n"
    (tmp_path / "file").touch()
    done = pagelens("model", "serve", str(tmp_path / "file"))
    assert (done.returncode, done.stderr) == (
        2,
        f"pagelens: {tmp_path / 'file'} is no port: not a character device\n",
    )


def test_by_the_command_line(served: tuple[Path, subprocess.Popen[bytes]]) -> None:
    done = pagelens("model", "fuzz", "--on", str(served[0]), "--ops", "400", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"kernel {os.uname().release} against model linux-")
    assert "400 operations" in done.stdout and " 0 disagreements" in done.stdout
    assert served[1].wait(20) == 0


def test_a_solution_is_graded_by_the_kernel_there(served: tuple[Path, subprocess.Popen[bytes]]) -> None:
    solution = Path(__file__).parents[1] / "lab" / "solutions" / "dontneed.py"
    done = pagelens("model", "grade", "dontneed", str(solution), "--on", str(served[0]), "--programs", "2")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith(f"dontneed: against kernel {os.uname().release} and the model linux-")
    assert last.startswith("right: ")
    assert served[1].wait(20) == 0
