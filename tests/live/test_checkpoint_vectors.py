"""Vector registers in an exported core, as gdb shows them; the XSAVE layouts that gdb must be spared."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from pagelens.checkpoint import core, xsave
from pagelens.checkpoint.dump import dump
from pagelens.checkpoint.stored import Stored
from support.subjects import Subjects


@pytest.mark.skipif(shutil.which("gdb") is None, reason="missing capability: gdb")
def test_gdb_shows_whole_vector_registers_and_has_nothing_to_warn_of(
    subjects: Subjects, tmp_path: Path
) -> None:
    program = subjects("vectors")
    with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            width = child.stdout.readline().strip()
            if width == "neither":
                pytest.skip("missing capability: AVX")
            time.sleep(0.05)  # from the line to the loop
            dump(child.pid, tmp_path / "c")
        finally:
            child.kill()
    core.export(Stored.open(tmp_path / "c"), tmp_path / "core")
    wanted = ["p $ymm0.v32_int8", "info registers pc", *(["p $zmm0.v64_int8"] if width == "zmm" else [])]
    asked = [part for text in wanted for part in ("-ex", text)]
    settings = ["-iex", "set debuginfod enabled off", "-iex", "set print elements 0"]
    done = subprocess.run(
        ["gdb", "-nx", "-batch", *settings, *asked, program, tmp_path / "core"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "warning" not in done.stdout + done.stderr
    shown = [
        [int(n) for n in numbers.split(", ")]
        for numbers in re.findall(r"^\$\d+ = \{([\d, ]+)\}", done.stdout, re.M)
    ]
    assert shown == [list(range(32)), *([list(range(64))] if width == "zmm" else [])]


def area(xcr0: int, size: int, in_use: int, **places: int) -> bytes:
    out = bytearray(size)
    out[24:28] = b"\x80\x1f\0\0"
    out[464:472] = xcr0.to_bytes(8, "little")
    out[512:520] = in_use.to_bytes(8, "little")
    for name, at in places.items():
        length = {"ymm": 256, "k": 64, "high": 512, "more": 1024, "pkru": 8}[name]
        out[at : at + length] = bytes((len(name) * 7 + i) % 251 for i in range(length))
    return bytes(out)


INTEL = {"ymm": 576, "k": 1088, "high": 1152, "more": 1664, "pkru": 2688}


@pytest.mark.parametrize(
    ("xcr0", "size", "places"),
    [
        (0x2E7, 2440, {"ymm": 576, "k": 832, "high": 896, "more": 1408, "pkru": 2432}),  # AMD Zen 4
        (0xE7, 2432, {"ymm": 576, "k": 832, "high": 896, "more": 1408}),
        (0x207, 840, {"ymm": 576, "pkru": 832}),  # AMD Zen 3
        (0x7, 832, {"ymm": 576}),
        (0x2E7, 2696, INTEL),
        (0x602E7, 11008, INTEL),  # Intel with AMX, no tile in use
    ],
)
def test_each_makers_layout_becomes_the_one_that_gdb_knows(
    xcr0: int, size: int, places: dict[str, int]
) -> None:
    known = xcr0 & 0x2FF
    wanted_size = 2696 if known & 0x200 else 2688 if known & 0xE0 else 832
    wanted = area(known, wanted_size, known, **{name: INTEL[name] for name in places})
    assert xsave.for_gdb(area(xcr0, size, known, **places)) == wanted


def test_a_component_in_use_that_gdb_does_not_know_is_not_lost() -> None:
    tiles = area(0x602E7, 11008, 0x602E7, **INTEL)
    assert xsave.for_gdb(tiles) == tiles
    assert xsave.for_gdb(b"short") == b"short"
    cut = area(0x2E7, 1500, 0x7, ymm=576)
    assert xsave.for_gdb(cut) == cut
