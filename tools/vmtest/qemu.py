"""One virtual machine: qemu with TCG, two CPUs on two NUMA nodes, four ports, three time limits.

Ports (virtio-serial): `control` carries the guest's signs of life and the command's exit code, `stdout` and
`stderr` its output, `results.port` a tar of what it left in $VMTEST_RESULTS. The kernel's console goes to a
file.
"""

from __future__ import annotations

import os
import selectors
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from vmtest import image, newer, tsc
from vmtest.errors import VmtestError
from vmtest.fetch import Kernel
from vmtest.rootfs import root_image
from vmtest.verdict import Verdict, judge

# Set when the run is to end early (Ctrl-C): every guest is then ended at once.
stop = threading.Event()
PORTS = ("control", "stdout", "stderr")


# Without what emulation pays for and no test asks for: SMAP ends a translated block at each access to user memory (a
# system call costs twice as much), and where strings are "fast" the kernel copies and clears byte by byte.
CPU = "max,erms=off,fsrm=off,smap=off,smep=off,umip=off"
# The same in the kernel: memory cleared once more on each allocation, checks of every copy, a random stack offset.
LIGHT = "init_on_alloc=0 hardened_usercopy=off randomize_kstack_offset=off "


def emulator() -> list[str]:
    """How to start qemu; fetched when it is not here yet."""
    _, tree = newer.tree("qemu-system-x86")
    share = tree / "usr/share"
    return [
        *newer.command(tree, "usr/bin/qemu-system-x86_64"),
        *("-L", str(share / "qemu"), "-L", str(share / "seabios")),
    ]


@dataclass
class Machine:
    """What a guest gets. Times in seconds, memory in MiB; a limit reached ends the guest and is said."""

    kernel: Kernel
    command: list[str]
    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    memory: int = 3072
    boot_limit: float = 180.0
    boots: int = 3
    limit: float = 900.0
    silence: float = 60.0
    append: str = ""
    five_levels: bool = False  # of page tables (la57)
    port: Path | None = None  # a Unix socket that becomes the port `extra` of the guest


def run(
    machine: Machine,
    out: Callable[[bytes], object],
    err: Callable[[bytes], object],
    results: Path | None = None,
) -> Verdict:
    """Boots, runs the command, streams its output to `out` and `err`, unpacks its results, judges the end."""
    for attempt in range(machine.boots):
        with tempfile.TemporaryDirectory(prefix="vmtest-") as name:
            verdict = _Run(machine, Path(name), out, err).finish(results)
        # Before its command runs, a guest's end says nothing of what was to be tested: qemu failed, or a machine too
        # busy to boot it in time. It is said, and tried again.
        if verdict.boot_s is not None or stop.is_set() or attempt == machine.boots - 1:
            break
        err(f"vmtest: boot failed, once more: {verdict.report(3)}\n".encode())
    return verdict


class _Run:
    def __init__(
        self, machine: Machine, scratch: Path, out: Callable[[bytes], object], err: Callable[[bytes], object]
    ) -> None:
        self._machine = machine
        self._scratch = scratch
        self._sinks = {"stdout": out, "stderr": err, "control": self._control}
        self._line = b""
        self._code: int | None = None
        self._boot: float | None = None
        self._heard = 0.0
        self._begin = 0.0

    def _command(self) -> list[str]:
        m, s = self._machine, self._scratch
        image.initramfs(m.kernel, s / "initramfs")
        (s / "stage").mkdir()
        image.work_disk(m.root, m.kernel, m.command, m.environment, s / "stage", s / "work.ext4")
        half = m.memory // 2
        # maxcpus=1: the second CPU comes once the PCI devices are set up (guest/init), because qemu's other CPUs may
        # trip over a memory map that changes (iotlb_to_section's assertion).
        # panic=-1 with -no-reboot: a panic ends qemu at once. The watchdogs' figures suit emulation.
        append = (
            "console=ttyS0 loglevel=5 panic=-1 oops=panic mitigations=off nokaslr random.trust_cpu=on "
            f"tsc=reliable tsc_early_khz={tsc.khz()} no_timer_check rcupdate.rcu_cpu_stall_timeout=30 "
            "apparmor=0 selinux=0 audit=0 maxcpus=1 noreplace-smp "
            f"vmtest.ports={len(PORTS) + 1 + (m.port is not None)} " + LIGHT + m.append
        )
        cpu = f"{CPU},la57={'on' if m.five_levels else 'off'}"
        # It goes when we go, even by SIGKILL.
        command = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        command += [
            *emulator(), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", cpu, "-smp", "2,sockets=2",
            "-m", f"{m.memory}M",
            "-object", f"memory-backend-ram,id=m0,size={half}M", "-numa", "node,nodeid=0,cpus=0,memdev=m0",
            "-object", f"memory-backend-ram,id=m1,size={half}M", "-numa", "node,nodeid=1,cpus=1,memdev=m1",
            "-kernel", str(m.kernel.image), "-initrd", str(s / "initramfs"), "-append", append,
            "-serial", f"file:{s / 'console'}", "-device", "virtio-serial-pci,max_ports=6",
            "-drive", f"file={root_image()},if=virtio,format=raw,snapshot=on,cache=unsafe",
            "-drive", f"file={s / 'work.ext4'},if=virtio,format=raw,snapshot=on,cache=unsafe",
        ]  # fmt: skip
        for port in PORTS:
            command += ["-chardev", f"socket,id={port},path={s / port}"]
            command += ["-device", f"virtserialport,chardev={port},name={port}"]
        command += ["-chardev", f"file,id=results,path={s / 'results.tar'}"]
        command += ["-device", "virtserialport,chardev=results,name=results.port"]
        if m.port is not None:
            command += ["-chardev", f"socket,id=extra,path={m.port},server=on,wait=off"]
            command += ["-device", "virtserialport,chardev=extra,name=extra"]
        return command

    def _control(self, data: bytes) -> None:
        self._heard = time.monotonic()
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "ready":
                self._boot = self._heard - self._begin
            elif word == "exit":
                self._code = int(rest)

    def finish(self, results: Path | None) -> Verdict:
        listeners = {}
        for port in PORTS:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self._scratch / port))
            listener.listen(1)
            listeners[port] = listener
        command = self._command()
        self._begin = self._heard = time.monotonic()
        with (self._scratch / "qemu.err").open("wb") as errors:
            # Its own group: a Ctrl-C reaches us, and we end it.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
                env=os.environ | {"TMPDIR": str(self._scratch)},
            )
        try:
            silent, timed_out = self._watch(process, listeners)
        finally:
            process.kill()
            process.wait()
            for listener in listeners.values():
                listener.close()
        return self._judge(silent, timed_out, results)

    def _watch(
        self, process: subprocess.Popen[bytes], listeners: dict[str, socket.socket]
    ) -> tuple[float | None, bool]:
        m = self._machine
        open_ports = 0
        with selectors.DefaultSelector() as selector:
            for port, listener in listeners.items():
                selector.register(listener, selectors.EVENT_READ, (port, True))
            while True:
                for key, _ in selector.select(0.25):
                    port, listening = key.data
                    source: socket.socket = key.fileobj  # type: ignore[assignment]
                    if listening:
                        connection, _ = source.accept()
                        selector.register(connection, selectors.EVENT_READ, (port, False))
                        open_ports += 1
                        continue
                    data = source.recv(65536)
                    if data:
                        self._sinks[port](data)
                    else:
                        selector.unregister(source)
                        source.close()
                        open_ports -= 1
                if stop.is_set():
                    return None, False
                now = time.monotonic()
                # All that qemu sent has been read once its ends of the ports are closed.
                if process.poll() is not None and open_ports <= 0:
                    return None, False
                if self._code is not None and now - self._heard > 10:
                    return None, False  # it said its exit code, yet does not power off
                if self._boot is None:
                    if now - self._begin > m.boot_limit:
                        return None, True
                elif now - self._heard > m.silence:
                    return now - self._heard, False
                elif now - self._begin > m.limit:
                    return None, True

    def _judge(self, silent: float | None, timed_out: bool, results: Path | None) -> Verdict:
        total = time.monotonic() - self._begin
        log = self._scratch / "console"
        console = log.read_text(errors="replace").replace("\r", "") if log.exists() else ""
        said = (self._scratch / "qemu.err").read_text(errors="replace").strip()
        if not console and said:
            raise VmtestError(f"qemu failed: {said.splitlines()[-1]}")
        ready = self._boot is not None
        end, detail = judge(
            code=self._code,
            ready=ready,
            silent_s=silent,
            timed_out=timed_out,
            limit_s=self._machine.limit if ready else self._machine.boot_limit,
            console=console,
        )
        if results is not None:
            _unpack(self._scratch / "results.tar", results)
        return Verdict(
            end, self._code, detail, self._boot, total, console + (f"\nqemu: {said}" if said else "")
        )


def _unpack(archive: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    if archive.exists() and archive.stat().st_size:
        file: BinaryIO
        with archive.open("rb") as file, tarfile.open(fileobj=file) as tar:
            tar.extractall(into, filter="data")
