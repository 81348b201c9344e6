"""Rules: names of interfaces, which of them may mean the same, and ways that lead to a queue."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.rules import is_interface, overlap, parse_rules, ways_to_queue

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


def printed(*options: str) -> str:
    line: list[str | Path] = [SCRIPT, "print", "--inside=lan", "--outside=wan", *options]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


WAYS = {
    ("raw", "PREROUTING"),
    ("raw", "OUTPUT"),
    ("security", "FORWARD"),
    ("security", "OUTPUT"),
}


@pytest.mark.parametrize(
    "options", [[], ["--other-protocols", "--forward=tcp:80"]], ids=["", "more"]
)
def test_rules_lead_to_the_queue_from_the_chains_of_the_kernel(options: list[str]) -> None:
    saved = printed(*options, "--queue=7").replace("-I ", "-A ").replace(" 1 -j", " -j")
    rules = list(parse_rules(saved))
    assert ways_to_queue(rules, 7) == WAYS
    assert ways_to_queue(rules, 0) == set()
    for way in WAYS:
        without = [rule for rule in rules if (rule.table, rule.chain) != way]
        assert ways_to_queue(without, 7) == WAYS - {way}


def test_no_way_leads_round_in_a_circle() -> None:
    circle = "*raw\n-A a -j b\n-A b -j a\n-A b -g c\n-A c -j NFQUEUE --queue-num 0\nCOMMIT\n"
    assert ways_to_queue(list(parse_rules(circle)), 0) == set()


@given(
    st.sets(
        st.sampled_from(
            [
                *("--clamp-mss", "--no-checksum-fill", "--other-protocols", "--forward=tcp:80"),
                *("--no-flow-cache", "--only-inside", "--only-answers", "--queue=9"),
            ]
        )
    )
)
def test_no_option_changes_which_tables_look_at_packets(options: set[str]) -> None:
    """Where a table begins or ends to look at them, packets that wait in the queue are lost."""

    def jumps(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith(("*", "-I"))]

    assert jumps(printed(*options)) == jumps(printed())
