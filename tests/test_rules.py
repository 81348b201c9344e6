"""Names of interfaces as rules have them: what is one, and which may mean the same."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.rules import is_interface, overlap

SCRIPT = Path(__file__).parents[1] / "iptables" / "nfmasq-rules"

interfaces = st.from_regex(r"[ab]{1,3}\+?", fullmatch=True)


@given(interfaces, st.lists(st.text("ab", min_size=1, max_size=5), max_size=30))
def test_two_names_overlap_where_an_interface_has_both(name: str, present: list[str]) -> None:
    def means(written: str, interface: str) -> bool:
        if written.endswith("+"):
            return interface.startswith(written[:-1])
        return interface == written

    for interface in present:
        assert overlap(name, interface) == means(name, interface)
        assert overlap(interface, name) == means(name, interface)


@given(st.text("ab", min_size=1), st.text("ab", min_size=1))
def test_two_beginnings_overlap_where_one_begins_with_the_other(one: str, other: str) -> None:
    begins = one.startswith(other) or other.startswith(one)
    assert overlap(f"{one}+", f"{other}+") == begins


RIGHT = ["a", "a+", "eth0.7", "br-lan", "wg_0", "x" * 15, "x" * 14 + "+"]
WRONG = ["", "+", "a++", "p+p", ".", "..", "..+", "-a", "a b", "a/b", "a:1", "a\n", "ä", "x" * 16]


@pytest.mark.parametrize("name", [*RIGHT, *WRONG, "x" * 15 + "+"])
def test_the_script_takes_the_same_names(name: str) -> None:
    printed = subprocess.run(
        [SCRIPT, "print", f"--inside={name}", "--outside=zz"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert is_interface(name) == (name in RIGHT)
    assert (printed.returncode == 0) == (name in RIGHT)
