"""Run the command line as an ordinary user, from tests that run as root.

The interpreter may live where other users may not read (a home directory): the command is run once as root in
the same process, so that every late import is done, and then once more after setuid.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NOBODY = 65534

_CODE = """
import ctypes, json, os, sys
from pagelens.cli.main import main
warm, argv, uid = json.loads(sys.argv[1])
null = os.open(os.devnull, os.O_WRONLY)
kept = os.dup(1), os.dup(2)
os.dup2(null, 1), os.dup2(null, 2)
for command in warm:
    main(command)
sys.stdout.flush(), sys.stderr.flush()
os.dup2(kept[0], 1), os.dup2(kept[1], 2)
if os.getuid() != uid and os.getuid() == 0:
    os.setgroups([]), os.setgid(uid), os.setuid(uid)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as after an execve by that user
sys.exit(main(argv))
"""


def as_nobody(
    argv: Sequence[str], warm: Sequence[Sequence[str]], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """The command line `argv` without privilege (as it is, if the tests have none). warm: command lines that
    import the same modules, run before as who we are; their output is dropped."""
    cwd.chmod(0o777)
    return subprocess.run(
        [sys.executable, "-c", _CODE, json.dumps([list(map(list, warm)), list(argv), NOBODY])],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=cwd,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "PAGELENS_TRACEBACK": "1"},
    )
