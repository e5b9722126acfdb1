"""What the comparison leaves out: a short list, each entry with the kernel code and the seed that made it necessary."""

import re
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "fidelity.md").read_text()


def test_the_list_is_short_and_each_entry_has_its_code_and_its_seed():
    lines = TEXT.partition("## What is left out\n\n")[2].partition("\n\n")[0].splitlines()
    assert 1 <= len(lines) <= 20
    entries = re.split(r"^\d+\. ", "\n".join(lines), flags=re.M)[1:]
    assert len(entries) == sum(line[0].isdigit() for line in lines)
    for entry in entries:
        assert re.search(r"\b[\w/]+\.[ch]\b", entry), entry
        assert re.search(r"\bseeds? \d", entry), entry
