"""Names of code and data in a program with known functions, lines and objects; the cache on disk."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pagelens.linux import elf
from pagelens.linux.symbols import UNKNOWN, Code, PerfMap, Symbolizer, demangle
from support.subjects import SOURCES, Subjects

LINE = next(
    i for i, text in enumerate((SOURCES / "places.c").read_text().splitlines(), 1) if "KNOWN LINE" in text
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGELENS_SYMBOL_CACHE", str(tmp_path / "symbols"))
    return tmp_path / "symbols"


def addresses(program: Path) -> dict[str, int]:
    out = subprocess.run(["nm", str(program)], capture_output=True, text=True, check=True).stdout
    return {f[2]: int(f[0], 16) for f in (line.split() for line in out.splitlines()) if len(f) == 3}


def headers(program: Path) -> elf.ElfFile:
    found = elf.read(str(program), program.stat().st_ino)
    assert found is not None
    return found


def test_functions_lines_objects(subjects: Subjects, cache: Path) -> None:
    program = subjects("places", "-O0")
    names, image = addresses(program), headers(program)
    assert image.build_id
    readelf = subprocess.run(
        ["readelf", "-n", str(program)], capture_output=True, text=True, check=True
    ).stdout
    assert f"Build ID: {image.build_id}" in readelf
    # In a segment whose offset equals its address (text of a small program) both are the same number.
    offset = names["known_function"]
    assert image.vaddr_of(offset) == offset
    symbolizer = Symbolizer()
    code = [Code(str(program), offset + 12, image.build_id), Code(str(program), 1 << 30, image.build_id)]
    known, nothing = symbolizer.resolve(code)
    assert (known.function, Path(known.file).name, known.line) == ("known_function", "places.c", LINE)
    assert nothing == UNKNOWN and not nothing.known
    for name in ("first_object", "second_object"):
        assert symbolizer.data(str(program), image.build_id, names[name] + 40).function == name
        assert symbolizer.data(str(program), image.build_id, names[name] + 40).offset == 40
    again = Symbolizer()
    assert again.resolve(code) == [known, nothing]
    assert again.hits == 2 and again._program is None  # drgn was not even loaded


def test_without_debug_information(subjects: Subjects, cache: Path, tmp_path: Path) -> None:
    stripped = tmp_path / "places"
    shutil.copy(subjects("places", "-O0"), stripped)
    subprocess.run(["strip", "--strip-debug", str(stripped)], check=True)
    offset = addresses(stripped)["known_function"]
    (place,) = Symbolizer().resolve([Code(str(stripped), offset + 1)])
    assert (place.function, place.line, str(place)) == ("known_function", 0, "known_function")


def test_a_replaced_file_names_nothing(subjects: Subjects, cache: Path) -> None:
    program = subjects("places", "-O0")
    assert Symbolizer().resolve([Code(str(program), 0x1150, "ab" * 20)]) == [UNKNOWN]
    assert Symbolizer().resolve([Code("/nonexistent", 0x1150, "")]) == [UNKNOWN]


def test_a_broken_cache_is_only_slower(subjects: Subjects, cache: Path) -> None:
    program = subjects("places", "-O0")
    image = headers(program)
    code = Code(str(program), addresses(program)["known_function"] + 1, image.build_id)
    (place,) = Symbolizer().resolve([code])
    (file,) = cache.rglob("*.tsv")
    whole = file.read_text()
    for text in ("", "rubbish\n", whole[:-5], whole.splitlines()[0] + "\nzz\tq\t\n", "\0" * 100):
        file.write_text(text)
        assert Symbolizer().resolve([code]) == [place]


def test_vdso() -> None:
    image = Symbolizer(disk_cache=False)
    found = {image._at(image._module("[vdso]", "").bias + o).function for o in range(0x600, 0x1200, 16)}  # type: ignore[union-attr]
    assert any("clock_gettime" in name for name in found)


def test_perf_map(tmp_path: Path) -> None:
    (tmp_path / "perf-7.map").write_text(
        "1000 20 one two\n1020 10 LazyCompile:~f x.js:3\nbroken\n2000 zz\n1000 8 newer"
    )
    jit = PerfMap.of(7, tmp_path)
    assert jit is not None and len(jit) == 2
    assert jit.find(0x1004).function == "newer"
    assert jit.find(0x100A) == UNKNOWN
    assert (jit.find(0x1025).function, jit.find(0x1025).offset) == ("LazyCompile:~f x.js:3", 5)
    assert jit.find(0x10) == jit.find(0x1030) == UNKNOWN
    assert PerfMap.of(2**22 + 1, tmp_path) is None


def test_demangle() -> None:
    assert demangle("_ZNSt6vectorIiSaIiEE9push_backERKi") in (
        "std::vector<int, std::allocator<int> >::push_back(int const&)",
        "_ZNSt6vectorIiSaIiEE9push_backERKi",  # without libstdc++
    )
    assert demangle("plain_c") == "plain_c"
