"""Epochs of dirty pages for people and for scripts: the line, the JSON object, the hottest regions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pagelens.dirty import spans
from pagelens.dirty.epoch import Epoch, Region
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE, format_size


def record(epoch: Epoch, *, ranges: bool, same: int | None = None) -> dict[str, Any]:
    """The JSON object of an epoch (docs/schemas/dirty.json)."""
    out: dict[str, Any] = {
        "epoch": epoch.epoch,
        "time_ns": epoch.time_ns,
        "backend": epoch.backend,
        "dirty_pages": epoch.dirty_pages,
    }
    if ranges:
        out["ranges"] = [[f"{start:#x}", pages] for start, pages in epoch.ranges()]
    out["regions"] = [
        {"start": f"{r.start:#x}", "end": f"{r.end:#x}", "perms": r.perms, "name": r.name, "pages": r.pages,
         "dirty_pages": r.dirty_pages}
        for r in epoch.regions()
    ]  # fmt: skip
    out |= {
        "complete": epoch.complete,
        "notes": list(epoch.notes),
        "pid": epoch.pid,
        "span_ns": epoch.span_ns,
        "cost_ns": epoch.cost_ns,
        "bytes_per_s": epoch.dirty_pages * PAGE_SIZE / max(epoch.span_ns / 1e9, 1e-9),
        "reasons": epoch.by_reason(),
        "unmapped_pages": epoch.unmapped_pages,
        "same_content": same,
    }
    if epoch.details:
        out["details"] = epoch.details
    return out


def describe(epoch: Epoch, same: int | None) -> str:
    """One epoch for people."""
    rate = epoch.dirty_pages * PAGE_SIZE / max(epoch.span_ns / 1e9, 1e-9)
    reasons = " ".join(f"{k}={v:,}" for k, v in epoch.by_reason().items())
    hot = epoch.regions()[:1]
    where = f"  hottest: {hot[0].name or 'anonymous'} {hot[0].dirty_pages:,}" if hot else ""
    bytes_same = f"  same bytes: {same:,}" if same is not None else ""
    sure = "" if epoch.complete else "  INCOMPLETE"
    return (
        f"{epoch.epoch:>5} pid {epoch.pid} {epoch.span_ns / 1e9:7.3f} s {epoch.dirty_pages:>9,} pages"
        f" {format_size(rate):>10}/s  {reasons}{bytes_same}{where}{sure}"
    )


def hottest(epochs: list[Epoch]) -> list[Region]:
    """Regions of the last maps with the sum of their distinct dirty pages over the epochs."""
    union = spans.EMPTY
    for epoch in epochs:
        union = spans.union(union, epoch.spans)
    count = (union.end - union.start) >> np.uint64(PAGE_SHIFT)
    whole = replace(epochs[-1], start=union.start, count=count, why=np.ones(len(count), np.uint8))
    return whole.regions()
