"""The directory of a capture: meta.json, the names of its parts, and what is missing.

Apart from the reader because `summary` of a capture whose figures are kept needs no more, and numpy and
pyarrow cost more than the rest of that command.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pagelens.vm.errors import DamagedInputError, UsageError

SCHEMA_VERSION = 1
META = "meta.json"
SPOOL = "spool"
RESERVE = ".reserve"  # room on the disk for the end of the recording
SUFFIXES = ("faults", "calls", "switches", "stacks", "text", "raw")  # of the files of a spool segment


class CaptureDirectory:
    """A capture, not looked into.

    path: the directory. meta: meta.json. missing: sentences on what is not there, empty for a whole capture.
    """

    def __init__(self, path: Path | str) -> None:
        """UsageError where there is nothing, DamagedInputError where it is no capture or from a newer
        pagelens.
        """
        self.path = Path(path)
        if not self.path.exists():
            raise UsageError(f"no capture at {path}")
        try:
            self.meta: dict[str, Any] = json.loads((self.path / META).read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise DamagedInputError(f"{path} is not a pagelens capture (no {META})") from None
        except (ValueError, UnicodeDecodeError):
            raise DamagedInputError(f"{path}: {META} is damaged") from None
        except PermissionError:
            raise DamagedInputError(f"{path} cannot be read: permission denied") from None
        if not isinstance(self.meta, dict) or self.meta.get("format") != "pagelens capture":
            raise DamagedInputError(f"{path} is not a pagelens capture")
        if self.meta.get("schema_version", 0) > SCHEMA_VERSION:
            raise DamagedInputError(f"{path} was written by a newer pagelens")
        self.missing = self._missing()

    def _missing(self) -> list[str]:
        missing = []
        left = segments(self.path / SPOOL)
        if self.meta.get("status") == "recording":
            missing.append("the recorder did not finish: `pagelens recover` converts what it left")
        elif left:
            missing.append(f"{len(left)} spool segments are not converted: run `pagelens recover`")
        return missing

    def parts(self, table: str) -> list[Path]:
        """The finished parts of a table, oldest first."""
        return sorted((self.path / table).glob("part-*.parquet"))


def segments(spool: Path) -> list[int]:
    """Numbers of the spool segments that are there."""
    if not spool.is_dir():
        return []
    return sorted({int(p.stem) for p in spool.iterdir() if p.stem.isdigit() and p.suffix[1:] in SUFFIXES})
