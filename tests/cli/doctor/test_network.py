"""What `nfmasq doctor` says of the interfaces."""

from __future__ import annotations

import pytest

from nfmasq.cli.doctor.network import Link, Network, Sides, carriers, overlapping_networks
from tests.cli.doctor.machine import levels, link

SIDES = Sides(["lan"], ["wan"])


LAN = link("lan", "10.0.0.1/24")
WAN = link("wan", "198.51.100.2/24")


def check(*links: Link, sides: Sides = SIDES, addresses: tuple[str, ...] = ()) -> list[str]:
    found = carriers(Network(links), sides, addresses, lambda sides: f"load {sides}")
    return [f"{finding.level}: {finding.what}" for finding in found]


class TestCarriers:
    def test_two_that_are_up_are_no_news(self) -> None:
        assert check(LAN, WAN) == []

    def test_one_that_is_down(self) -> None:
        assert check(link("lan", "10.0.0.1/24", is_up=False), WAN) == [
            "problem: lan (inside) is down"
        ]

    def test_one_without_a_carrier(self) -> None:
        assert check(LAN, link("wan", "198.51.100.2/24", has_carrier=False)) == [
            "problem: wan (outside) has no carrier"
        ]

    @pytest.mark.parametrize("name", ["ppp0", "ppp+"])
    def test_one_that_comes_later(self, name: str) -> None:
        assert check(LAN, sides=Sides(["lan"], [name])) == [
            f"warning: {name} (outside) is not there: nothing passes by it yet"
        ]

    def test_no_masquerade_address(self) -> None:
        [told] = check(LAN, link("wan"))
        assert told.startswith("problem: wan (outside) has no IPv4 address")
        assert check(LAN, link("wan"), addresses=("203.0.113.5",)) == []

    def test_no_inside_address_and_another_interface_that_has_one(self) -> None:
        network = Network([link("dmz"), WAN, LAN])
        [found] = carriers(network, Sides(["dmz"], ["wan"]), (), str)
        assert found.what.startswith("dmz (inside) has no IPv4 address")
        assert found.commands == (str(Sides(["lan"], ["wan"])),)


class TestHosts:
    @pytest.mark.parametrize(
        ("lan", "host"),
        [
            (link("lan", "10.0.0.1/24"), "10.0.0.3"),
            (link("lan", "10.0.0.1/24", neighbours=("10.0.0.9",)), "10.0.0.9"),
            (link("lan", "10.0.0.1/24", neighbours=("10.1.0.9",)), "10.0.0.3"),
            (link("lan", "10.0.0.1/32"), None),
            (link("lan"), None),
        ],
        ids=["any", "known", "known elsewhere", "no network", "no address"],
    )
    def test_a_host_beyond_is_never_this_machine(self, lan: Link, host: str | None) -> None:
        network = Network([lan, link("wan", "10.0.0.2/8")])
        found = network.host_beyond(lan)
        assert (found and str(found)) == host


class TestOverlappingNetworks:
    @pytest.mark.parametrize(("outside", "told"), [("wan", True), ("wa+", True), ("ppp+", False)])
    def test_they_are_told(self, outside: str, told: bool) -> None:
        network = Network([link("lan", "10.0.0.1/8"), link("wan", "10.1.0.2/16")])
        found = overlapping_networks(network, Sides(["lan"], [outside]))
        assert levels(found) == ["warning"] * told
