"""The Python side of the spool against the C side."""

from __future__ import annotations

import ctypes

from pagelens.capture import records, tables
from pagelens.linux import drain, recording


def test_sizes_are_those_of_the_c_core() -> None:
    fault, call, task, totals, stats, raw, batch = drain.record_sizes()
    assert batch == 48 + 32 * 16 == ctypes.sizeof(ctypes.c_uint64 * 71) - 8
    assert raw == records.RAW.itemsize
    assert fault == records.FAULT.itemsize
    assert call == records.CALL.itemsize
    assert task == ctypes.sizeof(recording._Task)
    assert totals == ctypes.sizeof(recording.Totals)
    assert stats == ctypes.sizeof(drain.DrainStats)


def test_every_table_has_a_schema() -> None:
    for name, columns in tables.TABLES.items():
        schema = tables.schema(name)
        assert schema.names == [c.name for c in columns]
        assert len(set(schema.names)) == len(columns)
