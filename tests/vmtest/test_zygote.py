"""A command that the zygote runs is, to its caller, the process that Popen would have started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# In a process of its own: it changes Popen for good.
PROGRAM = """
import json, os, signal, subprocess, sys
from pathlib import Path
from vmtest import zygote

zygote.install()
run = [sys.executable, "-m", "pagelens.cli.main"]


def exe(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\\0")


done = subprocess.run([*run, "--version"], capture_output=True, text=True)
assert (done.returncode, done.stdout[:9], done.stderr) == (0, "pagelens ", ""), done
done = subprocess.run([*run, "no-such-command"], capture_output=True, text=True)
assert done.returncode == 2 and done.stdout == "" and "no command" in done.stderr, done
# A relative path is the caller's; so are the environment and a descriptor that is passed on.
Path("here").mkdir()
read, write = os.pipe()
with subprocess.Popen(
    [*run, "run", "-q", "-c", "x.plens", "--", "sh", "-c", f'echo $MARK $PPID >&{write}; cat; exit 3'],
    cwd="here", env={**os.environ, "MARK": "seen"}, pass_fds=[write], stdin=subprocess.PIPE,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
) as child:
    os.close(write)
    assert b"vmtest.zygote" in exe(child.pid), exe(child.pid)
    assert os.getsid(child.pid) == child.pid
    status = Path(f"/proc/{child.pid}/status").read_text()
    assert f"PPid:\\t{os.getpid()}" in status
    out, err = child.communicate("words")
    assert (out, child.returncode) == ("words", 3), (out, err)
    assert os.fdopen(read).read().split()[0] == "seen"
    assert Path("here/x.plens").is_dir()
# What it cannot serve is started as ever.
with subprocess.Popen([*run, "--version"], preexec_fn=os.setpgrp, stdout=subprocess.DEVNULL) as child:
    assert child.wait() == 0
# It waits for its program, which ends with its input.
with subprocess.Popen(
    [*run, "run", "-c", "y.plens", "--", "cat"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0
) as child:
    assert b"vmtest.zygote" in exe(child.pid), exe(child.pid)
    assert os.getpgid(child.pid) == child.pid
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -9
print("all as it should be")
"""


def test_a_command_is_its_callers_child(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tools'}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.stdout == "all as it should be\n", done.stderr
    assert done.returncode == 0
