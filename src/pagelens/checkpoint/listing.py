"""The vma list with flags, of a process that is held, without reading smaps there if it can be helped.

maps is quick; smaps, which alone has the flags, walks every page. So smaps is read before the process is held, and
while it is, only maps: where its text is as it was, nothing is even parsed. Only where a vma is not among those that
are known, smaps is read again.
"""

from __future__ import annotations

from pagelens.linux import maps, smaps
from pagelens.linux.procfs import Process
from pagelens.vm.vma import Vma, VmaList


class Listing:
    """What is known of a process's vma list from the last reading. Errors of `now` and `ahead` as maps.read."""

    def __init__(self, proc: Process) -> None:
        self._proc = proc
        self._text: bytes | None = None  # of maps, where it says the same as `vmas`
        self._known: dict[Vma, Vma] = {}  # without flags -> with
        self.vmas = VmaList()

    def ahead(self) -> None:
        """Before the process is held: read what is not known yet."""
        if self._proc.read("maps") == self._text:
            return
        self._set(smaps.read(self._proc)[0])
        text = self._proc.read("maps")
        if all(vma in self._known for vma in maps.parse(text)):
            self._take(text)

    def now(self) -> VmaList:
        """While it is held: the list as it is. Flags of a vma that is otherwise as it was are taken to be the same."""
        text = self._proc.read("maps")
        if text != self._text:
            if not all(vma in self._known for vma in maps.parse(text)):
                self._set(smaps.read(self._proc)[0])
            self._take(text)
        return self.vmas

    def _set(self, vmas: VmaList) -> None:
        self._known = {vma.replaced(vm_flags=None): vma for vma in vmas}

    def _take(self, text: bytes) -> None:
        self._text = text
        self.vmas = VmaList(self._known[vma] for vma in maps.parse(text))
