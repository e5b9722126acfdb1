"""The commands around checkpoints: schemas, exit codes, one sentence for each refusal."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pagelens.cli.main import main

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


@pytest.fixture
def sleeper() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "1000"])
    time.sleep(0.2)
    yield process.pid
    process.kill()
    process.wait()


def checked(name: str, text: str) -> Any:
    value = json.loads(text)
    jsonschema.validate(value, json.loads((SCHEMAS / f"{name}.json").read_text()))
    return value


def test_save_verify_look_and_roll_back(
    sleeper: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert main(["checkpoint", str(sleeper), "-o", one, "--format", "json"]) == 0
    done = checked("checkpoint", capsys.readouterr().out)
    assert done["pages"] == done["stored_pages"] + done["zero_pages"] > 10
    assert main(["checkpoint", str(sleeper), "-o", two, "--parent", one]) == 0
    assert "from its parents" in capsys.readouterr().out
    assert main(["verify", two, "--format", "json"]) == 0
    assert len(checked("verify", capsys.readouterr().out)["checked"]) == 2
    assert main(["map", one, "--format", "json"]) == 0
    names = [row["kind"] for row in json.loads(capsys.readouterr().out)]
    assert "stack" in names
    assert main(["pages", one, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["diff", one, one, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["rollback", str(sleeper), one, "--dry-run", "--format", "json"]) == 0
    assert checked("rollback", capsys.readouterr().out)["dry_run"] is True
    assert main(["rollback", str(sleeper), one, "--format", "json"]) == 0
    assert checked("rollback", capsys.readouterr().out)["compared_pages"] > 10
    stack = next(row for row in _rows(one) if row["kind"] == "stack")
    capsys.readouterr()
    assert main(["read", one, hex(int(stack["end"], 16) - 64), "64"]) == 0
    assert "sleep" in capsys.readouterr().out  # AT_EXECFN
    alone = str(Path(one).parent / "alone")
    capsys.readouterr()
    assert main(["merge", two, "-o", alone, "--format", "json"]) == 0
    assert checked("merge", capsys.readouterr().out) == {"merged": two, "to": alone}
    assert main(["prune", "--drop", one, "--keep", two, "--format", "json"]) == 0
    assert checked("prune", capsys.readouterr().out) == {
        "dropped": [one],
        "rewritten": [two],
        "gone": [],
    }
    capsys.readouterr()
    assert main(["verify", alone, "--format", "json"]) == 0
    assert checked("verify", capsys.readouterr().out)["checked"] == [alone]
    assert main(["verify", two]) == 0
    assert not Path(one).exists()


def test_diff_names_the_objects_whose_bytes_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "g.c"
    source.write_text(
        "#include <stdio.h>\nint counter = 5; static char table[20000]; long big[4096] = {1};\n"
        'int main(void){ puts("r"); fflush(stdout); while (getchar() > 0) { counter++; table[9000] = big[2000] = 1; }'
        "return 0; }\n"
    )
    subprocess.run(["gcc", "-g", "-o", tmp_path / "g", source], check=True)
    child = subprocess.Popen([tmp_path / "g"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdout.readline()
        one, two = str(tmp_path / "one"), str(tmp_path / "two")
        assert main(["checkpoint", str(child.pid), "-o", one]) == 0
        child.stdin.write(b"x")
        time.sleep(0.3)
        assert main(["checkpoint", str(child.pid), "-o", two]) == 0
        capsys.readouterr()
        assert main(["diff", one, two, "--format", "json"]) == 0
        names = {name for row in json.loads(capsys.readouterr().out) for name in row["symbols"]}
        assert {"counter (1)", "table (1)", "big (1)"} <= names
    finally:
        child.kill()
        child.communicate()


def _rows(path: str) -> list[dict[str, Any]]:
    out = Path(path).parent / "map.json"
    assert main(["map", path, "--format", "json", "-o", str(out)]) == 0
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["checkpoint", "PID"], 2, "-o DIR"),
        (["checkpoint", "PID", "ffff800000000000-ffff800000001000", "-o", "OUT"], 2, "kernel addresses"),
        (["checkpoint", "PID", "2000-1000", "-o", "OUT"], 2, "reversed"),
        (["checkpoint", "PID", "1000-2000", "-o", "OUT"], 2, "nothing is mapped"),
        (["checkpoint", "4194000", "-o", "OUT"], 4, "no process"),
        (["checkpoint", "PID", "-o", "/nowhere/x"], 2, "not a directory"),
        (["checkpoint", "PID", "-o", "OUT", "--parent", "/nowhere"], 2, "no checkpoint"),
        (["checkpoint", "PID", "-o", "OUT", "--every", "1", "--parent", "x"], 2, "--every"),
        (["checkpoint", "PID", "-o", "OUT", "--keep", "3"], 2, "--every S"),
        (["checkpoint", "PID", "-o", "OUT", "--zstd", "99"], 2, "0 (not compressed) to 22"),
        (["checkpoint", "PID", "-o", "OUT", "--every", "1", "--dedup"], 2, "do not go with --every"),
        (["read", "/tmp", "zz"], 2, "'zz' is no hexadecimal address"),
        (["verify", "/tmp"], 1, ""),
        (["read", "/nowhere", "1000"], 2, "no checkpoint"),
        (["rollback", "PID", "/nowhere"], 2, "no checkpoint"),
        (["export", "/tmp", "--to", "core", "-o", "OUT"], 2, "is no checkpoint"),
        (["prune"], 2, "nothing to do"),
        (["merge", "/nowhere", "-o", "OUT"], 2, "no checkpoint"),
        (["merge", "/nowhere"], 2, "-o OUT"),
    ],
)
def test_refusals(
    sleeper: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    says: str,
) -> None:
    filled = [w.replace("PID", str(sleeper)).replace("OUT", str(tmp_path / "out")) for w in words]
    try:
        result = main(filled)
    except SystemExit as error:  # argparse: a range that is none
        result = int(error.code or 0)
    assert result == code
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
