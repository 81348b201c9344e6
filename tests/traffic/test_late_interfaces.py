"""Interfaces that come when the rules are loaded and nfmasq runs: PPP, VPNs, VLANs and the like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from socket import SOCK_DGRAM

import pytest

from nfmasq.lab import Lab
from tests.traffic.clients import connected, echoed
from tests.traffic.observed import eventually
from tests.traffic.servers import ECHO_PORT, Visitor

UPLINK, FAR_END = "192.0.2.2", "192.0.2.1"


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    # How packets come out of the queue makes no difference.
    return ()


@pytest.fixture
def dial(lab: Lab) -> Iterator[Callable[[], None]]:
    """Yield a function that makes a second line to the outside, ppp0, the way that all goes."""
    gateway, router = lab.gateway, lab.router

    def up() -> None:
        gateway.ip(f"link add ppp0 type veth peer name far netns {router.namespace}")
        router.ip(f"address add {FAR_END}/24 dev far")
        router.ip("link set far up")
        gateway.ip(f"address add {UPLINK}/24 dev ppp0")
        gateway.ip("link set ppp0 up")
        gateway.ip(f"route replace default via {FAR_END}")
        for host in lab.outside:
            host.ip(f"route replace 192.0.2.0/24 via {router.interfaces['net']}")

    yield up
    gateway.ip(f"route replace default via {router.interfaces['wan']}")
    gateway.ip("link delete ppp0")


@pytest.mark.parametrize(
    ("loads", "name", "iptables"),
    [
        ("the script", "ppp0", "iptables-nft"),
        ("the script", "ppp+", "iptables-legacy"),
        ("run", "ppp+", "iptables-nft"),
        ("run", "ppp0", "iptables-legacy"),
    ],
)
def test_what_leaves_by_an_interface_that_came_later_is_masqueraded(
    lab: Lab,
    dial: Callable[[], None],
    visitors: list[Visitor],
    loads: str,
    name: str,
    iptables: str,
) -> None:
    if loads == "run":
        sides = ["--inside", "lan", "--outside", name]
        daemon = lab.nfmasq(*sides, "--iptables", iptables)
        assert f"not there yet: {name} (" in daemon.log.read_text()
    else:
        lab.rules("up", "--outside", name, IPTABLES=iptables)
        daemon = lab.nfmasq()
    try:
        dial()
        all_goes_by_the_new_line(lab, visitors)
    finally:
        daemon.stop()
        lab.rules("down", IPTABLES=iptables)


def all_goes_by_the_new_line(lab: Lab, visitors: list[Visitor]) -> None:
    """Ask an outside host from the inside: it answers, and sees the address of the new line."""
    outside = lab.outside[0]
    ping = ["ping", "-c", "1", "-W", "1", outside.address]
    with lab.capture(lab.router, "far") as seen:
        # What leaves before nfmasq knows the new address is dropped.
        assert eventually(lambda: lab.inside[0].run(ping, check=False).returncode == 0)
        with connected(lab.inside[0], SOCK_DGRAM, outside, ECHO_PORT) as client:
            assert echoed(client)
    assert {str(IPv4Address(packet.data[12:16])) for packet in seen} == {UPLINK, outside.address}
    assert {address for address, _ in visitors} == {UPLINK}
