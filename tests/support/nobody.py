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


def as_nobody(
    argv: Sequence[str], warm: Sequence[Sequence[str]], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """The command line `argv` without privilege (as it is, if the tests have none). warm: command lines that
    import the same modules, run before as who we are; their output is dropped."""
    cwd.chmod(0o777)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "support.nobody_main",
            json.dumps([list(map(list, warm)), list(argv), NOBODY]),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=cwd,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "PAGELENS_TRACEBACK": "1"},
    )
