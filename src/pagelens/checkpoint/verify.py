"""Verify a checkpoint: every bit of it, and every checkpoint that it needs.

A flipped bit anywhere is found: the manifest has its SHA-256 beside it, the tables have theirs in the
manifest, the pack is tiled without gap by blocks that carry a checksum, and its header repeats the
checkpoint's id. The contents are decoded too, and each page compared with its recorded hash. That rows
point into blocks that exist, lie in vmas and do not overlap is checked as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pagelens.checkpoint.image import OWN, Kind
from pagelens.checkpoint.store import PACK_MAGIC
from pagelens.checkpoint.stored import Stored
from pagelens.linux import pagecopy
from pagelens.vm.errors import DamagedInputError
from pagelens.vm.units import PAGE_SHIFT


@dataclass(slots=True)
class Verdict:
    """ok, what was read, and every problem found (empty if ok). checked: checkpoints, the origins
    included."""

    path: Path
    problems: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    pages: int = 0
    bytes: int = 0

    @property
    def ok(self) -> bool:
        """Nothing wrong was found."""
        return not self.problems


def verify(path: Path | str, progress: Callable[[int], None] | None = None) -> Verdict:
    """Check a checkpoint and all that it needs. Problems are collected, not raised; UsageError where there is
    no directory."""
    verdict = Verdict(Path(path))
    try:
        store = Stored.open(path)
    except DamagedInputError as error:
        verdict.problems.append(str(error))
        return verdict
    seen: set[str] = set()
    for number in range(-1, len(store.manifest["origins"])):
        try:
            origin = store.origin(number)
        except (DamagedInputError, ValueError) as error:
            verdict.problems.append(str(error))
            continue
        if origin.id not in seen:
            seen.add(origin.id)
            _one(origin, verdict, progress)
    _rows(store, verdict)
    return verdict


def _one(store: Stored, verdict: Verdict, progress: Callable[[int], None] | None) -> None:
    verdict.checked.append(str(store.path))
    allowed = {"manifest.json", "manifest.sha256", "pages.pack", *store.manifest["files"]}
    extra = sorted(p.name for p in store.path.iterdir() if p.name not in allowed)
    if extra:
        verdict.problems.append(f"{store.path}: files that do not belong here: {', '.join(extra)}")
    try:
        for name in store.manifest["files"]:
            store._table(name)
        blocks = store.blocks
        with open(store.path / "pages.pack", "rb") as pack:
            header = pack.read(16)
    except (DamagedInputError, OSError, ValueError) as error:
        verdict.problems.append(str(error))
        return
    if header != PACK_MAGIC + bytes.fromhex(store.id)[:8]:
        verdict.problems.append(f"{store.path}/pages.pack: the header is damaged")
    ends = blocks["offset"] + blocks["stored"]
    expected = np.concatenate(([16], ends[:-1])) if len(blocks) else blocks["offset"]
    if (blocks["offset"] != expected).any() or (int(ends[-1]) if len(blocks) else 16) != store.manifest[
        "pack_bytes"
    ]:
        verdict.problems.append(f"{store.path}/pages.pack: its blocks leave gaps")
    first = np.cumsum(blocks["pages"].astype(np.int64)) - blocks["pages"]
    hashes, _, _ = store.own_pages()
    for number in range(len(blocks)):
        try:
            data = store.block(number)
        except DamagedInputError as error:
            verdict.problems.append(str(error))
            continue
        found, _ = pagecopy.hash_pages(np.ascontiguousarray(data).reshape(-1))
        if (found != hashes[first[number] : first[number] + len(found)]).any():
            verdict.problems.append(
                f"{store.path}/pages.pack: block {number}: contents differ from their hashes"
            )
        verdict.pages += len(data)
        verdict.bytes += int(blocks["stored"][number])
        if progress is not None:
            progress(len(data))


def _rows(store: Stored, verdict: Verdict) -> None:
    try:
        rows, vmas = store.rows, store.vmas
        _ = store.threads
    except (DamagedInputError, OSError, ValueError):
        return  # reported by _one
    ends = rows["start"] + (rows["pages"] << np.uint64(PAGE_SHIFT))
    if (rows["start"][1:] < ends[:-1]).any():
        verdict.problems.append(f"{store.path}: rows overlap")
    if len(rows) and ((vmas.find_many(rows["start"]) < 0) | (vmas.find_many(ends - np.uint64(1)) < 0)).any():
        verdict.problems.append(f"{store.path}: rows lie outside the vmas")
    data = rows[rows["kind"] == Kind.DATA]
    for number in np.unique(data["origin"]).tolist():
        mine = data[data["origin"] == number]
        try:
            blocks = store.origin(number).blocks if number != OWN else store.blocks
        except (DamagedInputError, IndexError) as error:
            verdict.problems.append(f"{store.path}: rows need an origin that cannot be read: {error}")
            continue
        block = mine["block"].astype(np.int64)
        inside = (block >= 0) & (block < len(blocks))
        if (
            not inside.all()
            or (
                mine["first"].astype(np.int64) + mine["pages"].astype(np.int64) > blocks["pages"][block]
            ).any()
        ):
            verdict.problems.append(
                f"{store.path}: rows point outside the blocks of {store.origin(number).path}"
            )
