"""The heat map in a terminal: address buckets by epochs, and the one-line form.

Only memory that was ever dirty is shown: the watched space is compressed to its dirty vmas, each cut into
buckets of equal size, so that a 47-bit space fits a screen and every line says which vma it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pagelens.dirty import spans
from pagelens.dirty.epoch import Epoch
from pagelens.dirty.spans import Spans
from pagelens.vm.pages import distinct
from pagelens.vm.units import PAGE_SHIFT, format_size

_SHADES = " .:-=+*#%@"


def shade(share: float) -> str:
    """A character for a share of 0 to 1; anything above 0 is visible."""
    if share <= 0:
        return _SHADES[0]
    return _SHADES[min(len(_SHADES) - 1, 1 + int(share * (len(_SHADES) - 1)))]


def strip(epoch: Epoch, width: int = 48) -> str:
    """One line: the writable vmas side by side, each character one part of equal size."""
    writable = spans.of((v.start, v.end) for v in epoch.vmas if "w" in v.perms)
    hot = spans.union(writable, spans.EMPTY)
    touched = _only_touched(hot, epoch.spans)
    if not touched:
        return _SHADES[0] * width
    return "".join(shade(s) for s in _shares(touched, epoch.spans, width))


def table(epochs: Sequence[Epoch], rows: int = 24) -> list[str]:
    """Lines "address size |shades| name", a column for each epoch, hottest vmas given the most lines."""
    dirt = spans.EMPTY
    for epoch in epochs:
        dirt = spans.union(dirt, epoch.spans)
    if not dirt:
        return []
    vmas = epochs[-1].vmas
    last = Spans(vmas.starts, vmas.ends)
    part, _, index = spans.overlaps(dirt, last)
    weight = np.bincount(index, weights=(part.end - part.start).astype(float), minlength=len(vmas))
    order = np.argsort(-weight)[: max(1, rows // 2)]
    order = order[weight[order] > 0]
    lines = []
    total = float(weight[order].sum())
    for i in sorted(int(x) for x in order):
        vma = vmas[i]
        count = max(1, min(vma.pages, round(rows * float(weight[i]) / total)))
        whole = spans.of([(vma.start, vma.end)])
        grid = [_shares(whole, spans.common(e.spans, whole), count) for e in epochs]
        step = max(1, vma.pages // count) << PAGE_SHIFT
        for row in range(count):
            cells = "".join(shade(float(column[row])) for column in grid)
            name = (vma.name or "anonymous") if row == 0 else ""
            lines.append(f"{vma.start + row * step:012x} {format_size(step):>9} |{cells}| {name}".rstrip())
    return lines


def _only_touched(where: Spans, dirt: Spans) -> Spans:
    hit = distinct(spans.overlaps(dirt, where)[2])
    return Spans(where.start[hit], where.end[hit])


def _shares(where: Spans, dirt: Spans, buckets: int) -> npt.NDArray[np.float64]:
    # Share of dirty pages in each of `buckets` equal parts of `where`, laid end to end.
    size = (where.end - where.start) >> np.uint64(PAGE_SHIFT)
    offset = np.concatenate((np.zeros(1, np.int64), np.cumsum(size.astype(np.int64))))
    total = int(offset[-1])
    part, _, index = spans.overlaps(dirt, where)
    shift = np.uint64(PAGE_SHIFT)
    begin = offset[index] + ((part.start - where.start[index]) >> shift).astype(np.int64)
    end = offset[index] + ((part.end - where.start[index]) >> shift).astype(np.int64)
    edges = np.linspace(0, total, buckets + 1)
    # Pages below each edge: for a run [b, e) that is clip(edge - b, 0, e - b).
    below = np.zeros(buckets + 1)
    if len(begin):
        order = np.sort(begin), np.sort(end)
        sums = tuple(np.concatenate(([0], np.cumsum(o))) for o in order)
        counts = tuple(np.searchsorted(o, edges, side="left") for o in order)
        below = (counts[0] * edges - sums[0][counts[0]]) - (counts[1] * edges - sums[1][counts[1]])
    width = np.maximum(np.diff(edges), 1e-9)
    return np.asarray(np.clip(np.diff(below) / width, 0, 1), np.float64)
