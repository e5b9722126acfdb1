"""Exports, judged by the programs that read them: gdb, readelf, drgn; CRIU's images by their own definition."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pagelens.checkpoint import core, criu
from pagelens.checkpoint.dump import dump
from pagelens.checkpoint.image import Kind, per_page
from pagelens.checkpoint.protobuf import field, fields
from pagelens.checkpoint.stored import Stored
from pagelens.vm.errors import DamagedInputError, UsageError
from support.scribe import Scribe
from support.subjects import Subjects


@pytest.fixture
def scribe(subjects: Subjects, tmp_path: Path) -> Iterator[Scribe]:
    with Scribe(subjects("scribe"), 3, 16, tmp_path / "file") as scribe:
        yield scribe


@pytest.fixture
def saved(scribe: Scribe, tmp_path: Path) -> Stored:
    dump(scribe.pid, tmp_path / "c")
    return Stored.open(tmp_path / "c")


def gdb(program: Path, core_file: Path, *commands: str) -> str:
    arguments = [part for command in commands for part in ("-ex", command)]
    done = subprocess.run(
        ["gdb", "-nx", "-batch", "-ex", "set debuginfod enabled off", *arguments, program, core_file],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout


@pytest.mark.skipif(shutil.which("gdb") is None, reason="missing capability: gdb")
def test_gdb_shows_all_threads_and_memory(
    subjects: Subjects, scribe: Scribe, saved: Stored, tmp_path: Path
) -> None:
    out = tmp_path / "core"
    assert core.export(saved, out) == []
    text = gdb(
        subjects("scribe"),
        out,
        "thread apply all bt",
        "p/x control->locked",
        "p control->owner[1].steps",
        "x/4xb control->locked",
        "x/2xb control->copied+4096",
        "x/2xb control->copied+8192",
        "x/2xb control->hidden",
        "info registers rip",
    )
    stacks = re.findall(r"Thread \d+ \((?:Thread \S+ \()?LWP (\d+)\)+:\n((?:#.*\n)+)", text)
    assert {int(tid) for tid, _ in stacks} == {t.tid for t in saved.threads}
    assert sum("work (arg=" in frames and "start_thread" in frames for _, frames in stacks) == 3
    assert sum("main (" in frames for _, frames in stacks) == 1
    where = scribe.fixed(saved.read)
    assert f"= {where['locked']:#x}" in text
    control = np.frombuffer(saved.read(scribe.control, 8 * 14), np.uint64)
    assert f"= {int(control[2 + 6 + 2])}" in text
    assert text.count("0x22\t0x22\t0x22\t0x22") == 1
    assert text.count("0x44\t0x44") == text.count("0x55\t0x55") == text.count("0x11\t0x11") == 1
    assert f"{saved.threads[0].regs['rip']:#x}" in text.split("rip", 1)[1]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="missing capability: readelf")
def test_readelf_and_drgn_agree(scribe: Scribe, saved: Stored, tmp_path: Path) -> None:
    import drgn

    out = tmp_path / "core"
    core.export(saved, out)
    text = subprocess.run(["readelf", "-lW", out], capture_output=True, text=True, check=True)
    assert "warning" not in text.stderr.lower()
    loads = re.findall(r"LOAD +\S+ (0x\S+) \S+ \S+ (0x\S+)", text.stdout)
    assert [(int(a, 16), int(s, 16)) for a, s in loads] == [
        (v.start, v.size) for v in saved.vmas if v.name != "[vsyscall]"
    ]
    program = drgn.Program()
    program.set_core_dump(out)
    assert {t.tid for t in program.threads()} == {t.tid for t in saved.threads}
    flat = per_page(saved.rows)
    flat = flat[flat["kind"] == Kind.DATA]
    contents = saved.contents(saved.locate(flat["start"]))
    for addr, page in zip(flat["start"].tolist(), contents, strict=True):
        assert program.read(addr, 4096) == page.tobytes(), hex(addr)
    with pytest.raises(UsageError, match="--force"):
        core.export(saved, out)


def test_criu_images_hold_every_page_also_through_parents(
    scribe: Scribe, saved: Stored, tmp_path: Path
) -> None:
    criu.export(saved, tmp_path / "one")
    dump(scribe.pid, tmp_path / "d", parent=tmp_path / "c")
    later = Stored.open(tmp_path / "d")
    criu.export(later, tmp_path / "two", parent=tmp_path / "one")
    for store, name in ((saved, "one"), (later, "two")):
        images = criu.CriuPages(tmp_path / name)
        assert images.pid == scribe.pid
        flat = per_page(store.rows)
        flat = flat[np.isin(flat["kind"], (Kind.DATA, Kind.ZERO))]
        contents = store.contents(store.locate(flat["start"]))
        assert images.runs().pages == len(flat)
        for addr, page in zip(flat["start"].tolist(), contents, strict=True):
            assert images.page(addr) == page.tobytes()
    two = criu.CriuPages(tmp_path / "two")
    assert (tmp_path / "two" / "pages-1.img").stat().st_size < (
        tmp_path / "one" / "pages-1.img"
    ).stat().st_size
    assert ((two.flags & criu.PE_PARENT) != 0).any()
    (tmp_path / "two" / "parent").unlink()
    with pytest.raises(DamagedInputError, match="needs its parent"):
        criu.CriuPages(tmp_path / "two")


def test_criu_images_are_byte_for_byte_what_the_format_says(
    scribe: Scribe, saved: Stored, tmp_path: Path
) -> None:
    criu.export(saved, tmp_path / "one")
    data = (tmp_path / "one" / f"pagemap-{scribe.pid}.img").read_bytes()
    assert struct.unpack_from("<III", data) == (0x54564319, 0x56084025, 2)
    assert data[12:14] == b"\x08\x01"  # pages_id = 1
    messages = criu.read_image(tmp_path / "one" / f"pagemap-{scribe.pid}.img", criu.PAGEMAP_MAGIC)
    entry = dict(fields(messages[1]))
    assert set(entry) == {1, 2, 4, 5}
    assert entry[4] == 4
    assert (tmp_path / "one" / "inventory.img").read_bytes() == struct.pack(
        "<II", 0x58313116, 2
    ) + b"\x08\x02"


def test_criu_images_of_older_versions_are_read(tmp_path: Path) -> None:
    # Without flags and without field 5: in_parent, and compat nr_pages.
    old = [field(1, 1), field(1, 0x1000) + field(2, 2)]
    (tmp_path / "pagemap-7.img").write_bytes(
        struct.pack("<II", 0x54564319, 0x56084025) + b"".join(struct.pack("<I", len(m)) + m for m in old)
    )
    (tmp_path / "pages-1.img").write_bytes(b"a" * 4096 + b"b" * 4096)
    images = criu.CriuPages(tmp_path)
    assert images.read(0x1FFE, 4) == b"aabb"
    with pytest.raises(KeyError):
        images.read(0x3000, 1)
    (tmp_path / "pages-1.img").write_bytes(b"a" * 4096)
    with pytest.raises(DamagedInputError, match="has 4096 bytes"):
        criu.CriuPages(tmp_path)
    (tmp_path / "pagemap-7.img").write_bytes(b"\x7fELF" + bytes(20))
    with pytest.raises(DamagedInputError, match="magic"):
        criu.CriuPages(tmp_path)


@pytest.mark.skipif(shutil.which("crit") is None, reason="missing capability: crit (Debian package criu)")
def test_crit_decodes_them(scribe: Scribe, saved: Stored, tmp_path: Path) -> None:
    import json

    criu.export(saved, tmp_path / "one")
    text = subprocess.run(
        ["crit", "decode", "-i", tmp_path / "one" / f"pagemap-{scribe.pid}.img"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    decoded = json.loads(text)
    assert decoded["magic"] == "PAGEMAP"
    images = criu.CriuPages(tmp_path / "one")
    found = [(int(str(e["vaddr"]), 0), e["nr_pages"]) for e in decoded["entries"][1:]]
    assert found == list(zip(images.start.tolist(), images.count.tolist(), strict=True))
