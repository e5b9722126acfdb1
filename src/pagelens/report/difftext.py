"""A diff as JSON and as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pagelens.report.diff import Diff, PageChange
from pagelens.vm.accounting import SMAPS_MEANING
from pagelens.vm.pages import PageState
from pagelens.vm.units import format_size

_COUNTS = frozenset(
    {"min_flt", "maj_flt", "Threads", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"}
)
_MEANING = {
    **SMAPS_MEANING,
    "min_flt": "minor faults of the process: none waited for a disk",
    "maj_flt": "major faults of the process: read from disk or swap",
    "VmRSS": "resident memory as the kernel counts it per process (may lag a little behind smaps)",
    "RssAnon": "resident anonymous memory",
    "RssFile": "resident pages of files",
    "RssShmem": "resident shared memory",
    "VmPTE": "page tables",
    "VmSize": "address space mapped",
    "VmData": "private writable address space",
    "VmHWM": "highest VmRSS so far",
    "VmPeak": "highest VmSize so far",
}


def as_json(diff: Diff, *, pages: int = 0) -> dict[str, Any]:
    """The object of docs/schemas/diff.json. pages: at most so many page rows, 0 for all."""
    shown = diff.pages[:pages] if pages else diff.pages
    return {
        "from": diff.a.name,
        "to": diff.b.name,
        "by": diff.by,
        "complete": diff.a.shot.complete and diff.b.shot.complete,
        "fields": [{**r, "meaning": _MEANING.get(r["field"], "")} for r in diff.fields],
        "regions": [
            {**r, "start": None if r["start"] is None else f"{r['start']:#x}",
             "end": None if r["end"] is None else f"{r['end']:#x}"}
            for r in diff.regions
        ],
        "pages": [_page(p) for p in shown],
        "explained": [
            {"field": f, "by_pages": part, "change": whole} for f, (part, whole) in diff.explained.items()
        ],
        "notes": diff.notes,
    }  # fmt: skip


def names(state: int) -> list[str]:
    """["present", "file"]."""
    return [str(s.name).lower().replace("_", "-") for s in PageState if s and state & s]


def _page(p: PageChange) -> dict[str, Any]:
    return {
        "start": f"{p.start:#x}",
        "pages": p.pages,
        "kind": p.kind,
        "region": p.region,
        "symbol": p.symbol or None,
        "before": names(p.before),
        "after": names(p.after),
        "copied": p.copied,
        "what": p.what,
        "effect": p.effect,
        "faults": p.faults,
        "stores": p.stores,
        "chain": [{**r, "addr": f"{r['addr']:#x}"} for r in p.chain],
    }


def as_text(diff: Diff, *, explain: bool = False, pages: int = 40) -> str:
    """What `pagelens diff` prints."""
    out = [f"from  {diff.a.name}", f"to    {diff.b.name}", ""]
    out += _fields(diff, explain)
    out += _regions(diff)
    if diff.by == "address":
        out += _pages(diff, explain, pages)
        out += _account(diff)
    out += [f"note  {n}" for n in diff.notes]
    return "\n".join(out)


def amount(field: str, value: int, sign: bool = False) -> str:
    """A field's value for people; with `sign`, a change."""
    text = f"{abs(value):,}" if field in _COUNTS else format_size(abs(value))
    if not value:
        return text
    return (("+" if value > 0 else "-") if sign else ("-" if value < 0 else "")) + text


def _fields(diff: Diff, explain: bool) -> list[str]:
    if not diff.fields:
        return ["no field of smaps or status changed", ""]
    out = [f"{'field':<26} {'before':>12} {'after':>12} {'change':>12}"]
    for row in diff.fields:
        f = row["field"]
        line = f"{f:<26} {amount(f, row['before']):>12} {amount(f, row['after']):>12} "
        line += f"{amount(f, row['change'], True):>12}"
        if explain and f in _MEANING:
            line += f"   {_MEANING[f]}"
        out.append(line)
    return [*out, ""]


def _regions(diff: Diff) -> list[str]:
    out = []
    for row in diff.regions:
        keys = [f for f in ("Size", "Rss", "Private_Clean", "Private_Dirty", "Shared_Clean", "Shared_Dirty",
                            "Anonymous", "Swap", "Locked") if f in row["changes"]]  # fmt: skip
        if row["what"] == "changed" and not keys:
            continue
        where = "" if row["start"] is None else f"{row['start']:012x}-{row['end']:012x} "
        text = "  ".join(f"{f} {_kb(row['changes'][f][0])}→{_kb(row['changes'][f][1])}" for f in keys)
        out.append(f"  {where}{row['region']:<34} {row['what']:<10} {text}".rstrip())
    return ["regions (KiB)", *out, ""] if out else []


def _kb(value: int) -> str:
    return f"{value // 1024}"


def _pages(diff: Diff, explain: bool, limit: int) -> list[str]:
    if not diff.pages:
        return ["no page changed its state", ""] if diff.a.shot.pages is not None else []
    total = sum(p.pages for p in diff.pages)
    out = [f"pages that changed: {total:,} in {len(diff.pages):,} runs"]
    shown = diff.pages
    if len(shown) > limit:
        out += _in_short(diff.pages)
        longest = sorted(shown, key=lambda p: (-p.pages, p.start))[:limit]
        shown = sorted(longest, key=lambda p: p.start)
        out.append(f"  the longest {limit:,} of {len(diff.pages):,} runs (--pages 0 shows all):")
    for p in shown:
        name = f" {p.symbol}" if p.symbol else ""
        out.append(
            f"  {p.start:012x} {p.pages:>6,} page{'s' if p.pages > 1 else ' '} {p.region}{name}: "
            f"{' '.join(names(p.before)) or 'absent'} → {' '.join(names(p.after)) or 'absent'}"
        )
        out.append(f"      {p.what}")
        if p.effect:
            text = "  ".join(f"{f} {amount(f, v * p.pages, True)}" for f, v in p.effect.items())
            other = p.copied or "Anonymous" in p.effect
            stays = "one page for another" if other else "the same page, counted elsewhere"
            kept = "" if "Rss" in p.effect or not explain else f"  (Rss stays: {stays})"
            out.append(f"      {text}{kept}")
        for row in p.chain:
            when = "then" if row["between"] else "before"
            symbol = f" of {row['symbol']}" if row["symbol"] else ""
            cause = f"  [{row['cause']}]" if row["cause"] else ""
            out.append(f"      {when:<6} {row['what']}{symbol}, at {row['from']}{cause}")
        if p.pages > 1 and p.stores:
            text = ", ".join(f"{r['function'] or '?'} {r['faults']:,}" for r in p.stores[:4])
            out.append(f"      faults by function: {text}")
    return [*out, ""]


def _in_short(pages: Sequence[PageChange], most: int = 10) -> list[str]:
    # Thousands of runs are read by nobody: what happened, by function, most pages first.
    sums: Counter[tuple[str, str]] = Counter()
    causes: dict[tuple[str, str], set[str]] = {}
    for p in pages:
        way = p.what, str(p.stores[0]["function"] or "?") if p.stores else ""
        sums[way] += p.pages
        causes.setdefault(way, set()).update(str(r["cause"]) for r in p.chain if r["between"] and r["cause"])
    out = []
    for way, count in sums.most_common(most):
        what, function = way
        by = f", first at {function}" if function else ""
        named = f"  [{next(iter(causes[way]))}]" if len(causes[way]) == 1 else ""
        out.append(f"  {count:>8,} page{'s' if count > 1 else ' '} {what}{by}{named}")
    rest = sum(sums.values()) - sum(n for _, n in sums.most_common(most))
    return [*out, f"  {rest:>8,} in {len(sums) - most:,} other ways"] if rest else out


def _account(diff: Diff) -> list[str]:
    if not diff.explained:
        return []
    same = [f for f, (part, whole) in diff.explained.items() if part == whole]
    out = []
    if same:
        out.append(f"the changed pages account for all of: {', '.join(same)}")
    for f, (part, whole) in diff.explained.items():
        if part != whole:
            out.append(
                f"{f}: the changed pages account for {part // 1024:+,} of {whole // 1024:+,} KiB"
                + (" (pagemap does not show the dirty bit)" if f.endswith(("Clean", "Dirty")) else "")
            )
    return [*out, ""]
