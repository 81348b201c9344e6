"""The gateway's outside network has the same addresses as its inside network (RFC 4787 REQ-7).

    inside1 .11 ──┐                           ┌── .254 router ── 203.0.113.0/24
    inside2 .12 ──┼── .1 gateway .2 ──────────┤
                  │                           └── .11 a neighbour
             10.77.0.0/24                10.77.0.0/24

The gateway tells the two networks apart by its routes. For an inside host, the neighbour's own
address is an inside address. So an inside host reaches the neighbour by the address that the world
knows the neighbour by, and that the router translates (the "first-level NAT" of REQ-7's
justification). All this is true for the inside host with the neighbour's own address, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from socket import AF_INET, SOCK_DGRAM

import pytest

from nfmasq.lab import Lab
from tests.traffic.servers import ECHO_PORT, Visitor, WebServer, udp_echo, web_server

GATEWAY, NEIGHBOUR, ROUTER = "10.77.0.2", "10.77.0.11", "10.77.0.254"
PORT = 4000

INSIDE_HOSTS = pytest.mark.parametrize("number", [0, 1], ids=["the neighbour's number", "another"])


@pytest.fixture(scope="module")
def conflicting(lab: Lab) -> Lab:
    for line in (
        "address flush dev wan",
        f"address add {GATEWAY}/32 dev wan",
        f"route add {ROUTER}/32 dev wan src {GATEWAY}",
        f"route add default via {ROUTER} dev wan src {GATEWAY}",
    ):
        lab.gateway.ip(line)
    lab.gateway.sysctl("net.ipv4.conf.wan.rp_filter", 0)
    lab.router.ip("address flush dev wan")
    lab.router.ip(f"address add {ROUTER}/24 dev wan")
    lab.router.ip(f"address add {NEIGHBOUR}/24 dev wan")
    public = lab.router.interfaces["net"]
    known_as = f"-d {public} -p udp --dport {PORT} -j DNAT --to-destination {NEIGHBOUR}:{PORT}"
    lab.router.run(["iptables", "-t", "nat", "-A", "PREROUTING", *known_as.split()])
    for host in lab.outside:
        host.ip(f"route add 10.77.0.0/24 via {lab.router.interfaces['net']}")
    return lab


@pytest.fixture(scope="module", autouse=True)
def _masquerading(conflicting: Lab) -> Iterator[None]:
    with conflicting.masquerading():
        yield


@pytest.fixture(scope="module")
def visitors(conflicting: Lab) -> Iterator[list[Visitor]]:
    with udp_echo(conflicting.outside[0]) as visitors:
        yield visitors


@pytest.fixture(scope="module")
def web(conflicting: Lab) -> Iterator[WebServer]:
    with web_server(conflicting.outside[0]) as web:
        web.files["/page"] = b"Here I am.\n"
        yield web


@INSIDE_HOSTS
def test_every_inside_host_reaches_the_outside(
    lab: Lab, visitors: list[Visitor], web: WebServer, number: int
) -> None:
    host = lab.inside[number]
    with host.socket(AF_INET, SOCK_DGRAM) as client:
        client.sendto(b"hello", (lab.outside[0].address, ECHO_PORT))
        assert client.recv(100) == b"hello"
    assert visitors[-1][0] == GATEWAY
    assert host.run(["curl", "-sSf", "--max-time", "5", f"{web.url}/page"]).stdout == "Here I am.\n"
    assert web.visitors[-1][0] == GATEWAY
    assert "1 received" in host.run(["ping", "-c", "1", lab.outside[0].address]).stdout
    way = host.run(["traceroute", "-n", "-q", "1", "-w", "2", lab.outside[0].address]).stdout
    assert ROUTER in way


@INSIDE_HOSTS
def test_every_inside_host_reaches_a_neighbour_by_the_address_that_the_world_knows_it_by(
    lab: Lab, number: int
) -> None:
    public = lab.router.interfaces["net"]
    with (
        lab.router.socket(AF_INET, SOCK_DGRAM) as neighbour,
        lab.inside[number].socket(AF_INET, SOCK_DGRAM) as client,
    ):
        neighbour.bind((NEIGHBOUR, PORT))
        client.sendto(b"hello", (public, PORT))
        data, visitor = neighbour.recvfrom(100)
        assert (data, visitor[0]) == (b"hello", GATEWAY)
        neighbour.sendto(b"welcome", visitor)
        assert client.recvfrom(100) == (b"welcome", (public, PORT))
