"""Tables on a terminal: nothing is folded into pieces, what does not fit is left out by rank and named."""

from __future__ import annotations

from pagelens.cli.table import Col, render_table

COLUMNS = (
    Col("start", kind="addr"),
    Col("size", kind="bytes", spare=2),
    Col("faults", kind="int"),
    Col("kind", spare=1),
    Col("name"),
)
ROWS = [
    {
        "start": 0x7F0000000000,
        "size": 8192,
        "faults": 1234,
        "kind": "anonymous",
        "name": "malloc arena of thread 12",
    },
    {"start": 0x7F0000002000, "size": 4096, "faults": 1, "kind": "text", "name": "libpython3.11.so.1.0 text"},
]


def test_a_pipe_shows_all_on_one_line_each() -> None:
    lines = render_table(COLUMNS, ROWS, notes=["a note"]).splitlines()
    assert lines[1].split() == ["start", "size", "faults", "kind", "name"]
    assert lines[3].split()[:3] == ["7f0000000000", "8", "KiB"] and lines[3].endswith(
        "malloc arena of thread 12"
    )
    assert lines[-1] == "a note" and len(lines) == 7


def test_a_narrow_terminal_loses_columns_by_rank() -> None:
    wide = render_table(COLUMNS, ROWS, width=100)
    assert "not shown" not in wide and "anonymous" in wide
    narrow = render_table(COLUMNS, ROWS, width=66)
    assert "not shown, for want of width: size (" in narrow and "anonymous" in narrow
    narrower = render_table(COLUMNS, ROWS, width=55)
    assert "not shown, for want of width: size, kind (" in narrower
    assert all(len(line) <= 55 for line in narrower.splitlines()[:-1])
    assert "malloc arena of thread" in narrower


def test_words_are_never_cut_into_pieces() -> None:
    lines = render_table(COLUMNS, ROWS, width=20).splitlines()
    assert "7f0000000000" in lines[3] and "1,234" in lines[3] and "malloc" in lines[3]


def test_no_rows() -> None:
    assert render_table(COLUMNS, [], width=80).splitlines()[1].split() == [c.head for c in COLUMNS]
