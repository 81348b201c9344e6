"""Which NAT of others `nfmasq doctor` tells of."""

from __future__ import annotations

from typing import Any

import pytest

from nfmasq import config
from nfmasq.cli.doctor.finding import Finding
from nfmasq.cli.doctor.network import Link, Network, sides_of
from nfmasq.cli.doctor.tables import Saved, Tables
from nfmasq.cli.doctor.translations import foreign_translations
from nfmasq.rules import parse_rules
from tests.cli.doctor.machine import OURS, WANTED, levels, link

LAN = link("lan", "10.0.0.1/24")
WAN = link("wan", "198.51.100.2/24")
FORWARDING = config.load(
    None, {"forward": ["tcp:8080=10.0.0.2:80", "udp:198.51.100.2:5060=10.0.0.2:5060"]}
).as_table()


def check_foreign(
    rule: str,
    ours: str = OURS,
    wanted: dict[str, Any] = WANTED,
    network: tuple[Link, ...] = (LAN, WAN),
) -> list[Finding]:
    saved = f"{ours}*nat\n{rule}\nCOMMIT\n"
    rules = list(parse_rules(saved))
    tables = Tables([Saved("iptables", saved, rules)], [], "")
    sides = sides_of(wanted, [rule for rule in rules if rule.our_chain])
    return list(foreign_translations(tables, Network(network), sides, wanted))


class TestForeignTranslations:
    @pytest.mark.parametrize(
        ("rule", "level"),
        [
            ("-A POSTROUTING -o wan -j MASQUERADE", "problem"),
            ("-A POSTROUTING -s 198.51.0.0/16 -o wan -j MASQUERADE", "problem"),
            ("-A POSTROUTING -s 10.0.0.0/24 -o wan -j MASQUERADE", "note"),
            ("-A POSTROUTING -j SNAT --to-source 198.51.100.2", "problem"),
            ("-A POSTROUTING -s 10.0.0.0/8 ! -o docker0 -j MASQUERADE", "note"),
        ],
    )
    def test_they_are_told(self, rule: str, level: str) -> None:
        [finding] = check_foreign(rule)

        assert finding.level == level
        assert f"-t nat {rule}" in finding.what

    @pytest.mark.parametrize(
        "rule",
        [
            "-A POSTROUTING -o vpn -j MASQUERADE",
            "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
            "-A PREROUTING -i wan -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.5",
            "-A POSTROUTING -m comment --comment MASQUERADE -j ACCEPT",
        ],
    )
    def test_what_translates_no_source_of_ours_is_not(self, rule: str) -> None:
        assert check_foreign(rule) == []

    @pytest.mark.parametrize(
        ("ours", "theirs", "found"),
        [("ppp+", "ppp0", 1), ("ppp0", "ppp+", 1), ("ppp+", "pp+", 1), ("ppp+", "wan", 0)],
    )
    def test_a_rule_may_name_the_beginning_of_an_interface(
        self, ours: str, theirs: str, found: int
    ) -> None:
        rule = f"-A POSTROUTING -o {theirs} -j MASQUERADE"
        rules = OURS.replace("wan", ours)
        assert levels(check_foreign(rule, rules)) == ["problem"] * found

    def test_the_command_removes_the_rule(self) -> None:
        [finding] = check_foreign("-A POSTROUTING -o wan -j MASQUERADE")
        assert finding.commands[0].endswith("iptables -t nat -D POSTROUTING -o wan -j MASQUERADE")

    def test_where_no_address_is_known_each_may_be_meant(self) -> None:
        rule = "-A POSTROUTING -s 10.0.0.0/24 -o wan -j MASQUERADE"
        assert levels(check_foreign(rule, network=())) == ["problem"]

    def test_a_given_masquerade_address_counts(self) -> None:
        wanted = WANTED | {"masquerade-address": ["203.0.113.5"]}
        rule = "-A POSTROUTING -s 203.0.113.0/24 -j MASQUERADE"
        assert levels(check_foreign(rule, wanted=wanted)) == ["problem"]
        assert check_foreign(rule) == []


class TestOtherDestinations:
    """Rules of Docker, miniupnpd and the like that lead ports elsewhere."""

    DOCKER = "-A DOCKER ! -i docker0 -p {} -m {} --dport {} -j DNAT --to-destination 172.17.0.2:80"

    @pytest.mark.parametrize(
        ("protocol", "port", "expected"),
        [
            ("tcp", "8080", ["problem"]),
            ("udp", "5060", ["problem"]),
            ("tcp", "8000:8100", ["problem"]),
            ("udp", "8080", []),
            ("tcp", "8081", []),
            ("tcp", "61005", ["warning"]),
            ("tcp", "60999", []),
        ],
    )
    def test_they_are_told_where_nfmasq_takes_the_port(
        self, protocol: str, port: str, expected: list[str]
    ) -> None:
        rule = self.DOCKER.format(protocol, protocol, port)
        assert levels(check_foreign(rule, wanted=FORWARDING)) == expected

    @pytest.mark.parametrize(
        "rule",
        [
            "-A PREROUTING -i lan -p tcp -m tcp --dport 8080 -j REDIRECT --to-ports 3128",
            "-A DOCKER -d 127.0.0.1 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.9.0.2",
            "-A PREROUTING -d 198.51.100.9/32 -j DNAT --to-destination 10.0.0.9",
        ],
        ids=["from the inside", "for this machine alone", "all ports of another address"],
    )
    def test_what_is_for_others_is_not(self, rule: str) -> None:
        assert check_foreign(rule, wanted=FORWARDING) == []
