"""The model's event log: what each system call and fault did, in the columns of `vm.events`.

Provenance rests on it: every page keeps the id of the event that last changed it, every area likewise, and
`provenance` walks back through the entries that touched an address. Time is the sequence number (the model has no
clock). A batch of faults over a range is one entry, expanded when rows are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Entry:
    """One event, or a run of equal faults at consecutive pages (count > 1, first id `seq`)."""

    seq: int
    mm: int
    pid: int
    tid: int
    kind: str
    name: str | None
    args: tuple[int, ...]
    result: int | None = None
    addr: int | None = None
    error_code: int | None = None
    major: bool | None = None
    failed: bool | None = None
    gup: int = 0
    detail: str | None = None
    ranges: tuple[tuple[int, int], ...] = ()
    count: int = 1
    stride: int = 4096


class EventLog:
    """Entries in order. `current` is the id of the event in progress. keep: false counts ids only, for a
    replay whose events are known already."""

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.entries: list[Entry] = []
        self.seq = 0
        self.current = 0

    def add(self, entry: Entry) -> None:
        """Append; the entry's id is entry.seq."""
        if self.keep:
            self.entries.append(entry)

    def next_id(self, count: int = 1) -> int:
        """The id of the next event; makes it the current one."""
        self.current = self.seq + 1
        self.seq += count
        return self.current

    def find(self, event: int) -> Entry | None:
        """The entry that holds an event id."""
        low, high = 0, len(self.entries)
        while low < high:
            mid = (low + high) // 2
            if self.entries[mid].seq <= event:
                low = mid + 1
            else:
                high = mid
        if (
            low
            and self.entries[low - 1].seq <= event < self.entries[low - 1].seq + self.entries[low - 1].count
        ):
            return self.entries[low - 1]
        return None

    def rows(self) -> list[dict[str, object]]:
        """Rows with the columns of vm.events.EVENTS; what the model cannot know is None."""
        out: list[dict[str, object]] = []
        for e in self.entries:
            for i in range(e.count):
                out.append(
                    {
                        "seq": e.seq + i,
                        "time_ns": e.seq + i,
                        "mm": e.mm,
                        "pid": e.pid,
                        "tid": e.tid,
                        "cpu": 0,
                        "kind": e.kind,
                        "name": e.name,
                        "addr": None if e.addr is None else e.addr + i * e.stride,
                        "ip": None,
                        "user_mode": None if e.kind != "fault" else True,
                        "error_code": e.error_code,
                        "major": e.major,
                        "failed": e.failed,
                        "latency_ns": None,
                        "new_pages": None,
                        "in_syscall": None,
                        "args": list(e.args) if e.kind != "fault" else None,
                        "result": e.result,
                        "gup": e.gup if e.kind in ("syscall", "task") else None,
                        "detail": e.detail,
                        "file_dev": None,
                        "file_inode": None,
                        "stack_id": None,
                        "cause": None,
                    }
                )
        return out

    def __len__(self) -> int:
        return self.seq
