"""What `nfmasq doctor` says of the ways by which packets pass without nfmasq."""

from __future__ import annotations

from pathlib import Path

import pytest

from nfmasq.cli.doctor import machine as kernel
from nfmasq.cli.doctor.doors import open_doors
from nfmasq.cli.doctor.network import Network, Sides
from nfmasq.cli.doctor.tables import NftTable, Saved, Tables
from nfmasq.rules import parse_rules
from tests.cli.doctor.machine import WANTED, link, nfmasq_rules

INSIDE_AND_OUTSIDE = [link("lan", "10.0.0.1/24"), link("wan", "198.51.100.2/24")]
DMZ = link("dmz", "192.0.2.1/24")


@pytest.fixture(autouse=True)
def ipv6(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Forward IPv6; returns the file that says so."""
    monkeypatch.setattr(kernel, "SYSCTLS", tmp_path)
    file = tmp_path / "ipv6" / "conf" / "all" / "forwarding"
    file.parent.mkdir(parents=True)
    file.write_text("1\n")
    return file


def doors(
    saved: str, *, dmz: bool = True, nft: str = "", ipv6_forward: bool = True
) -> list[tuple[str, str]]:
    """Return the level of each finding, and the option that closes the door."""
    rules = list(parse_rules(saved))
    tables = Tables(
        [Saved("iptables", saved, rules)], [NftTable("inet", "filter", nft)] if nft else [], ""
    )
    found = open_doors(
        tables,
        [rule for rule in rules if rule.our_chain],
        Network([*INSIDE_AND_OUTSIDE, *([DMZ] if dmz else [])]),
        Sides(["lan"], ["wan"]),
        WANTED | {"ipv6-forward": ipv6_forward},
    )
    return [(each.level, each.advice.split(": ")[1].split(",")[0]) for each in found]


def note(option: str) -> tuple[str, str]:
    return "note", option


def test_each_door_that_is_open_is_a_note(ipv6: Path) -> None:
    inside, answers, six = map(note, ("--only-inside", "--only-answers", "--no-ipv6-forward"))
    assert doors(nfmasq_rules()) == [inside, answers, six]
    assert doors(nfmasq_rules("--only-inside")) == [answers, six]
    assert doors(nfmasq_rules("--only-answers")) == [inside, six]
    assert doors(nfmasq_rules(), ipv6_forward=False) == [inside, answers]
    ipv6.write_text("0\n")
    assert doors(nfmasq_rules()) == [inside, answers]


def test_without_other_interfaces_nobody_else_is_forwarded() -> None:
    assert note("--only-inside") not in doors(nfmasq_rules(), dmz=False)


@pytest.mark.parametrize(
    ("saved", "nft"),
    [
        ("*filter\n:FORWARD DROP [0:0]\nCOMMIT\n", ""),
        ("", "chain f {\n\ttype filter hook forward priority filter; policy drop;\n}"),
    ],
)
def test_a_firewall_decides_about_the_outside_network(saved: str, nft: str) -> None:
    assert note("--only-answers") not in doors(saved + nfmasq_rules(), nft=nft)


def test_without_rules_there_is_nothing_to_say() -> None:
    assert doors("") == []
