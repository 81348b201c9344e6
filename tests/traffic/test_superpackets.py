"""Superpackets: packets that come uncut leave the gateway cut, complete, and with right checksums.

The lab's hosts leave cutting and checksums to their network cards, so nearly all their packets are
superpackets. What becomes of them is captured behind an interface of the gateway whose network card
does neither. Everything is tried with superpackets and without, and without a firewall and beside a
stateful one. The firewall brings the gateway's connection tracking, which verifies checksums.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nfmasq.engine.wire.checksum import without_checksum
from nfmasq.lab import Daemon, Host, Lab, Packet
from tests.packets import (
    Endpoint,
    checksums_are_right,
    source_address,
    tcp,
    udp,
)
from tests.traffic.conftest import taking
from tests.traffic.observed import entries, eventually, figure
from tests.traffic.servers import ECHO_PORT, WebServer, udp_echo, web_server
from tests.traffic.tunnels import TUN_WITH_VIRTIO_HEADER, open_tun
from tests.traffic.wire import without_offload

data_path = taking("queue", "no-gso", "routed")

GATEWAY = "198.51.100.2"
DATA = os.urandom(3_000_000)
SEGMENT = 1000  # bytes in each packet that a superpacket is cut into
LENGTHS = [10_000, 65_530, 65_531, 65_532, 65_535]
BLIND_PORT = 9  # where nobody answers

FRAGMENTATION_NEEDED = "icmp[0] == 3 and icmp[1] == 4"

UDP_SEGMENT = 103  # udp(7)

FIREWALL = """\
*filter
:INPUT DROP
:FORWARD DROP
-A INPUT -i lo -j ACCEPT
-A INPUT -i lan -j ACCEPT
-A FORWARD -m conntrack --ctstate INVALID -j DROP
-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A FORWARD -i lan -o wan -j ACCEPT
-A FORWARD -i card -o wan -j ACCEPT
COMMIT
"""
NO_FIREWALL = "*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\nCOMMIT\n"


@pytest.fixture(scope="module")
def lab(data_path: tuple[str, ...]) -> Iterator[Lab]:
    with Lab(inside=1, outside=1, options=data_path) as lab:
        for host, port in ((lab.inside[0], "--sport"), (lab.outside[0], "--dport")):
            for protocol in ("tcp", "udp"):
                match = ["-p", protocol, port, str(BLIND_PORT)]
                host.run(["iptables", "-A", "INPUT", *match, "-j", "DROP"])
        yield lab


@pytest.fixture(scope="module", params=["no firewall", "stateful firewall"])
def firewall(request: pytest.FixtureRequest, lab: Lab) -> Iterator[bool]:
    """Load a stateful firewall, or none; yields whether there is one.

    The firewall drops INVALID packets.
    """
    stateful = request.param == "stateful firewall"
    if stateful:
        lab.gateway.run(["iptables-restore"], input=FIREWALL)
        # The tests also send segments without a connection, which are in no window.
        lab.gateway.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", 1)
    yield stateful
    if stateful:
        lab.gateway.run(["iptables-restore"], input=NO_FIREWALL)


@pytest.fixture(scope="module")
def daemon(lab: Lab, firewall: bool) -> Iterator[Daemon]:
    with lab.masquerading() as daemon:
        yield daemon


@pytest.fixture
def web(lab: Lab) -> Iterator[WebServer]:
    with web_server(lab.outside[0]) as web:
        web.files["/data"] = DATA
        yield web


class Wire:
    """What the gateway sends, to the outside and to the inside."""

    def __init__(self) -> None:
        self.out: list[Packet] = []
        self.into: list[Packet] = []

    def is_in_order(self) -> bool:
        """Say whether all packets fit into a frame and have right checksums."""
        packets = [packet.data for packet in (*self.out, *self.into)]
        return all(len(packet) <= 1500 and checksums_are_right(packet) for packet in packets)


@contextmanager
def on_the_wire(lab: Lab, protocol: str) -> Iterator[Wire]:
    """Capture what the gateway sends within the block; the lists are filled at its end."""
    wire = Wire()
    from_outside = f"{protocol} and src {lab.outside[0].address}"
    with (
        without_offload(lab.gateway, "wan"),
        without_offload(lab.gateway, "lan1"),
        lab.capture(lab.router, "wan", f"{protocol} and src {GATEWAY}") as wire.out,
        lab.capture(lab.inside[0], "eth0", from_outside) as wire.into,
    ):
        yield wire


def download(lab: Lab, web: WebServer, folder: Path) -> bytes:
    command = ["curl", "-sSf", "--max-time", "50", f"{web.url}/data", "-o", str(folder / "got")]
    lab.inside[0].run(command)
    return (folder / "got").read_bytes()


def upload(lab: Lab, web: WebServer, folder: Path) -> bytes:
    (folder / "sent").write_bytes(DATA)
    command = ["curl", "-sSf", "--max-time", "50", f"{web.url}/up", "-T", str(folder / "sent")]
    lab.inside[0].run(command)
    return web.files["/up"]


def dropped_by_firewall(lab: Lab) -> int:
    """Return how many packets the firewall took for INVALID; 0 where there is no firewall."""
    listed = lab.gateway.run(["iptables", "-nvxL", "FORWARD"]).stdout
    dropped = re.search(r"^ *(\d+) .* INVALID$", listed, re.MULTILINE)
    return int(dropped[1]) if dropped else 0


def test_transfers(lab: Lab, daemon: Daemon, web: WebServer, tmp_path: Path) -> None:
    before = dropped_by_firewall(lab)
    with on_the_wire(lab, "tcp") as wire:
        assert download(lab, web, tmp_path) == DATA
        assert upload(lab, web, tmp_path) == DATA
    assert len(wire.out) > 2000
    assert len(wire.into) > 2000
    assert wire.is_in_order()
    assert dropped_by_firewall(lab) == before


@pytest.mark.parametrize("direction", ["in", "out"])
def test_packets_come_to_nfmasq_uncut_only_with_gso(
    lab: Lab,
    daemon: Daemon,
    data_path: tuple[str, ...],
    web: WebServer,
    tmp_path: Path,
    direction: str,
) -> None:
    """Superpackets, which the other tests of this file are about, do come."""

    def carried() -> tuple[float, float]:
        packets = figure(daemon, "nfmasq_packets_total", direction=direction, protocol="tcp")
        return figure(daemon, "nfmasq_bytes_total", direction=direction), packets

    bytes_before, packets_before = carried()
    assert (download if direction == "in" else upload)(lab, web, tmp_path) == DATA
    bytes_after, packets_after = carried()
    mean = (bytes_after - bytes_before) / (packets_after - packets_before)
    if "--no-gso" not in data_path:
        assert mean > 5000
    else:
        assert mean <= 1500


def test_single_datagrams(lab: Lab, daemon: Daemon) -> None:
    sizes = [0, 1, 17, 64, 1471, 1472]
    with (
        udp_echo(lab.outside[0]),
        lab.inside[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        on_the_wire(lab, "udp") as wire,
    ):
        for size in sizes:
            data = os.urandom(size)
            client.sendto(data, (lab.outside[0].address, ECHO_PORT))
            assert client.recv(65535) == data
    assert len(wire.out) == len(wire.into) == len(sizes)
    assert wire.is_in_order()
    for packet in (*wire.out, *wire.into):
        assert packet.data[26:28] != bytes(2)  # the checksum was not just left out


def test_datagrams_sent_in_one_piece(lab: Lab, daemon: Daemon) -> None:
    """QUIC sends many datagrams with one call of a program."""
    data = os.urandom(20_500)
    pieces = [data[at : at + SEGMENT] for at in range(0, len(data), SEGMENT)]
    with (
        lab.inside[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        lab.outside[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        server.bind(("", 443))
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, SEGMENT)
        with on_the_wire(lab, "udp") as wire:
            client.sendto(data, (lab.outside[0].address, 443))
            received = [server.recvfrom(65535) for _ in pieces]
            server.sendto(data, received[0][1])
            answered = [client.recv(65535) for _ in pieces]
    assert [piece for piece, _ in received] == pieces
    assert answered == pieces
    assert len(wire.out) == len(wire.into) == len(pieces)
    assert wire.is_in_order()


# -- of any length ----------------------------------------------------------------


@pytest.fixture
def card(lab: Lab, daemon: Daemon) -> Iterator[Callable[[bytes], None]]:
    """Add a network card to the gateway; yields a function that has a packet come in by the card.

    The packet is a TCP or UDP packet without IP options, from the inside or from the outside. It
    comes in uncut, and its checksum is missing. No link of the lab carries more than 65,521 bytes
    in one piece.
    """
    gateway, to_queue = lab.gateway, ["-i", "card", "-j", "NFQUEUE"]
    hooks = [["mangle", "FORWARD", "-o", "wan"], ["raw", "PREROUTING", "-d", GATEWAY]]
    opened = gateway.call(open_tun, "card", TUN_WITH_VIRTIO_HEADER)
    with open(opened, "wb", buffering=0) as tun:
        gateway.ip("link set card up")
        for name in ("all", "card"):
            gateway.sysctl(f"net.ipv4.conf.{name}.rp_filter", 0)
        for table, chain, *match in hooks:
            gateway.run(["iptables", "-t", table, "-A", chain, *match, *to_queue])

        def receive(packet: bytes) -> None:
            over_tcp = packet[9] == 6
            # struct virtio_net_hdr: checksum missing, over what, headers, where the checksum is.
            kind, headers, checksum_at = (1, 40, 16) if over_tcp else (5, 28, 6)
            header = struct.pack("=BBHHHH", 1, kind, headers, SEGMENT, 20, checksum_at)
            tun.write(header + without_checksum(packet))

        yield receive
        for table, chain, *match in hooks:
            gateway.run(["iptables", "-t", table, "-D", chain, *match, *to_queue])


def received(host: Host, interface: str) -> int:
    """Return how many packets have come in by an interface."""
    (shown,) = json.loads(host.ip(f"-s -j link show {interface}"))
    packets: int = shown["stats64"]["rx"]["packets"]
    return packets


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_superpackets_of_any_length(
    lab: Lab, daemon: Daemon, card: Callable[[bytes], None], protocol: str
) -> None:
    """They leave complete even where NFQUEUE has no room for the last bytes."""
    build, headers = (tcp, 40) if protocol == "tcp" else (udp, 28)
    contents = [os.urandom(length - headers) for length in LENGTHS]
    client: Endpoint = (lab.inside[0].address, 40_000)
    server: Endpoint = (lab.outside[0].address, BLIND_PORT)

    def come_through(packet: bytes, *receiver: Any) -> None:
        segments = -(-(len(packet) - headers) // SEGMENT)
        before = received(*receiver)
        card(packet)
        assert eventually(lambda: received(*receiver) >= before + segments)

    with on_the_wire(lab, protocol) as wire:
        for content in contents:
            come_through(build(client, server, payload=content), lab.router, "wan")
            (entry,) = entries(daemon, protocol=protocol, sport=client[1])
            answer = build(server, (GATEWAY, entry["mport"]), payload=content)
            come_through(answer, lab.inside[0], "eth0")
    for packets in (wire.out, wire.into):
        assert b"".join(packet.data[headers:] for packet in packets) == b"".join(contents)
    assert wire.is_in_order()


def test_superpackets_are_not_in_the_way_of_long_datagrams(
    lab: Lab, card: Callable[[bytes], None]
) -> None:
    """A datagram that NFQUEUE has no room for is completed with what a packet socket holds."""
    client: Endpoint = (lab.inside[0].address, 40_001)
    server: Endpoint = (lab.outside[0].address, BLIND_PORT)
    packet = tcp(client, server, payload=bytes(65_535 - 40))

    def come_through(packets: int) -> None:
        """Nobody sends again what a busy kernel loses on the way: most of them is enough."""
        before = received(lab.router, "wan")
        for _ in range(packets):
            card(packet)
        assert eventually(lambda: received(lab.router, "wan") >= before + packets * 66 * 0.8)

    # Connection tracking does not know the connection until its first packet is through. And where
    # superpackets are cut, 200 of them are more packets than can wait in the queue at once.
    for packets in (1, *[10] * 20):
        come_through(packets)
    data = os.urandom(65_507)
    with (
        udp_echo(lab.outside[0]),
        lab.inside[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        sender.sendto(data, (lab.outside[0].address, ECHO_PORT))
        assert sender.recv(65535) == data


def test_packets_that_the_gateways_card_has_put_together(
    lab: Lab, daemon: Daemon, web: WebServer, tmp_path: Path
) -> None:
    """The card does generic receive offload, over UDP too, in both of its forms."""
    forms = ["rx-udp-gro-forwarding", "rx-gro-list"]
    with (
        without_offload(lab.router, "wan"),
        without_offload(lab.outside[0], "eth0"),
        lab.inside[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        lab.outside[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        server.bind(("", 443))
        client.sendto(b"hello", (lab.outside[0].address, 443))
        _, client_seen = server.recvfrom(100)
        server.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, SEGMENT)
        for form in forms:
            on, off = (
                [*("ethtool", "-K", "wan", "gro"), state, form, state] for state in ("on", "off")
            )
            lab.gateway.run(on)
            try:
                data = os.urandom(20_500)
                server.sendto(data, client_seen)
                pieces = [client.recv(65535) for _ in range(0, len(data), SEGMENT)]
                assert b"".join(pieces) == data
                before = dropped_by_firewall(lab)
                assert download(lab, web, tmp_path) == DATA
                assert dropped_by_firewall(lab) == before
            finally:
                lab.gateway.run(off)


# -- where a link is narrow -------------------------------------------------------


@pytest.fixture
def _narrow(lab: Lab) -> Iterator[None]:
    """Make the router's outside link and the gateway's inside link narrow; no host knows."""
    lab.router.ip("link set net mtu 1280")
    lab.gateway.ip("link set lan mtu 1200")
    yield
    lab.gateway.ip("link set lan mtu 1500")
    lab.router.ip("link set net mtu 1500")
    for host in lab.hosts:
        host.ip("route flush cache")


@pytest.mark.usefixtures("_narrow")
def test_path_mtu_discovery(lab: Lab, daemon: Daemon, web: WebServer, tmp_path: Path) -> None:
    inside, outside = lab.inside[0], lab.outside[0]
    with (
        lab.capture(inside, "eth0", FRAGMENTATION_NEEDED) as to_the_inside,
        lab.capture(outside, "eth0", FRAGMENTATION_NEEDED) as to_the_outside,
    ):
        assert upload(lab, web, tmp_path) == DATA
        assert download(lab, web, tmp_path) == DATA
    assert {source_address(error.data) for error in to_the_inside} == {"198.51.100.1"}
    assert {source_address(error.data) for error in to_the_outside} == {GATEWAY}
    assert not any(bytes([10, 77, 0]) in error.data for error in to_the_outside)
    assert all(checksums_are_right(error.data) for error in (*to_the_inside, *to_the_outside))
