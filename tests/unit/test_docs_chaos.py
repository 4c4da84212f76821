"""The page about what survives names tests that there are, for every fault."""

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs" / "chaos.md"
NUM_FAULTS = 20


def test_every_fault_has_tests_and_all_of_them_exist() -> None:
    table = PAGE.read_text().partition("## Every fault and its tests")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == NUM_FAULTS
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            assert re.search(rf"^(async )?def {name}\(", (TESTS / path).read_text(), re.M), name
