"""`run` ends as the program ends, and nothing that happens to pagelens happens to the program."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from pagelens import why
from support.pace import patience, rounds
from support.recording import SRC, assert_complete, pagelens, record
from support.subjects import Subjects

RUN = (sys.executable, "-m", "pagelens.cli.main", "run")
needs_bpf = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")


@pytest.mark.parametrize(("code", "snapshot"), [(0, "full"), (3, "full"), (125, "none"), (255, "none")])
@needs_bpf
def test_exit_codes(tmp_path: Path, code: int, snapshot: str) -> None:
    assert record(tmp_path, ["sh", "-c", f"exit {code}"], "--snapshot", snapshot).returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGABRT, signal.SIGSEGV, signal.SIGPIPE])
@needs_bpf
def test_dies_by_the_same_signal(tmp_path: Path, number: signal.Signals) -> None:
    run = record(tmp_path, ["sh", "-c", f"kill -{int(number)} $$"])
    assert run.returncode == -number
    assert_complete(run)


def test_not_found_and_not_executable(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    capture = str(tmp_path / "c.plens")
    for command, code, text in (
        ("/no/such/program", 127, "not found"),
        ("no-such-program-anywhere", 127, "not found"),
        (str(plain), 126, "not executable"),
        (str(tmp_path), 126, "not executable"),
    ):
        done = pagelens("run", "-c", capture, "--", command)
        assert (done.returncode, done.stderr) == (code, f"pagelens: {command}: {text}\n")
        assert not Path(capture).exists()


@needs_bpf
def test_bad_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    run = record(tmp_path, [script])
    assert run.returncode == 127
    assert run.stderr == f"pagelens: {script}: its interpreter /no/such/interpreter is missing\n"
    assert not run.path.exists()


@needs_bpf
def test_script_without_interpreter_line(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo from-sh $1\n")
    script.chmod(0o755)
    run = record(tmp_path, [script, "arg"])
    assert (run.returncode, run.stdout) == (0, "from-sh arg\n")


def test_capture_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "c.plens").mkdir()
    done = pagelens("run", "-c", str(tmp_path / "c.plens"), "--", "true")
    assert done.returncode == 125
    assert done.stderr.startswith("pagelens: ") and "--force" in done.stderr
    done = pagelens("run", "--force", "-c", str(tmp_path / "c.plens"), "--", "true")
    assert done.returncode == 125
    assert "not a capture" in done.stderr


def test_no_privilege(tmp_path: Path) -> None:
    # As nobody, with the method that needs root: one sentence, 125, and the program was not started. (What `auto`
    # does then is tested in test_recorder_perf.)
    if os.getuid():
        pytest.skip("missing capability: root")
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    code = (
        # Imported first: nobody may not read the interpreter's files everywhere.
        "import os, sys, locale, gettext, pyarrow.parquet, pagelens.cli.main, pagelens.cli.run;"
        "import pagelens.capture.recorder, pagelens.capture.summary;"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "from pagelens.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    marker = tmp_path / "started"
    run = ("run", "--method", "bpf", "-c", str(tmp_path / "c.plens"), "--", "touch", str(marker))
    done = subprocess.run(
        [sys.executable, "-c", code, *run],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    assert done.returncode == 125, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("pagelens: ")
    assert not marker.exists()


@needs_bpf
def test_standard_streams(tmp_path: Path) -> None:
    run = record(tmp_path, ["sh", "-c", "cat; echo err >&2"], input="through\n")
    assert run.stdout == "through\n"
    assert run.stderr.startswith("err\n")


@needs_bpf
def test_ctrl_c_reaches_the_program_and_the_report_still_comes(tmp_path: Path) -> None:
    summary = tmp_path / "s.json"
    # The terminal's Ctrl-C ends the sleep as well, so the shell sees its own at once.
    program = "trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 5; done"
    child = subprocess.Popen(
        [*RUN, "-c", str(tmp_path / "c.plens"), "--summary-json", str(summary), "--", "sh", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
        process_group=0,
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (7, "caught\n")
    assert "unexplained 0" in err
    assert json.loads(summary.read_text())["complete"]


def _ended(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@needs_bpf
def test_the_terminal_is_the_programs(tmp_path: Path) -> None:
    program = (
        'tty; stty size; [ "$(ps -o pgid= -p $$)" = "$(ps -o tpgid= -p $$)" ] && echo foreground; read line;'
        ' echo "got $line"; trap "echo interrupted; exit 5" INT; echo ready; while :; do sleep 0.1; done'
    )
    command = [*RUN, "-c", str(tmp_path / "c.plens"), "--", "sh", "-c", program]
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (33, 99))
    name = os.ttyname(theirs)
    child = os.fork()
    if not child:
        os.login_tty(theirs)
        os.execvpe(command[0], command, {**os.environ, "PYTHONPATH": str(SRC)})
    os.close(theirs)
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 0.2)[0]:
                seen += os.read(ours, 4096)

    try:
        until(b"foreground\r\n")
        os.write(ours, b"a line\n")
        until(b"ready")
        os.write(ours, b"\x03")
        until(b"next  ")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    finally:
        os.close(ours)
    lines = seen.decode().splitlines()
    assert lines[:3] == [name, "33 99", "foreground"]
    assert "got a line" in lines and any(line.endswith("interrupted") for line in lines)
    assert any("unexplained 0" in line for line in lines)


@needs_bpf
def test_killing_pagelens_harms_nobody(tmp_path: Path, subjects: Subjects) -> None:
    # At random moments, in all modes; the program must end as alone, with the same output, untraced.
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    program = (
        "import os, sys, hashlib\n"
        "h = hashlib.sha256()\n"
        "for i in range(60):\n"
        "    x = bytearray(300000); x[::4096] = bytes([i % 251]) * len(x[::4096]); h.update(x)\n"
        "    if i % 10 == 0:\n"
        "        pid = os.fork()\n"
        "        if pid == 0: os._exit(i % 7)\n"
        "        h.update(bytes([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]))\n"
        "tracer = [l for l in open('/proc/self/status') if l.startswith('TracerPid')][0].split()[1]\n"
        "open(sys.argv[1], 'w').write(h.hexdigest())\n"
    )
    alone = tmp_path / "alone"
    subprocess.run([sys.executable, "-c", program, str(alone)], check=True)
    for trial in range(rounds(4, 2)):
        out = tmp_path / f"out{trial}"
        capture = tmp_path / f"c{trial}.plens"
        started = tmp_path / f"pid{trial}"
        shell = f'echo $$ > {started}; exec {sys.executable} -c "$0" {out}'
        mode = rng.choice(["none", "full"])
        child = subprocess.Popen(
            [*RUN, "-c", str(capture), "--snapshot", mode, "--", "sh", "-c", shell, program],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(SRC)},
        )
        deadline = time.monotonic() + patience(20)
        while not (started.exists() and started.read_text().endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.005)
        pid = int(started.read_text())
        time.sleep(rng.random() * 0.3)
        child.kill()
        child.wait()
        while time.monotonic() < deadline and not _ended(pid):
            time.sleep(0.01)
        assert out.read_text() == alone.read_text(), f"seed {seed}"
        if capture.exists():
            done = pagelens("recover", str(capture), "--format", "json")
            assert done.returncode == 0, done.stderr
            assert pagelens("summary", str(capture)).returncode == 0


@needs_bpf
@pytest.mark.parametrize("size", ["300k", "3m"])
def test_full_disk_stops_the_recording_not_the_program(tmp_path: Path, subjects: Subjects, size: str) -> None:
    """What fits is kept; what is lost is known afterwards too, and not forgotten by `recover`."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", small], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("missing capability: mount")
    try:
        summary = tmp_path / "s.json"
        done = pagelens(
            "run",
            "-c",
            str(small / "c.plens"),
            "--summary-json",
            str(summary),
            "--",
            str(subjects("toucher")),
            "100000",
        )
        assert done.returncode == 0
        assert done.stdout.startswith("0x")
        found = json.loads(summary.read_text())
        assert found["status"] == "disk full" and not found["complete"]
        assert found["faults"]["lost"] > 0
        assert found["faults"]["unexplained"] == 0
        assert "Traceback" not in done.stderr
        assert found["faults"]["recorded"] > 1000
        later = pagelens("summary", str(small / "c.plens"), "--format", "json")
        assert json.loads(later.stdout)["faults"] == found["faults"], later.stderr
        elsewhere = tmp_path / "copy.plens"
        shutil.copytree(small / "c.plens", elsewhere)
        again = pagelens("recover", str(elsewhere))
        assert again.returncode == 0, again.stderr
        faults = json.loads(pagelens("summary", str(elsewhere), "--format", "json").stdout)["faults"]
        assert faults["recorded"] + faults["lost"] == found["faults"]["recorded"] + found["faults"]["lost"]
        assert faults["recorded"] >= found["faults"]["recorded"]
        assert faults["counted_minor"] == found["faults"]["counted_minor"] and faults["unexplained"] == 0
    finally:
        subprocess.run(["umount", small], check=True)


@needs_bpf
def test_max_size_keeps_the_newest(tmp_path: Path, subjects: Subjects) -> None:
    program = f"for i in 1 2 3 4; do {subjects('toucher')} 20000 >/dev/null; sleep 0.9; done"
    run = record(tmp_path, ["sh", "-c", program], "--max-size", "200K", "--snapshot", "none")
    events = sorted((run.path / "events").iterdir())
    assert sum(p.stat().st_size for p in events) < 600_000
    (note,) = (row["note"] for row in run.capture.table("losses").to_pylist() if row["what"] == "max-size")
    assert "--max-size" in note
    kept = len(run.rows("kind = 'fault' and not failed"))
    assert f"{run.faults['recorded'] - kept:,} faults among them" in note
    assert run.faults["unexplained"] == 0 and run.faults["lost"] == 0
    assert (run.summary["status"], run.summary["complete"]) == ("partial", False)


@needs_bpf
@pytest.mark.parametrize("snapshot", ["none", "full"])
def test_causes_that_rest_on_dropped_events_stay_open(tmp_path: Path, snapshot: str) -> None:
    # One mapping, made at the start, over and over emptied and touched again: what is left of the events shows writes
    # to absent pages, and neither the mmap nor that the pages had been there before.
    program = (
        "import mmap, time\n"
        "m = mmap.mmap(-1, 80 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "for round in range(6):\n"
        "    for i in range(0, 80 << 20, 4096): m[i] = 1\n"
        "    time.sleep(0.7)\n"
        "    if round < 3: m.madvise(mmap.MADV_DONTNEED)\n"
    )
    run = record(tmp_path, [sys.executable, "-c", program], "--max-size", "150K", "--snapshot", snapshot)
    assert not run.summary["complete"]
    mapped = run.rows("kind = 'syscall' and name = 'mmap' and args[2] = 83886080")
    dropped = run.rows("kind = 'syscall' and name = 'madvise' and args[3] = 4 and args[2] = 83886080")
    assert not mapped, "nothing was dropped: the test shows nothing"
    result = why.classify(run.capture)
    faults = result.run.faults
    causes = {
        result.of(row).cause
        for row in range(len(faults))
        if not dropped or faults.time[row] < dropped[0]["time_ns"]
    }
    assert causes <= {"ambiguous", "unknown", "kernel-access"}, causes
    assert all(
        "--max-size" in j.verdict.why
        for j in result.judgements
        if j.verdict.cause in ("ambiguous", "unknown")
    )
