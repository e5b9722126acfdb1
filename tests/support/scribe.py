"""The subject `scribe`: starts it, and checks the bytes of any instant of it against its own invariant."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np

MASK = np.uint64(2**64 - 1)
FIXED = ("hidden", "locked", "shared_a", "shared_b", "copied", "zero", "guard", "huge", "untouched")
Read = Callable[[int, int], bytes]


def _mix(t: int, page: np.ndarray, version: np.ndarray, word: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = np.uint64((t + 1) * 0x9E3779B97F4A7C15 & 2**64 - 1) ^ (page + np.uint64(1)) * np.uint64(
            0xC2B2AE3D27D4EB4F
        )
        x = x ^ version * np.uint64(0x165667B19E3779F9) ^ word
        return x * np.uint64(0xD6E8FEB86659FD93)


class Scribe:
    """The running program. Context manager; killed at the end."""

    def __init__(
        self, program: Path, threads: int, pages: int, file: Path | None = None, *, pause_us: int = 0
    ) -> None:
        self.threads, self.pages = threads, pages
        # Niced: it writes all the time, on the cores that the checkpoints need too.
        command = ["nice", "-n", "19", str(program), str(threads), str(pages)] + ([str(file)] if file else [])
        command += [str(pause_us)] if pause_us else []
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.child.stdout is not None
        word, address = self.child.stdout.readline().split()
        assert word == "ready"
        self.control = int(address, 16)
        self.pid = self.child.pid

    def check(self, read: Read) -> int:
        """Assert that memory, read by `read(addr, length)`, is that of one instant. Returns the steps
        done."""
        control = np.frombuffer(read(self.control, 8 * (2 + 6 * 8 + 10)), np.uint64)
        assert control[:2].tolist() == [self.threads, self.pages]
        steps = 0
        for t in range(self.threads):
            page, word, done, _, base, versions = (int(x) for x in control[2 + 6 * t : 8 + 6 * t])
            steps += done
            version = np.frombuffer(read(versions, 8 * self.pages), np.uint64)
            found = np.frombuffer(read(base, 4096 * self.pages), np.uint64).reshape(self.pages, 512)
            number = np.arange(self.pages, dtype=np.uint64)[:, None]
            words = np.arange(512, dtype=np.uint64)[None, :]
            old = _mix(t, number, version[:, None], words)
            wrong = np.unique(np.nonzero(found != old)[0]).tolist()
            settled = bool(page >> 63)
            page &= 2**63 - 1
            if settled:  # this page is complete in one version or the next
                if wrong:
                    assert wrong == [page], f"thread {t}: pages {wrong} are of no version (between pages)"
                    new = _mix(t, number[page], version[page] + np.uint64(1), words[0])
                    assert (found[page] == new).all(), f"thread {t}: page {page} mixes versions"
                continue
            assert set(wrong) <= {page}, f"thread {t}: pages {wrong} are wrong, {page} is being written"
            new = _mix(t, number[page], version[page] + np.uint64(1), words[0])
            # word = 0 is stored before page, so the page may not have been begun; words below are new.
            assert (found[page, :word] == new[:word]).all(), (
                f"thread {t}: page {page} lacks words below {word}"
            )
            assert (found[page, word + 1 :] == old[page, word + 1 :]).all(), (
                f"thread {t}: page {page} is ahead"
            )
            if word < 512:
                assert found[page, word] in (new[word], old[page, word])
        return steps

    def fixed(self, read: Read) -> dict[str, int]:
        """Addresses of the memory of other sorts, by name, plus fixed_pages."""
        tail = np.frombuffer(read(self.control + 8 * (2 + 6 * 8), 80), np.uint64).tolist()
        return dict(zip(("fixed_pages", *FIXED), tail, strict=True))

    def __enter__(self) -> Scribe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.child.kill()
        self.child.wait()
        assert self.child.stdout is not None
        self.child.stdout.close()


def process_state(pid: int) -> tuple[str, int]:
    """(State letter, TracerPid) of a process: a target must come out of everything with TracerPid 0."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return fields["State"].split()[0], int(fields["TracerPid"])
