"""Merge checkpoints, and drop some of a chain without losing the others.

merge: a copy that needs no other. drop: contents that remaining checkpoints need from dropped ones move into
the first that needs them (its own blocks keep their numbers, its id stays, so those that refer to it still
can); each is replaced atomically, and only at the end the dropped ones are deleted. A crash in between leaves
every remaining checkpoint whole, at worst with pages stored twice.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pagelens.checkpoint.files import Files
from pagelens.checkpoint.image import OWN, Kind, Rows, compress, per_page
from pagelens.checkpoint.store import Writer
from pagelens.checkpoint.stored import Located, Stored
from pagelens.linux import pagecopy
from pagelens.vm.errors import UsageError

_CHUNK = 4096
_KEYS = ("format", "version", "id", "process", "pack_bytes", "files")


def merge(path: Path, out: Path, *, level: int = 1, force: bool = False, files: Files | None = None) -> Path:
    """Write checkpoint `path` to `out` with all contents in it. Errors as `dump`; DamagedInputError."""
    store = Stored.open(path)
    with Writer(out, level=level, force=force, files=files) as writer:
        flat = per_page(store.rows)
        data = np.flatnonzero(flat["kind"] == Kind.DATA)
        _move_in(store, writer, flat, data, {})
        meta = {key: value for key, value in store.manifest.items() if key not in _KEYS}
        meta |= {"parent": None, "origins": [], "notes": [*meta["notes"], f"merged from {store.id}"]}
        return writer.finish(store.process, compress(flat), meta)


def _move_in(
    store: Stored, writer: Writer, flat: Rows, data: Any, moved: dict[tuple[str, int, int], tuple[int, int]]
) -> None:
    # Append the contents of rows `data` (indices of per-page rows), each distinct page once.
    key = np.stack([flat[name][data].astype(np.int64) for name in ("origin", "block", "first")])
    unique, inverse = np.unique(key, axis=1, return_inverse=True)
    inverse = inverse.reshape(-1)
    count = unique.shape[1]
    block, first = np.empty(count, np.int32), np.empty(count, np.uint32)
    for at in range(0, count, _CHUNK):
        part = unique[:, at : at + _CHUNK]
        pages = store.contents(Located(np.full(part.shape[1], Kind.DATA), part[0], part[1], part[2]))
        flatdata = np.ascontiguousarray(pages).reshape(-1)
        hashes, _ = pagecopy.hash_pages(flatdata)
        block[at : at + _CHUNK], first[at : at + _CHUNK] = writer.append(flatdata, hashes)
    for i in range(count):
        origin = store.origin(int(unique[0, i]))
        moved[(origin.id, int(unique[1, i]), int(unique[2, i]))] = (int(block[i]), int(first[i]))
    flat["origin"][data], flat["block"][data], flat["first"][data] = OWN, block[inverse], first[inverse]


def drop(paths: Iterable[Path], remaining: Sequence[Path], *, files: Files | None = None) -> list[Path]:
    """Delete checkpoints `paths`; those in `remaining` stay whole. Returns the ones that were rewritten.

    remaining must list every checkpoint that refers to a dropped one: others would become unreadable.
    """
    victims = {store.id: store for store in (Stored.open(path) for path in paths)}
    kept = [Stored.open(path) for path in remaining]
    if victims.keys() & {store.id for store in kept}:
        raise UsageError("a checkpoint cannot be dropped and kept")
    kept.sort(key=lambda store: int(store.manifest["process"]["time_ns"]))
    moved: dict[str, tuple[Path, dict[tuple[str, int, int], tuple[int, int]]]] = {}
    rewritten = []
    for store in kept:
        if any(entry["id"] in victims for entry in store.manifest["origins"]):
            rewritten.append(_rewrite(store, victims, moved, files))
    for store in victims.values():
        # The manifest goes first: without it nobody takes the rest for a checkpoint.
        (store.path / "manifest.json").unlink()
        shutil.rmtree(store.path)
    return rewritten


def _rewrite(
    store: Stored,
    victims: dict[str, Stored],
    moved: dict[str, tuple[Path, dict[tuple[str, int, int], tuple[int, int]]]],
    files: Files | None,
) -> Path:
    flat = per_page(store.rows)
    origins = [dict(entry) for entry in store.manifest["origins"]]
    gone = np.array([number for number, entry in enumerate(origins) if entry["id"] in victims], np.int64)
    hit = np.flatnonzero((flat["kind"] == Kind.DATA) & np.isin(flat["origin"], gone))
    # What an earlier rewritten checkpoint has taken in is referred to there.
    number_of: dict[str, int] = {}
    left = []
    for i in hit.tolist():
        key = (origins[flat["origin"][i]]["id"], int(flat["block"][i]), int(flat["first"][i]))
        for other, (path, table) in moved.items():
            if key in table:
                if other not in number_of:
                    number_of[other] = next(
                        (n for n, e in enumerate(origins) if e["id"] == other), len(origins)
                    )
                    if number_of[other] == len(origins):
                        origins.append({"id": other, "path": os.path.relpath(path, store.path)})
                flat["origin"][i] = number_of[other]
                flat["block"][i], flat["first"][i] = table[key]
                break
        else:
            left.append(i)
    level = int(store.manifest.get("zstd", 1))
    with Writer(store.path, level=level, force=True, files=files) as writer:
        writer.adopt(store)
        table = {}
        if left:
            _move_in(store, writer, flat, np.array(left), table)
        moved[store.id] = (store.path, table)
        meta = {key: value for key, value in store.manifest.items() if key not in _KEYS}
        parent = meta["parent"]
        meta["parent"] = None if parent is not None and parent["id"] in victims else parent
        meta["origins"], rows = _renumber(origins, compress(flat))
        return writer.finish(store.process, rows, meta)


def _renumber(origins: list[dict[str, str]], rows: Rows) -> tuple[list[dict[str, str]], Rows]:
    # Only origins that are still used.
    data = rows["kind"] == Kind.DATA
    used = [int(n) for n in np.unique(rows["origin"][data]) if n != OWN]
    new = np.full(len(origins) + 1, OWN, np.int16)
    for number, old in enumerate(used):
        new[old] = number
    rows["origin"][data] = new[rows["origin"][data]]
    return [origins[n] for n in used], rows
