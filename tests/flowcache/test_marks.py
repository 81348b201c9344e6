"""Which rules would be misled by the mark of the flow cache, and which would not."""

from __future__ import annotations

import subprocess

import pytest

from nfmasq.flowcache.marks import KNOWN_MARK, reader_of_marks
from nfmasq.rules import parse_rules


def reader(*rules: str) -> str | None:
    return reader_of_marks(parse_rules("\n".join(["*mangle", *rules, "COMMIT"])))


@pytest.mark.parametrize(
    "rule",
    [
        "-A FORWARD -m mark --mark 0x1 -j ACCEPT",
        "-A FORWARD -m mark --mark 0x1/0xffffffff -j ACCEPT",
        "-A FORWARD -m mark ! --mark 0x0 -j DROP",
        f"-A FORWARD -m mark --mark {KNOWN_MARK:#x}/{KNOWN_MARK:#x} -j DROP",
        "-A FORWARD -m mark --mark 7/0xff000000 -j ACCEPT",
        "-A PREROUTING -m connmark --mark 0x2 -j ACCEPT",
        "-A POSTROUTING -j CONNMARK --save-mark",
        "-A POSTROUTING -j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff",
        "-A FORWARD -m mark --mark what/ever -j ACCEPT",
    ],
)
def test_a_rule_that_reads_a_whole_mark_is_named(namespace: None, rule: str) -> None:
    named = reader("-A FORWARD -j ACCEPT", rule)
    assert named == f"the rule -t mangle {rule}"


@pytest.mark.parametrize(
    "rule",
    [
        "-A FORWARD -j ACCEPT",
        "-A FORWARD -m mark --mark 0x1/0xff -j ACCEPT",
        "-A FORWARD -j MARK --set-xmark 0x1/0xffffffff",
        "-A POSTROUTING -j CONNMARK --save-mark --nfmask 0xff --ctmask 0xff",
        f"-A NFMASQ-FORWARD -m mark --mark {KNOWN_MARK:#x}/{KNOWN_MARK:#x} -j RETURN",
    ],
)
def test_a_rule_that_masks_marks_does_not_notice(namespace: None, rule: str) -> None:
    assert reader(rule) is None


@pytest.mark.parametrize(
    ("fwmark", "notices"),
    [
        ("0x2", True),
        ("0x0/0xffffffff", True),
        ("0x2/0xff", False),
        (f"{KNOWN_MARK:#x}/{KNOWN_MARK:#x}", True),
    ],
)
def test_a_routing_rule_that_reads_a_whole_mark_is_named(
    namespace: None, fwmark: str, notices: bool
) -> None:
    command = f"ip rule {{}} fwmark {fwmark} table 100 priority 100"
    subprocess.run(command.format("add").split(), check=True)
    try:
        named = reader()
    finally:
        subprocess.run(command.format("delete").split(), check=True)
    assert (named is not None) == notices
    assert named is None or named.startswith("the routing rule of fwmark 0x")
