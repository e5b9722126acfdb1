"""Merge checkpoints, and drop some of a chain without losing the others.

merge: a copy that needs no other. drop: contents that remaining checkpoints need from dropped ones move into
the first that needs them (its own blocks keep their numbers, its id stays, so those that refer to it still
can); each is replaced atomically, and only at the end the dropped ones are deleted, newest first. A crash in between
leaves every remaining checkpoint whole, at worst with pages stored twice; the same call again does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pagelens.checkpoint.files import Files, dropped
from pagelens.checkpoint.image import OWN, Kind, Rows, compress, per_page
from pagelens.checkpoint.store import TABLES, Writer
from pagelens.checkpoint.stored import Located, Stored
from pagelens.linux import pagecopy
from pagelens.vm.errors import DamagedInputError, UsageError
from pagelens.vm.pages import contained

_CHUNK = 4096
_KEYS = ("format", "version", "id", "process", "pack_bytes", "files")


def merge(path: Path, out: Path, *, level: int = 1, force: bool = False, files: Files | None = None) -> Path:
    """Write checkpoint `path` to `out` with all contents in it. Errors as `dump`; DamagedInputError."""
    store = Stored.open(path)
    with Writer(out, level=level, force=force, files=files) as writer:
        flat = per_page(store.rows)
        data = np.flatnonzero(flat["kind"] == Kind.DATA)
        _move_in(store, writer, flat, data, _Moved(out))
        meta = {key: value for key, value in store.manifest.items() if key not in _KEYS}
        meta |= {"parent": None, "origins": [], "notes": [*meta["notes"], f"merged from {store.id}"]}
        return writer.finish(store.process, compress(flat), meta)


@dataclass(slots=True)
class _Moved:
    """What a checkpoint has taken in: origin's id -> places there (ascending), and block and first here."""

    path: Path
    places: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)


def _place(block: Any, first: Any) -> Any:
    # One number a place in a pack: columns of several fields would be compared field by field.
    return block.astype(np.int64) << 16 | first.astype(np.int64)


def _move_in(store: Stored, writer: Writer, flat: Rows, data: Any, moved: _Moved) -> None:
    # Append the contents of rows `data` (indices of per-page rows), each distinct page once.
    places = _place(flat["block"][data], flat["first"][data])
    origins = flat["origin"][data].astype(np.int64)
    for number in np.unique(origins).tolist():
        mine = data[origins == number]
        place, inverse = np.unique(places[origins == number], return_inverse=True)
        block, first = np.empty(len(place), np.int32), np.empty(len(place), np.uint32)
        for at in range(0, len(place), _CHUNK):
            part = place[at : at + _CHUNK]
            shape = np.ones(len(part), np.int64)
            where = Located(shape * Kind.DATA, shape * number, part >> 16, part & 0xFFFF)
            pages = np.ascontiguousarray(store.contents(where)).reshape(-1)
            block[at : at + _CHUNK], first[at : at + _CHUNK] = writer.append(
                pages, pagecopy.hash_pages(pages)[0]
            )
        moved.places[store.origin(number).id] = (place, block, first)
        flat["origin"][mine], flat["block"][mine], flat["first"][mine] = OWN, block[inverse], first[inverse]


@dataclass(frozen=True, slots=True)
class Pruned:
    """dropped: deleted now; gone: were not there any more; rewritten: kept ones that took contents in."""

    dropped: list[Path]
    gone: list[Path]
    rewritten: list[Path]


def drop(paths: Iterable[Path], remaining: Sequence[Path], *, files: Files | None = None) -> Pruned:
    """Delete checkpoints `paths`; those in `remaining` stay whole.

    remaining must list every checkpoint that refers to a dropped one: others would become unreadable. Those that
    lie beside a dropped one are looked at, and UsageError names one that was forgotten. Of `paths`, those that are
    not there are left out if others are (a prune that was killed, called again), else UsageError. Errors as
    `dump`; DamagedInputError.
    """
    files = files or Files()
    named = list(dict.fromkeys(path.absolute() for path in paths))
    kept = [Stored.open(path) for path in dict.fromkeys(path.absolute() for path in remaining)]
    there = [path for path in named if path.exists() or dropped(path).exists()]
    if named and not there:
        Stored.open(named[0])  # says what is wrong
    remains = [path for path in there if not path.exists() or _is_remains(path)]
    victims = {store.id: store for store in (Stored.open(path) for path in there if path not in remains)}
    if victims.keys() & {store.id for store in kept}:
        raise UsageError("a checkpoint cannot be dropped and kept")
    _refuse_forgotten(victims, {store.path for store in kept})
    kept.sort(key=_time)
    moved: dict[str, _Moved] = {}
    rewritten = []
    for store in kept:
        files.sweep(store.path)
        if any(entry["id"] in victims for entry in store.manifest["origins"]):
            rewritten.append(_rewrite(store, victims, moved, files))
    newest_first = [store.path for store in sorted(victims.values(), key=_time, reverse=True)]
    for path in newest_first + [path for path in remains if path.exists()]:
        files.discard(path)
    for path in named:
        files.sweep(path)
    return Pruned(newest_first, [path for path in named if path not in newest_first], rewritten)


def _time(store: Stored) -> int:
    return int(store.manifest["process"]["time_ns"])


def _is_remains(path: Path) -> bool:
    # Of a checkpoint whose deletion was cut short by a version that unlinked the manifest first.
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {""}
    return bool(names) and names <= {"manifest.sha256", "pages.pack", *TABLES}


def _refuse_forgotten(victims: dict[str, Stored], kept: set[Path]) -> None:
    going = {store.path for store in victims.values()}
    for folder in {path.parent for path in going}:
        for path in sorted(folder.iterdir()):
            if (
                path in going
                or path.name.startswith(".")
                or path in kept
                or not (path / "manifest.json").is_file()
            ):
                continue
            try:
                store = Stored.open(path)
            except DamagedInputError:
                continue
            for entry in store.manifest["origins"]:
                if entry["id"] in victims:
                    raise UsageError(
                        f"{path} needs {victims[entry['id']].path}: keep it too (--keep), or drop it as well; "
                        "nothing was touched"
                    )


def _rewrite(store: Stored, victims: dict[str, Stored], moved: dict[str, _Moved], files: Files) -> Path:
    flat = per_page(store.rows)
    origins = [dict(entry) for entry in store.manifest["origins"]]
    gone = np.array([number for number, entry in enumerate(origins) if entry["id"] in victims], np.int64)
    left = np.flatnonzero((flat["kind"] == Kind.DATA) & np.isin(flat["origin"], gone))
    # What an earlier rewritten checkpoint has taken in is referred to there.
    for other, taken in moved.items():
        number = next((n for n, entry in enumerate(origins) if entry["id"] == other), len(origins))
        if number == len(origins):
            origins.append({"id": other, "path": os.path.relpath(taken.path, store.path)})
        for number_there in gone.tolist():
            place, block, first = taken.places.get(origins[number_there]["id"], (np.empty(0, np.int64),) * 3)
            mine = left[flat["origin"][left] == number_there]
            wanted = _place(flat["block"][mine], flat["first"][mine])
            has = contained(wanted, place)
            at = np.searchsorted(place, wanted[has])
            mine = mine[has]
            flat["origin"][mine], flat["block"][mine], flat["first"][mine] = number, block[at], first[at]
        left = left[np.isin(flat["origin"][left], gone)]
    level = int(store.manifest.get("zstd", 1))
    with Writer(store.path, level=level, force=True, adopting=True, files=files) as writer:
        writer.adopt(store)
        moved[store.id] = _Moved(store.path)
        if len(left):
            _move_in(store, writer, flat, left, moved[store.id])
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
