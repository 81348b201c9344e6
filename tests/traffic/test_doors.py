"""What passes by nfmasq, and the options by which the rules keep it from passing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from nfmasq import rules_script
from nfmasq.lab import Host, Lab
from tests.traffic.conftest import taking
from tests.traffic.observed import eventually

data_path = taking("queue", "routed", "direct")

PORTS = (5000, 61005)
"""A port of an inside host, and one that is a masquerade port, too."""


@pytest.fixture(params=["iptables-nft", "iptables-legacy"])
def iptables(request: pytest.FixtureRequest, lab: Lab) -> Iterator[str]:
    name: str = request.param
    yield name
    lab.rules("down", IPTABLES=name)


def datagrams(sender: Host, receiver: Host, address: str, port: int, family: int) -> int:
    """Return how many of three datagrams, sent one after the other, arrive within half a second."""
    with (
        closing(receiver.socket(family, socket.SOCK_DGRAM)) as server,
        closing(sender.socket(family, socket.SOCK_DGRAM)) as client,
    ):
        server.bind((address, port))
        server.settimeout(0.5)
        for _ in range(3):
            client.sendto(b"hello", (address, port))
        arrived = 0
        try:
            while arrived < 3:
                arrived += len(server.recv(100)) > 0
        except TimeoutError:
            pass
        return arrived


def pings(host: Host, address: str) -> bool:
    return host.run(["ping", "-c", "1", "-W", "5", address], check=False).returncode == 0


@contextmanager
def neighbour(lab: Lab) -> Iterator[Host]:
    """Have the router, which is on the outside network, know the way to the inside."""
    lab.router.ip(f"route add 10.77.0.0/24 via {lab.gateway.address}")
    try:
        yield lab.router
    finally:
        lab.router.ip("route delete 10.77.0.0/24")


def test_only_answers_keeps_neighbours_from_inside_hosts(lab: Lab, iptables: str) -> None:
    inside = lab.inside[0]
    lab.rules("up", "--other-protocols", IPTABLES=iptables)
    daemon = lab.nfmasq()
    try:
        with neighbour(lab) as router:
            for port in PORTS:
                assert datagrams(router, inside, inside.address, port, socket.AF_INET) == 3
            lab.rules("up", "--other-protocols", "--only-answers", IPTABLES=iptables)
            for port in PORTS:
                assert datagrams(router, inside, inside.address, port, socket.AF_INET) == 0
            silent = router.run(["ping", "-c", "1", "-W", "1", inside.address], check=False)
            assert silent.returncode != 0
        # What the inside asks for is answered, by the queue and by the kernel.
        for _ in range(3):
            assert pings(inside, lab.outside[0].address)
        assert pings(lab.outside[0], lab.gateway.address)
        answered = ["ping", "-q", "-c", "30", "-i", "0.01", "-W", "5", lab.outside[0].address]
        assert " 30 received" in inside.run(answered).stdout
    finally:
        daemon.stop()


def test_only_answers_knows_addresses_that_are_routed_to_the_gateway(
    lab: Lab, iptables: str
) -> None:
    maddr = "192.0.2.7"
    lab.router.ip(f"route add {maddr} via {lab.gateway.address}")
    for outside in lab.outside:
        outside.ip(f"route add {maddr} via {lab.router.interfaces['net']}")
    lab.rules("up", "--only-answers", f"--masquerade-address={maddr}", IPTABLES=iptables)
    daemon = lab.nfmasq(f"--masquerade-address={maddr}")
    try:
        assert pings(lab.inside[0], lab.outside[0].address)
    finally:
        daemon.stop()
        lab.router.ip(f"route delete {maddr}")
        for outside in lab.outside:
            outside.ip(f"route delete {maddr}")


def test_only_inside_drops_what_others_have_forwarded(lab: Lab, iptables: str) -> None:
    """For these rules `lan` is none of the inside."""
    script, outside = rules_script.find(), lab.outside[0]
    assert script

    def up(*options: str) -> None:
        sides = ["--inside", "other", "--outside", "wan", "--iptables", iptables]
        lab.gateway.run([script, "up", *sides, *options])

    up()
    assert datagrams(lab.inside[0], outside, outside.address, 5000, socket.AF_INET) == 3
    up("--only-inside")
    with lab.capture(lab.router, "wan", "src net 10.77.0.0/24") as leaked:
        assert datagrams(lab.inside[0], outside, outside.address, 5000, socket.AF_INET) == 0
        next_hop = lab.router.interfaces["wan"]
        assert datagrams(lab.gateway, lab.router, next_hop, 5000, socket.AF_INET) == 3
    assert leaked == []


@pytest.fixture
def six(lab: Lab) -> Iterator[Lab]:
    """Give the inside, the gateway and the router IPv6."""
    hosts = (lab.inside[0], lab.gateway, lab.router)
    for host in hosts:
        host.sysctl("net.ipv6.conf.all.disable_ipv6", 0)
    lab.gateway.sysctl("net.ipv6.conf.all.forwarding", 1)
    for host, interface, address in (
        (lab.inside[0], "eth0", "fd00:1::2"),
        (lab.gateway, "lan", "fd00:1::1"),
        (lab.gateway, "wan", "fd00:2::1"),
        (lab.router, "wan", "fd00:2::2"),
    ):
        host.ip(f"address add {address}/64 dev {interface} nodad")
    lab.inside[0].ip("route add default via fd00:1::1")
    lab.router.ip("route add fd00:1::/64 via fd00:2::1")
    assert eventually(lambda: pings(lab.inside[0], "fd00:1::1"))
    assert eventually(lambda: pings(lab.router, "fd00:2::1"))
    yield lab
    for host in hosts:
        host.sysctl("net.ipv6.conf.all.disable_ipv6", 1)


def saved(lab: Lab, iptables: str) -> str:
    text = lab.gateway.run([iptables.replace("ip", "ip6", 1) + "-save"]).stdout
    return "\n".join(line for line in text.splitlines() if line.startswith(("*", "-A")))


def test_no_ipv6_forward_drops_ipv6_between_the_sides(six: Lab, iptables: str) -> None:
    ways = [(six.inside[0], six.router, "fd00:2::2"), (six.router, six.inside[0], "fd00:1::2")]

    def passing() -> list[int]:
        return [datagrams(a, b, address, 5000, socket.AF_INET6) for a, b, address in ways]

    option = "--no-ipv6-forward"
    before = saved(six, iptables)
    six.rules("up", IPTABLES=iptables)
    assert passing() == [3, 3]
    assert six.rules("status", option, check=False, IPTABLES=iptables).returncode == 1
    for _ in range(2):
        six.rules("up", option, IPTABLES=iptables)
        six.rules("status", option, IPTABLES=iptables)
        assert passing() == [0, 0]
        assert pings(six.inside[0], "fd00:1::1")
    six.rules("up", IPTABLES=iptables)
    assert passing() == [3, 3]
    six.rules("up", option, IPTABLES=iptables)
    six.rules("down", IPTABLES=iptables)
    assert passing() == [3, 3]
    left = saved(six, iptables)
    # A table of iptables-legacy, once used, stays, empty.
    assert left == before or (iptables == "iptables-legacy" and left == "*filter")


def test_without_ip6tables_it_is_told_in_one_line(lab: Lab) -> None:
    done = lab.rules("up", "--no-ipv6-forward", check=False, IPTABLES="no-iptables")
    assert done.returncode == 1
    assert done.stderr == (
        "nfmasq-rules: --no-ipv6-forward takes no-ip6tables, which is not found: install iptables\n"
    )
