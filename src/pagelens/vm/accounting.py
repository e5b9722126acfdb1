"""Accounting: the fields of smaps, per vma and in all, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# In the order in which fs/proc/task_mmu.c (__show_smap) prints them; KSM is absent in 6.1.
SMAPS_FIELDS: tuple[str, ...] = (
    "Size",
    "KernelPageSize",
    "MMUPageSize",
    "Rss",
    "Pss",
    "Pss_Dirty",
    "Shared_Clean",
    "Shared_Dirty",
    "Private_Clean",
    "Private_Dirty",
    "Referenced",
    "Anonymous",
    "KSM",
    "LazyFree",
    "AnonHugePages",
    "ShmemPmdMapped",
    "FilePmdMapped",
    "Shared_Hugetlb",
    "Private_Hugetlb",
    "Swap",
    "SwapPss",
    "Locked",
)

# What each field means to a reader (`diff --explain`, docs/glossary).
SMAPS_MEANING: dict[str, str] = {
    "Size": "address space that the vma spans, touched or not",
    "KernelPageSize": "page size that the kernel uses for the vma's accounting",
    "MMUPageSize": "page size of the hardware mapping",
    "Rss": "pages present in memory and mapped here, whoever shares them",
    "Pss": "Rss with each page divided by the number of its mappings",
    "Pss_Dirty": "the dirty part of Pss",
    "Shared_Clean": "present, mapped more than once, not modified",
    "Shared_Dirty": "present, mapped more than once, modified",
    "Private_Clean": "present, mapped only here, not modified since read from its file",
    "Private_Dirty": "present, mapped only here, modified: freed memory if this process goes",
    "Referenced": "present and marked accessed",
    "Anonymous": "present and not backed by a file: heap, stack, copied private file pages",
    "KSM": "pages merged by KSM",
    "LazyFree": "marked by MADV_FREE: freed under pressure unless written again",
    "AnonHugePages": "anonymous memory mapped by huge pages",
    "ShmemPmdMapped": "shared memory mapped by huge pages",
    "FilePmdMapped": "page cache mapped by huge pages",
    "Shared_Hugetlb": "hugetlbfs pages mapped more than once (not in Rss)",
    "Private_Hugetlb": "hugetlbfs pages mapped once (not in Rss)",
    "Swap": "anonymous pages that are in swap",
    "SwapPss": "Swap with each entry divided by its users",
    "Locked": "the vma's Pss if it is mlocked",
}


@dataclass(frozen=True, slots=True)
class Accounting:
    """smaps fields.

    fields: names of the columns that were read (a kernel without KSM: lacks it).
    per_vma: int64[nvma, len(fields)] in bytes, rows as the vma list; None if only totals were read.
    total: field -> bytes (smaps_rollup, or the column sums).
    status: fields of /proc/PID/status and stat that concern memory, in bytes or counts (VmRSS, RssAnon, …,
    min_flt, maj_flt), as read at the same time.
    """

    fields: tuple[str, ...] = ()
    per_vma: npt.NDArray[np.int64] | None = None
    total: dict[str, int] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_rows(
        cls, fields: Sequence[str], rows: npt.NDArray[np.int64], status: dict[str, int] | None = None
    ) -> Accounting:
        """From per-vma rows; totals are the column sums."""
        sums = rows.sum(axis=0) if len(rows) else np.zeros(len(fields), np.int64)
        total = {name: int(value) for name, value in zip(fields, sums.tolist(), strict=True)}
        return cls(tuple(fields), rows, total, dict(status or {}))

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """int64[nvma], bytes. KeyError where the field was not read."""
        if self.per_vma is None or name not in self.fields:
            raise KeyError(name)
        return self.per_vma[:, self.fields.index(name)]
