"""Inside hosts reach each other by their outside addresses and ports: hairpinning.

The hosts learn their outside endpoints from a server outside, as peer-to-peer programs do. Nearly
everything is tried with both hosts on one bridge and with each behind an interface of its own,
without a firewall and beside a stateful one, which is told nothing but that inside hosts may open
connections to each other.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from hashlib import sha256
from ipaddress import IPv4Address
from pathlib import Path
from typing import TypeAlias

import pytest

from nfmasq.lab import Daemon, Host, Lab, Packet
from tests.packets import Endpoint, destination, quoted, source, source_address
from tests.traffic.clients import BRIEFLY, PATIENCE
from tests.traffic.observed import entries, eventually, figure
from tests.traffic.servers import web_server

GATEWAY = "198.51.100.2"
SECOND_ADDRESS = "198.51.100.3"
ROUTED_ADDRESS = "192.0.2.7"
RENDEZVOUS = 3478
LARGE = 8_000_000  # bytes

OPEN = ("--filtering", "endpoint-independent")
"""The filtering that lets everybody in at a port that is in use."""

Rendezvous: TypeAlias = "Callable[[socket.socket], Endpoint]"
"""A function that returns the outside endpoint of an inside host's UDP socket, as a server outside
sees it."""

LISTEN, TIME_WAIT = "0A", "06"  # as /proc/net/tcp has them

IP_RECVERR = 11
IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2

FIREWALL = """\
*filter
:INPUT DROP
:FORWARD DROP
:OUTPUT DROP
-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A INPUT -m conntrack --ctstate INVALID -j DROP
-A INPUT -i lan+ -j ACCEPT
-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A FORWARD -m conntrack --ctstate INVALID -j DROP
-A FORWARD -i lan+ -m conntrack --ctstate NEW -j ACCEPT
-A OUTPUT -m conntrack --ctstate INVALID -j DROP
-A OUTPUT -j ACCEPT
COMMIT
"""
NO_FIREWALL = "*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\nCOMMIT\n"


@pytest.fixture(scope="module", params=["one bridge", "two interfaces"])
def lab(request: pytest.FixtureRequest, data_path: tuple[str, ...]) -> Iterator[Lab]:
    with Lab(inside=2, outside=1, options=data_path) as lab:
        # The kernel counts redirects with errors, and keeps silent after many.
        lab.gateway.sysctl("net.ipv4.icmp_ratelimit", 0)
        if request.param == "two interfaces":
            put_apart(lab)
        yield lab


def put_apart(lab: Lab) -> None:
    """Put the second inside host into a network of its own, behind the interface lan2."""
    one, other = lab.inside
    lab.gateway.ip("link set lan2 nomaster")
    one.ip("neigh flush all")  # a bridge's hardware address is one of its ports'
    lab.gateway.ip("address add 10.78.0.1/24 dev lan2")
    other.ip("address flush dev eth0")
    other.ip("address add 10.78.0.12/24 dev eth0")
    other.ip("route add default via 10.78.0.1")
    other.interfaces["eth0"] = other.address = "10.78.0.12"


@pytest.fixture(scope="module", params=["no firewall", "stateful firewall"])
def firewall(request: pytest.FixtureRequest, lab: Lab) -> Iterator[None]:
    if request.param == "stateful firewall":
        lab.gateway.run(["iptables-restore"], input=FIREWALL)
    yield
    lab.gateway.run(["iptables-restore"], input=NO_FIREWALL)
    if request.param == "stateful firewall":
        lab.gateway.run(["conntrack", "-F"])


@contextmanager
def masquerading(lab: Lab, *options: str, rules: tuple[str, ...] = ()) -> Iterator[Daemon]:
    """Masquerade within the block, and until every TCP connection in it is at its end.

    Else the last packets of one are lost with nfmasq, and sent again and again into later tests.
    """
    lab.rules("up", "--inside", "lan2", *rules)
    daemon = lab.nfmasq(*options)
    try:
        yield daemon
        assert eventually(lambda: all(map(has_no_connection, lab.hosts)))
    finally:
        daemon.stop()
        lab.rules("down")


def has_no_connection(host: Host) -> bool:
    """Whether no TCP connection of the host has anything to send, unless it is asked."""
    _, *sockets = host.call(Path("/proc/thread-self/net/tcp").read_text).splitlines()
    return {line.split()[3] for line in sockets} <= {LISTEN, TIME_WAIT}


@pytest.fixture
def open_to_all(lab: Lab, firewall: None) -> Iterator[Daemon]:
    with masquerading(lab, *OPEN) as daemon:
        yield daemon


@pytest.fixture
def rendezvous(lab: Lab) -> Iterator[Rendezvous]:
    with rendezvous_outside(lab) as outside_endpoint:
        yield outside_endpoint


@contextmanager
def rendezvous_outside(lab: Lab) -> Iterator[Rendezvous]:
    with lab.outside[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("", RENDEZVOUS))

        def outside_endpoint(client: socket.socket) -> Endpoint:
            client.sendto(b"who am I?", (lab.outside[0].address, RENDEZVOUS))
            seen: Endpoint = server.recvfrom(100)[1]
            return seen

        yield outside_endpoint


def udp_socket(host: Host) -> socket.socket:
    return host.socket(socket.AF_INET, socket.SOCK_DGRAM)


def wire_of(lab: Lab, host: Host, expression: str = "ip") -> AbstractContextManager[list[Packet]]:
    """Capture what a host sends and gets, without the packets of others that a bridge shows it."""
    return lab.capture(host, "eth0", f"host {host.address} and {expression}")


def names(packets: list[Packet], host: Host) -> list[Packet]:
    """Return the packets that have a host's inside address anywhere."""
    return [packet for packet in packets if IPv4Address(host.address).packed in packet.data]


def are_on_one_bridge(lab: Lab) -> bool:
    one, other = (IPv4Address(host.address).packed[:3] for host in lab.inside)
    return one == other


# -- UDP -------------------------------------------------------------------------


@pytest.mark.usefixtures("open_to_all")
def test_each_sees_the_other_s_outside_address_and_port(lab: Lab, rendezvous: Rendezvous) -> None:
    """RFC 4787, REQ-9a. Neither host sees the other's inside address on its wire."""
    one, other = lab.inside
    with (
        udp_socket(one) as mine,
        udp_socket(other) as theirs,
        wire_of(lab, one) as wire,
        wire_of(lab, other) as others_wire,
    ):
        my_endpoint, their_endpoint = rendezvous(mine), rendezvous(theirs)
        mine.sendto(b"hello", their_endpoint)
        assert theirs.recvfrom(100) == (b"hello", my_endpoint)
        theirs.sendto(b"hello yourself", my_endpoint)
        assert mine.recvfrom(100) == (b"hello yourself", their_endpoint)
    assert my_endpoint[0] == their_endpoint[0] == GATEWAY
    assert len(wire) == len(others_wire) == 3
    assert names(wire, other) == []
    assert names(others_wire, one) == []


@pytest.mark.usefixtures("open_to_all")
def test_a_host_reaches_itself(lab: Lab, rendezvous: Rendezvous) -> None:
    """A STUN client does this to learn whether the NAT hairpins: from another or the same port."""
    with udp_socket(lab.inside[0]) as one, udp_socket(lab.inside[0]) as other:
        for receiver in (one, other):
            endpoint = rendezvous(receiver)
            one.sendto(b"it is me", endpoint)
            assert receiver.recvfrom(100) == (b"it is me", rendezvous(one))


@pytest.mark.usefixtures("open_to_all")
@pytest.mark.parametrize("size", [0, 1, 1472, 5000, 65_507])
def test_datagrams_of_any_size(lab: Lab, rendezvous: Rendezvous, size: int) -> None:
    """Long datagrams travel in fragments; NFQUEUE has no room for the end of the longest."""
    one, other = lab.inside
    data = os.urandom(size)
    with udp_socket(one) as mine, udp_socket(other) as theirs:
        my_endpoint, their_endpoint = rendezvous(mine), rendezvous(theirs)
        mine.sendto(data, their_endpoint)
        assert theirs.recvfrom(65535) == (data, my_endpoint)
        theirs.sendto(data, my_endpoint)
        assert mine.recvfrom(65535) == (data, their_endpoint)


@pytest.mark.usefixtures("open_to_all")
def test_datagrams_sent_in_one_piece(lab: Lab, rendezvous: Rendezvous) -> None:
    """QUIC sends datagrams as a superpacket over UDP."""
    one, other = lab.inside
    data = os.urandom(20_500)
    with udp_socket(one) as mine, udp_socket(other) as theirs:
        their_endpoint = rendezvous(theirs)
        mine.setsockopt(socket.IPPROTO_UDP, 103, 1000)  # UDP_SEGMENT, udp(7)
        mine.sendto(data, their_endpoint)
        pieces = [theirs.recv(65535) for _ in range(21)]
    assert b"".join(pieces) == data


# -- filtering -------------------------------------------------------------------


def arrives(
    mine: socket.socket, their_endpoint: Endpoint, theirs: socket.socket, patience: float
) -> bool:
    mine.sendto(b"may I?", their_endpoint)
    theirs.settimeout(patience)
    try:
        return theirs.recv(100) == b"may I?"
    except TimeoutError:
        return False


@pytest.mark.parametrize(
    ("filtering", "admitted_before", "admitted_by_address"),
    [
        ("endpoint-independent", True, True),
        ("address-dependent", False, True),
        ("address-and-port-dependent", False, False),
    ],
)
def test_the_filtering_is_the_same_as_for_packets_from_outside(
    lab: Lab,
    rendezvous: Rendezvous,
    filtering: str,
    admitted_before: bool,
    admitted_by_address: bool,
) -> None:
    """The receiver sees the sender at the gateway's address; hole punching lets it in at last."""
    one, other = lab.inside
    with (
        masquerading(lab, "--filtering", filtering) as daemon,
        udp_socket(one) as mine,
        udp_socket(one) as elsewhere,
        udp_socket(other) as theirs,
    ):
        my_endpoint, their_endpoint = rendezvous(mine), rendezvous(theirs)
        patience = PATIENCE if admitted_before else BRIEFLY
        assert arrives(mine, their_endpoint, theirs, patience) is admitted_before
        filtered = partial(figure, daemon, "nfmasq_errors_total", reason="filtered")
        assert eventually(lambda: filtered() == (not admitted_before))
        neighbour = rendezvous(elsewhere)
        theirs.sendto(b"a hole", neighbour)
        assert eventually(lambda: bool(entries(daemon, saddr=other.address, dport=neighbour[1])))
        patience = PATIENCE if admitted_by_address else BRIEFLY
        assert arrives(mine, their_endpoint, theirs, patience) is admitted_by_address
        theirs.sendto(b"a hole for you", my_endpoint)
        assert eventually(lambda: bool(entries(daemon, saddr=other.address, dport=my_endpoint[1])))
        assert arrives(mine, their_endpoint, theirs, PATIENCE)


# -- TCP -------------------------------------------------------------------------


@contextmanager
def reachable(lab: Lab, host: Host, port: int) -> Iterator[Endpoint]:
    """Yield the outside endpoint of a TCP port of an inside host, which a connection keeps open."""
    with (
        lab.outside[0].socket(socket.AF_INET, socket.SOCK_STREAM) as server,
        host.socket(socket.AF_INET, socket.SOCK_STREAM) as client,
    ):
        server.bind(("", 0))
        server.listen()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind((host.address, port))
        client.connect((lab.outside[0].address, server.getsockname()[1]))
        connection, endpoint = server.accept()
        with connection:
            yield endpoint
        # The server closed first, so the port is free at once for the next test.
        assert client.recv(1) == b""


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.usefixtures("firewall")
def test_large_transfers_arrive_as_they_were_sent(lab: Lab, first: int, tmp_path: Path) -> None:
    """The files go both ways, in connections that the one or the other host has opened."""
    one, other = lab.inside[first], lab.inside[1 - first]
    sent = os.urandom(LARGE)
    (tmp_path / "sent").write_bytes(sent)
    curl = ["curl", "-sSf", "--max-time", "50"]
    with (
        masquerading(lab, *OPEN) as daemon,
        reachable(lab, other, 80) as (address, port),
        web_server(other) as web,
        wire_of(lab, one, "tcp[tcpflags] & tcp-syn != 0") as wire,
    ):
        web.files["/large"] = sent
        url = f"http://{address}:{port}"
        one.run([*curl, f"{url}/large", "-o", str(tmp_path / "got")])
        one.run([*curl, f"{url}/up", "-T", str(tmp_path / "sent")])
        mports = {entry["mport"] for entry in entries(daemon, protocol="tcp", saddr=one.address)}
    got = (tmp_path / "got").read_bytes()
    assert sha256(got).digest() == sha256(sent).digest()
    assert sha256(web.files["/up"]).digest() == sha256(sent).digest()
    assert {address for address, _ in web.visitors} == {GATEWAY}
    assert {port for _, port in web.visitors} <= mports
    assert names(wire, other) == []


# -- errors ----------------------------------------------------------------------


def error_told(client: socket.socket) -> OSError:
    """Return the error that a program gets that has sent a datagram and waits for the answer."""
    with pytest.raises(OSError) as caught:  # noqa: PT011
        client.recv(100)
    return caught.value


@pytest.mark.usefixtures("open_to_all")
def test_a_program_that_is_gone_refuses_the_other_host(lab: Lab, rendezvous: Rendezvous) -> None:
    """RFC 5508, REQ-7: the error comes from the datagram's destination, and quotes it as sent."""
    one, other = lab.inside
    with udp_socket(other) as theirs:
        their_endpoint = rendezvous(theirs)
    with udp_socket(one) as mine, wire_of(lab, one) as wire:
        mine.connect(their_endpoint)
        mine.send(b"still there?")
        assert isinstance(error_told(mine), ConnectionRefusedError)
        my_inside_endpoint = mine.getsockname()
    datagram, error = (packet.data for packet in wire)
    assert source_address(error) == GATEWAY
    assert source(quoted(error)) == source(datagram) == my_inside_endpoint
    assert destination(quoted(error)) == their_endpoint
    assert names(wire, other) == []


@pytest.mark.usefixtures("open_to_all")
def test_traceroute_to_an_inside_host_by_its_outside_address(
    lab: Lab, rendezvous: Rendezvous
) -> None:
    """The gateway's own errors reach the sender, and do not tell where the port leads."""
    one, other = lab.inside
    with (
        udp_socket(other) as theirs,
        udp_socket(one) as mine,
        wire_of(lab, one) as wire,
    ):
        their_endpoint = rendezvous(theirs)
        mine.connect(their_endpoint)
        mine.send(b"all the way")
        assert theirs.recv(100) == b"all the way"
        mine.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        mine.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
        mine.send(b"one hop")
        assert error_told(mine).errno == errno.EHOSTUNREACH
    error = wire[-1].data
    assert destination(quoted(error)) == their_endpoint
    assert names(wire, other) == []


@pytest.mark.usefixtures("open_to_all")
def test_a_host_that_is_gone_is_told_of(lab: Lab, rendezvous: Rendezvous) -> None:
    """The gateway notices only after both addresses are rewritten."""
    one, other = lab.inside
    with udp_socket(other) as theirs, udp_socket(one) as mine:
        their_endpoint = rendezvous(theirs)
        gateway = other.ip("route show default").split()[2]
        other.ip("link set eth0 down")
        for interface in ("lan", "lan2"):
            lab.gateway.sysctl(f"net.ipv4.neigh.{interface}.retrans_time_ms", 50)
        lab.gateway.ip("neigh flush all")
        try:
            with wire_of(lab, one, "icmp") as wire:
                mine.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
                mine.connect(their_endpoint)
                mine.send(b"anybody?")
                assert error_told(mine).errno == errno.EHOSTUNREACH
        finally:
            other.ip("link set eth0 up")
            other.ip(f"route add default via {gateway}")
            other.run(["ping", "-q", "-c", "1", "-i", "0.05", "-w", "20", gateway])
    (error,) = (packet.data for packet in wire)
    assert destination(quoted(error)) == their_endpoint
    assert names(wire, other) == []


@pytest.mark.usefixtures("open_to_all")
def test_a_narrow_network_is_told_of(lab: Lab, rendezvous: Rendezvous) -> None:
    """Path MTU discovery works between inside networks of different MTU."""
    one, other = lab.inside
    interface = "lan" if are_on_one_bridge(lab) else "lan2"
    with udp_socket(other) as theirs, udp_socket(one) as mine:
        their_endpoint = rendezvous(theirs)
        mine.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        mine.connect(their_endpoint)
        mine.send(b"a short one")
        assert theirs.recv(100) == b"a short one"
        lab.gateway.ip(f"link set {interface} mtu 1300")
        try:
            with wire_of(lab, one, "icmp") as wire:
                mine.send(bytes(1400))
                assert error_told(mine).errno == errno.EMSGSIZE
            mine.send(bytes(1272))
            assert theirs.recv(65535) == bytes(1272)
        finally:
            lab.gateway.ip(f"link set {interface} mtu 1500")
            one.ip("route flush cache")
    assert names(wire, other) == []


# -- addresses -------------------------------------------------------------------


@pytest.mark.usefixtures("firewall")
def test_each_host_has_its_own_address_of_the_pool(lab: Lab, rendezvous: Rendezvous) -> None:
    """One address of the pool is not on the gateway but routed to it: `nfmasq-rules` is told so."""
    one, other = lab.inside
    pool = [option for a in (GATEWAY, ROUTED_ADDRESS) for option in ("--masquerade-address", a)]
    lab.router.ip(f"route add {ROUTED_ADDRESS} via {GATEWAY}")
    lab.outside[0].ip(f"route add {ROUTED_ADDRESS} via {lab.router.interfaces['net']}")
    try:
        with (
            masquerading(
                lab,
                *(*OPEN, *pool),
                rules=("--masquerade-address", ROUTED_ADDRESS),
            ),
            udp_socket(one) as mine,
            udp_socket(other) as theirs,
        ):
            my_endpoint, their_endpoint = rendezvous(mine), rendezvous(theirs)
            assert {my_endpoint[0], their_endpoint[0]} == {GATEWAY, ROUTED_ADDRESS}
            mine.sendto(b"hello", their_endpoint)
            assert theirs.recvfrom(100) == (b"hello", my_endpoint)
            theirs.sendto(b"hello yourself", my_endpoint)
            assert mine.recvfrom(100) == (b"hello yourself", their_endpoint)
    finally:
        lab.router.ip(f"route delete {ROUTED_ADDRESS}")
        lab.outside[0].ip(f"route delete {ROUTED_ADDRESS}")


# -- what is no hairpin ----------------------------------------------------------


@pytest.mark.usefixtures("open_to_all")
def test_the_gateway_s_own_services_are_reached_at_the_outside_address(lab: Lab) -> None:
    """A port within the masquerade range is reached, too, as long as no session has it."""
    one = lab.inside[0]
    with udp_socket(lab.gateway) as service, udp_socket(one) as client:
        service.bind((GATEWAY, 65_000))
        client.bind((one.address, 0))
        client.sendto(b"question", (GATEWAY, 65_000))
        assert service.recvfrom(100) == (b"question", client.getsockname())
        service.sendto(b"answer", client.getsockname())
        assert client.recvfrom(100) == (b"answer", (GATEWAY, 65_000))


@pytest.mark.usefixtures("firewall")
def test_inside_networks_talk_to_each_other_as_ever(lab: Lab, rendezvous: Rendezvous) -> None:
    """They use their inside addresses, and nfmasq gets none of these packets."""
    one, other = lab.inside
    with masquerading(lab) as daemon, udp_socket(one) as mine, udp_socket(other) as theirs:
        mine.bind((one.address, 0))
        theirs.bind((other.address, 0))
        mine.sendto(b"hello", theirs.getsockname())
        assert theirs.recvfrom(100) == (b"hello", mine.getsockname())
        assert entries(daemon) == []
        assert figure(daemon, "nfmasq_packets_total") == 0


# -- redirects -------------------------------------------------------------------


def test_the_kernel_s_redirects_do_not_reach_the_wire(data_path: tuple[str, ...]) -> None:
    """A redirect would tell the sender the receiver's inside address.

    The test has a lab of its own: the kernel sends a host no more than a few redirects.
    """
    with (
        Lab(inside=2, outside=1, options=data_path) as lab,
        masquerading(lab, *OPEN),
        rendezvous_outside(lab) as outside_endpoint,
        udp_socket(lab.inside[0]) as mine,
        udp_socket(lab.inside[1]) as theirs,
    ):
        lab.gateway.sysctl("net.ipv4.conf.lan.send_redirects", 1)
        their_endpoint = outside_endpoint(theirs)
        with wire_of(lab, lab.inside[0], "icmp") as wire:
            for number in range(3):
                mine.sendto(bytes([number]), their_endpoint)
                assert theirs.recv(100) == bytes([number])
        assert wire == []
        listed = lab.gateway.run(["iptables", "-t", "security", "-nvxL", "NFMASQ-OUTPUT"]).stdout
        assert re.search(r"^ *[1-9]\d* .* DROP .* lan .* icmptype 5", listed, re.MULTILINE)
