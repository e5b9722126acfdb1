"""The process of `nobody.as_nobody`: command lines as who we are, then one as nobody.

python -m support.nobody_main '[[warm command lines], [command line], uid]'
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

from pagelens.cli.main import main


def run(warm: list[list[str]], argv: list[str], uid: int) -> int:
    """The exit code of `argv`; what the others print is dropped."""
    null = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(1), os.dup(2)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for command in warm:
        main(command)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(kept[0], 1)
    os.dup2(kept[1], 2)
    if os.getuid() != uid and os.getuid() == 0:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as after an execve by that user
    return main(argv)


if __name__ == "__main__":
    sys.exit(run(*json.loads(sys.argv[1])))
