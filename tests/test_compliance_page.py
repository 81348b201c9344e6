"""The page docs/rfc-compliance.md has all requirements, and the tests that it names exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "rfc-compliance.md"

REQUIREMENTS = {
    4787: "1 2 3 3a 4 5 5a 5b 5c 6 6a 7 8 8a 9 9a 10 10a 11 12 12a 12b 13 13a 14 14a",
    5382: "1 2 2a 3 3a 3b 4 4a 5 5a 6 7 8 8a 9 10",
    5508: "1 1a 2 2a 3 3a 3b 3c 3d 4 4a 4b 4c 5 5a 5b 5c 6 7 7a 8 9 10 10a 10b 10c 10d 10e 10f 11",
    7857: "2 2.1 2.2 3 4 5 6 7 7.1 8 9 10 11 12",
}
"""The requirements by RFC: their numbers, as in REQ-1; of RFC 7857, the sections that have any."""

LEVELS = {"MUST", "SHOULD", "RECOMMENDED", "MAY"}
NONE = "none"


class Row(NamedTuple):
    """A line of the page's tables."""

    rfc: int
    requirement: str
    levels: set[str]
    asks: str
    does: str
    tests: str

    def __str__(self) -> str:
        return f"{self.rfc} {self.requirement}"


def rows() -> Iterator[Row]:
    rfc = 0
    for line in PAGE.read_text().splitlines():
        if heading := re.match(r"## RFC (\d+)", line):
            rfc = int(heading[1])
        elif line.startswith("| ") and not line.startswith(("| | ", "| --- ")):
            requirement, level, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            yield Row(rfc, requirement, set(level.split(", ")), *rest)


EACH_ROW = pytest.mark.parametrize("row", list(rows()), ids=str)


@cache
def names_in(file: Path) -> set[str]:
    """Return the names of a file's tests: `test_it`, or `TestThat::test_it`."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        within = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        names |= {prefix + test.name for test in within if isinstance(test, ast.FunctionDef)}
    return names


def is_there(test: str) -> bool:
    """Say whether a test exists: `test` is a file below `tests/` and the test's name in it."""
    file, _, name = test.partition("::")
    return (TESTS / file).is_file() and name.startswith("test_") and name in names_in(TESTS / file)


@pytest.mark.parametrize("rfc", REQUIREMENTS)
def test_the_page_has_each_requirement_in_its_order(rfc: int) -> None:
    found = [re.sub(r"^REQ-| \(\d\)$", "", row.requirement) for row in rows() if row.rfc == rfc]
    assert list(dict.fromkeys(found)) == REQUIREMENTS[rfc].split()


@EACH_ROW
def test_each_test_that_the_page_names_is_there(row: Row) -> None:
    named = row.tests.split()
    if named != [NONE]:
        assert named
        assert [test for test in named if not is_there(test.strip("`"))] == []


@EACH_ROW
def test_what_is_more_than_allowed_is_shown_on_real_packets(row: Row) -> None:
    assert row.levels
    assert row.levels <= LEVELS
    assert row.asks
    assert row.does
    if row.levels != {"MAY"} and not row.does.startswith("Not applicable:"):
        assert "`traffic/" in row.tests


def test_a_test_that_is_not_there_is_noticed() -> None:
    this = Path(__file__).name
    assert is_there(f"{this}::test_a_test_that_is_not_there_is_noticed")
    assert not is_there(f"{this}::test_nothing")
    assert not is_there(f"{this}::names_in")
    assert not is_there(f"nowhere/{this}::test_a_test_that_is_not_there_is_noticed")
    assert not is_there(this)
