"""`pagelens model` as a user runs it: output, exit codes, errors, without privilege."""

import json
import os
import pty
import signal
import subprocess
import sys

import jsonschema
import pytest

from pagelens.cli.model import nearest_profile
from support.cli import ROOT, SCHEMAS, pagelens

COW = ROOT / "tests/model/scenarios/cow-fork.plscn"


def schema(name):
    return json.loads((SCHEMAS / name).read_text())


def piped(text, *args):
    return subprocess.run(
        [sys.executable, "-m", "pagelens.cli.main", "model", *args],
        input=text, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def test_run_prints_each_step_and_what_is_asked_for():
    done = pagelens("model", "run", COW, "--kernel", "linux-6.1", "--show", "maps", "--show", "tables")
    assert done.returncode == 0, done.stderr
    assert "model linux-6.1: Copy-on-write" in done.stdout
    assert "expect faults 1" in done.stdout
    assert "NO:" not in done.stdout
    assert "-- maps" in done.stdout
    assert "pgd[" in done.stdout


def test_tables_show_every_entry(tmp_path):
    """One line for the entries of a table that are alike and whose frames follow each other."""
    file = tmp_path / "a.plscn"
    file.write_text(
        "r = mmap 700 at arena[100] rw private anon fixed\nread r[0:600]\nwrite r[2:10]\nwrite r[21]\nwrite r[20]\n"
        "mprotect r[3:5] r\nmmap 2 at arena[20] r private anon fixed\n"
    )
    done = pagelens("model", "run", str(file), "--kernel", "linux-6.18", "--show", "tables")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "pgd[" in line]
    upper = "pgd[31] > pud[511] > pmd[511] > "
    own = "present writable accessed dirty anonymous"
    assert lines == [
        f"0fffffe14000 {upper}pte[20] empty",
        f"0fffffe64000 {upper}pte[100:102]: zero page, present accessed",
        f"0fffffe66000 {upper}pte[102]: frame 0x1000, {own}",
        f"0fffffe67000 {upper}pte[103:105]: frames 0x1001-0x1002, present accessed dirty anonymous",
        f"0fffffe69000 {upper}pte[105:110]: frames 0x1003-0x1007, {own}",
        f"0fffffe6e000 {upper}pte[110:120]: zero page, present accessed",
        f"0fffffe78000 {upper}pte[120]: frame 0x1009, {own}",
        f"0fffffe79000 {upper}pte[121]: frame 0x1008, {own}",
        f"0fffffe7a000 {upper}pte[122:512]: zero page, present accessed",
        "100000000000 pgd[32] > pud[0] > pmd[0] > pte[0:188]: zero page, present accessed",
    ]


def test_run_json():
    done = pagelens("model", "run", COW, "--format", "json", "--show", "events")
    value = json.loads(done.stdout)
    jsonschema.validate(value, schema("model-run.json"))
    assert value["failed"] == 0
    assert value["steps"][1]["faults"] == 4


def test_an_expectation_that_fails_is_shown_and_exits_1(tmp_path):
    file = tmp_path / "bad.plscn"
    file.write_text("a = mmap 2 rw private anon\nwrite a[0]\nexpect faults 7\n")
    done = pagelens("model", "run", file)
    assert done.returncode == 1
    assert "NO: 1 faults" in done.stdout
    done = pagelens("model", "verify", file)
    assert done.returncode == 1
    assert "line 3: expect faults 7: the kernel has 1 faults" in done.stdout


def test_a_bad_scenario_names_line_and_cause(tmp_path):
    file = tmp_path / "bad.plscn"
    file.write_text("a = mmap 2 rw private anon\nwrit a[0]\n")
    done = pagelens("model", "run", file)
    assert done.returncode == 5
    assert f"{file}, line 2: no operation 'writ', did you mean 'write'?" in done.stderr
    assert pagelens("model", "run", tmp_path / "none").returncode == 2
    assert pagelens("model", "run", COW, "--kernel", "linux-0.1").returncode == 2


@pytest.mark.parametrize("nobody", [False, True])
def test_verify_on_this_kernel(nobody):
    done = pagelens("model", "verify", COW, "--format", "json", nobody=nobody)
    assert done.returncode == 0, done.stdout + done.stderr
    value = json.loads(done.stdout)
    jsonschema.validate(value, schema("model-proof.json"))
    assert (value["disagreements"], value["operations"]) == (0, 8)


def test_fuzz_json_and_the_same_seed_twice():
    args = ("model", "fuzz", "--seed", 11, "--ops", 300, "--processes", 2, "--format", "json")
    one, two = pagelens(*args), pagelens(*args)
    assert one.returncode == 0, one.stdout + one.stderr
    value = json.loads(one.stdout)
    jsonschema.validate(value, schema("model-proof.json"))
    assert value == json.loads(two.stdout)
    assert (value["seed"], value["disagreements"], value["scenario"]) == (11, 0, None)
    assert value["operations"] >= 300


def test_an_interrupted_campaign_says_what_was_done():
    """SIGINT amid a program: the summary of all that was compared, exit code 130, no child left."""
    command = [
        sys.executable,
        "-m",
        "pagelens.cli.main",
        "model",
        "fuzz",
        "--ops",
        "1000000000",
        "--format",
        "json",
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as child:
        line = child.stderr.readline()
        assert " of 1,000,000,000 operations, 0 disagreements" in line
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    value = json.loads(out)
    jsonschema.validate(value, schema("model-proof.json"))
    assert (child.returncode, value["interrupted"], value["disagreements"]) == (130, True, 0), err
    assert value["operations"] >= int(line.split()[0].replace(",", ""))


def test_fuzz_against_a_wrong_profile_leaves_a_scenario_that_fails_again(tmp_path):
    wrong = "linux-6.1" if nearest_profile_here() != "linux-6.1" else "linux-7.2"
    kept = tmp_path / "kept.plscn"
    done = pagelens("model", "fuzz", "--seed", 1, "--profile", wrong, "--save", kept, "--format", "json")
    assert done.returncode == 1
    value = json.loads(done.stdout)
    assert value["scenario"] == kept.read_text()
    assert pagelens("model", "verify", kept, "--profile", wrong).returncode == 1
    assert pagelens("model", "verify", kept).returncode == 0
    assert pagelens("model", "fuzz", "--seed", 1, "--profile", wrong, "--save", kept).returncode == 2


def nearest_profile_here():
    import platform

    return nearest_profile(platform.release())


def test_nearest_profile():
    assert nearest_profile("6.18.44-fc") == "linux-6.18"
    assert nearest_profile("6.15.1") == "linux-6.12"
    assert nearest_profile("5.4.0") == "linux-6.1"
    assert nearest_profile("9.0-rc1") == "linux-7.2"


def test_step_tells_a_fault_in_stages():
    done = piped("a = mmap 2 rw private anon\nread a[0]\nwrite a[0]\nwrite a[7]\nmaps\n", "step")
    assert done.returncode == 0, done.stderr
    stages = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    first = stages[stages.index("access") :][:8]
    assert first == ["access", "walk", "error", "vma", "permission", "walk", "result", "changed"]
    assert "zero page" in done.stdout
    assert "0x7: write, user; page present" in done.stdout
    assert "SEGV_MAPERR" in done.stdout


def test_step_from_a_pipe_reports_nonsense_and_goes_on():
    done = piped("nonsense\nwrite ghost[0]\na = mmap 1 rw private anon\n", "step", "--kernel", "linux-6.1")
    assert done.returncode == 5
    assert "? no operation 'nonsense'" in done.stdout
    assert "names something that does not exist" in done.stdout
    assert "rw-p" in done.stdout


def on_terminal(*lines):
    """`model step` on a terminal; each line is typed when the one before was read. Its output and exit code."""
    pid, fd = pty.fork()
    if not pid:
        os.environ["PYTHONPATH"] = str(ROOT / "src")
        os.execv(sys.executable, [sys.executable, "-m", "pagelens.cli.main", "model", "step"])
    out = b""
    todo = list(lines)
    try:
        while True:
            if todo and (out.endswith(b"> ") or out.endswith(b"(Enter) ")):
                os.write(fd, todo.pop(0))
            try:
                data = os.read(fd, 4096)
            except OSError:  # EIO: the other end is closed
                break
            if not data:
                break
            out += data
    finally:
        os.close(fd)
    return out.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_step_on_a_terminal_waits_at_each_stage_and_ends_with_its_input():
    out, code = on_terminal(b"a = mmap 1 rw private anon\n", b"read a[0]\n", b"\n", b"\n", b"\4", b"\4")
    assert code == 0
    assert out.count("(Enter)") == 3
    assert "the zero page, read-only" in out
    assert "bug" not in out


def test_step_says_where_expectations_belong():
    done = piped("a = mmap 1 rw private anon\nexpect faults 0\n", "step")
    assert "expectations are for scenarios" in done.stdout
    assert done.returncode == 5
