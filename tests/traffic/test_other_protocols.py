"""Protocols other than TCP, UDP and ICMP, by address: tunnels and sockets through the gateway.

A thread of the test carries the packets of tunnels (`tunnels.py`), since not every kernel has
tunnels; ping and curl within them are real. SCTP, DCCP and ESP, which few kernels have, are sent
and received through raw sockets.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from socket import (
    AF_INET,
    IP_ADD_MEMBERSHIP,
    IP_MULTICAST_IF,
    IP_TTL,
    IPPROTO_IP,
    SOCK_DGRAM,
    SOCK_RAW,
    inet_aton,
    socket,
)

import pytest

from nfmasq.engine.wire.checksum import without_checksum
from nfmasq.lab import Daemon, Host, Lab
from tests.packets import (
    TIME_EXCEEDED,
    UNREACHABLE,
    checksums_are_right,
    dccp,
    destination_address,
    header_checksum_is_right,
    ip,
    quoted,
    source_address,
    transport_checksum_is_right,
    udp,
    udplite,
)
from tests.traffic.clients import BRIEFLY, PATIENCE
from tests.traffic.observed import entries, eventually, figure
from tests.traffic.servers import web_server
from tests.traffic.tunnels import (
    GRE,
    IP_IN_IP,
    TUN_WITH_VIRTIO_HEADER,
    open_tun,
    tunnel,
)
from tests.traffic.wire import without_offload

GATEWAY = "198.51.100.2"
NEAR, FAR = "192.168.99.1", "192.168.99.2"  # within a tunnel

ESP, AH, OSPF, VRRP, SCTP, UDPLITE, DCCP, EXPERIMENTAL = 50, 51, 89, 112, 132, 136, 33, 253
PROHIBITED = 13
UDPLITE_SEND_CSCOV = 10  # linux/udp.h
IP_MTU_DISCOVER, IP_PMTUDISC_PROBE = 10, 3

PING = ["ping", "-n", "-c", "3", "-i", "0.1", "-W", "10"]


@pytest.fixture(scope="module", autouse=True)
def rules(lab: Lab) -> Iterator[None]:
    lab.rules("up", "--other-protocols")
    yield
    lab.rules("down")


@pytest.fixture
def daemon(lab: Lab) -> Iterator[Daemon]:
    daemon = lab.nfmasq("--other-protocols", "by-address")
    yield daemon
    daemon.stop()


def body(protocol: int, src: Host, dst: Host, text: bytes) -> bytes:
    """Return what follows the IP header of a packet that says `text`."""
    ends = (src.address, 5001), (dst.address, 5001)
    match protocol:
        case 136:
            return udplite(*ends, text)[20:]
        case 33:
            return dccp(*ends, text)[20:]
        case 132:
            return struct.pack("!HHII", 5001, 5001, 7, 0) + text
        case _:
            return bytes(8) + text


class Raw:
    """Raw sockets of a protocol on an inside host and an outside host."""

    def __init__(self, protocol: int, inside: Host, outside: Host) -> None:
        self.protocol = protocol
        self.inside, self.outside = inside, outside
        self.client = inside.socket(AF_INET, SOCK_RAW, protocol)
        self.server = outside.socket(AF_INET, SOCK_RAW, protocol)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.close()

    def ask(self, text: bytes) -> None:
        self.client.sendto(
            body(self.protocol, self.inside, self.outside, text), (self.outside.address, 0)
        )

    def asked(self) -> bytes:
        """Return the packet that the outside host gets."""
        return self.server.recv(65535)

    def answer(self, gateway: Host, text: bytes) -> None:
        self.server.sendto(body(self.protocol, self.outside, gateway, text), (gateway.address, 0))

    def answered(self) -> bytes:
        return self.client.recv(65535)


# -- tunnels ----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [GRE, IP_IN_IP], ids=["gre", "ip in ip"])
def test_ping_and_a_download_through_a_tunnel(lab: Lab, daemon: Daemon, protocol: int) -> None:
    inside, outside = lab.inside[0], lab.outside[0]
    data = os.urandom(300_000).hex()
    with (
        tunnel(protocol, (inside, NEAR, outside.address), (outside, FAR, "")),
        web_server(outside, FAR) as web,
        lab.capture(lab.router, "wan", f"ip proto {protocol}") as seen,
    ):
        web.files["/data"] = data.encode()
        assert "3 received" in inside.run([*PING, FAR]).stdout
        assert "3 received" in inside.run([*PING, "-s", "4000", FAR]).stdout
        assert inside.run(["curl", "-sSf", "-m", "50", f"{web.url}/data"]).stdout == data
        # The far end may begin, too, as long as the entry lives.
        assert "3 received" in outside.run([*PING, NEAR]).stdout
    ends = {frozenset((source_address(p.data), destination_address(p.data))) for p in seen}
    assert ends == {frozenset((GATEWAY, outside.address))}
    (entry,) = entries(daemon)
    assert entry["protocol"] == {GRE: "gre", IP_IN_IP: "4"}[protocol]
    assert entry["packets_in"] > 200
    assert figure(daemon, "nfmasq_entries", protocol="other") == 1


def test_a_second_inside_host_has_to_wait_until_the_first_ones_entry_is_gone(
    lab: Lab, daemon: Daemon
) -> None:
    outside = lab.outside[0]
    first, second = (Raw(GRE, inside, outside) for inside in lab.inside)
    with first, second, lab.inside[1].socket(AF_INET, SOCK_RAW, 1) as icmp:
        first.ask(b"first")
        assert first.asked()[-5:] == b"first"
        second.ask(b"second")
        told = icmp.recv(65535)
        assert told[20:22] == bytes([UNREACHABLE, PROHIBITED])
        assert destination_address(quoted(told)) == outside.address
        assert figure(daemon, "nfmasq_errors_total", reason="no_port") == 1
        first.answer(lab.gateway, b"for the first")
        assert first.answered()[-13:] == b"for the first"
        (entry,) = entries(daemon, protocol="gre")
        assert entry["saddr"] == lab.inside[0].address

        daemon.ask("delete", "--protocol", "gre")
        second.ask(b"second")
        assert first.asked()[-6:] == b"second"  # and not what was refused before
        (entry,) = entries(daemon, protocol="gre")
        assert entry["saddr"] == lab.inside[1].address


# -- packets of each protocol -------------------------------------------------------


@pytest.mark.parametrize("size", [10, 3000, 65_500])
@pytest.mark.parametrize(
    "protocol",
    [GRE, ESP, SCTP, UDPLITE, DCCP, EXPERIMENTAL],
    ids=["gre", "esp", "sctp", "udplite", "dccp", "experimental"],
)
def test_packets_go_out_and_come_back_whole(
    lab: Lab, daemon: Daemon, protocol: int, size: int
) -> None:
    text = os.urandom(size)
    with Raw(protocol, lab.inside[0], lab.outside[0]) as raw:
        raw.ask(text)
        packet = raw.asked()
        assert source_address(packet) == GATEWAY
        assert packet.endswith(text)
        assert checksums_are_right(packet)
        raw.answer(lab.gateway, text[::-1])
        packet = raw.answered()
        assert destination_address(packet) == lab.inside[0].address
        assert packet.endswith(text[::-1])
        assert checksums_are_right(packet)


@pytest.mark.parametrize("coverage", [0, 8, 20])
def test_udplite_sockets_talk_through_the_gateway(lab: Lab, daemon: Daemon, coverage: int) -> None:
    """The sockets are the kernel's: a datagram with a wrong checksum reaches none of them."""
    try:
        client = lab.inside[0].socket(AF_INET, SOCK_DGRAM, UDPLITE)
        server = lab.outside[0].socket(AF_INET, SOCK_DGRAM, UDPLITE)
    except OSError as error:
        pytest.skip(f"this kernel has no UDP-Lite: {error}")
    with client, server:
        server.bind(("", 5001))
        for end in (client, server):
            end.setsockopt(UDPLITE, UDPLITE_SEND_CSCOV, coverage)
        for text in (b"question", os.urandom(3000)):
            client.sendto(text, (lab.outside[0].address, 5001))
            received, peer = server.recvfrom(65535)
            assert (received, peer[0]) == (text, GATEWAY)
            server.sendto(text[::-1], peer)
            assert client.recv(65535) == text[::-1]


def test_what_a_tunnel_leaves_to_the_card_is_done(lab: Lab, daemon: Daemon) -> None:
    """The checksum of a packet within a tunnel is missing when it comes to the gateway."""
    within = udp((NEAR, 9), (FAR, 9), b"within the tunnel")
    head = b"\x00\x00\x08\x00"
    packet = ip("10.78.0.2", lab.outside[0].address, GRE, head + without_checksum(within))
    checksum_from, checksum_at = 20 + len(head) + 20, 6
    card = lab.gateway.call(open_tun, "card", TUN_WITH_VIRTIO_HEADER)
    try:
        lab.gateway.ip("address add 10.78.0.1/24 dev card")
        lab.gateway.ip("link set card up")
        lab.rules("up", "--other-protocols", "--inside", "card")
        with (
            without_offload(lab.gateway, "wan"),
            lab.capture(lab.router, "wan", f"ip proto {GRE}") as seen,
            lab.outside[0].socket(AF_INET, SOCK_RAW, GRE) as server,
        ):
            # struct virtio_net_hdr: a checksum is missing, from where on, and where it belongs.
            os.write(card, struct.pack("=BBHHHH", 1, 0, 0, 0, checksum_from, checksum_at) + packet)
            server.recv(65535)
    finally:
        os.close(card)
        lab.rules("up", "--other-protocols")
    (sent,) = seen
    assert source_address(sent.data) == GATEWAY
    assert header_checksum_is_right(sent.data)
    assert sent.data[24:] == within


# -- errors -----------------------------------------------------------------------


@pytest.fixture
def error_about(lab: Lab) -> Callable[[Callable[[], None], int], bytes]:
    """Return a function that does something, and returns the ICMP error an inside host gets for it.

    It takes what is to be done, and the type of the error.
    """

    def told(do: Callable[[], None], kind: int) -> bytes:
        with lab.inside[0].socket(AF_INET, SOCK_RAW, 1) as icmp:
            do()
            while (error := icmp.recv(65535))[20] != kind:
                pass
        return error

    return told


@pytest.mark.parametrize("protocol", [GRE, SCTP, DCCP], ids=["gre", "sctp", "dccp"])
def test_errors_from_outside_reach_the_inside_host(
    lab: Lab,
    daemon: Daemon,
    protocol: int,
    error_about: Callable[[Callable[[], None], int], bytes],
) -> None:
    inside, outside = lab.inside[0], lab.outside[0]

    def send(to: str, hops: int = 64) -> Callable[[], None]:
        def sending() -> None:
            with inside.socket(AF_INET, SOCK_RAW, protocol) as raw:
                raw.setsockopt(IPPROTO_IP, IP_TTL, hops)
                raw.sendto(body(protocol, inside, outside, b"text"), (to, 0))

        return sending

    for to, hops, kind, sender in (
        (outside.address, 64, UNREACHABLE, outside.address),  # it does not know the protocol
        (outside.address, 2, TIME_EXCEEDED, "198.51.100.1"),
        ("198.51.100.77", 64, UNREACHABLE, GATEWAY),  # nobody is there, says the gateway itself
    ):
        error = error_about(send(to, hops), kind)
        assert (source_address(error), destination_address(error)) == (
            sender,
            inside.address,
        )
        assert checksums_are_right(error)
        quote = quoted(error)
        assert (source_address(quote), destination_address(quote)) == (inside.address, to)
        assert header_checksum_is_right(quote)
        if to == outside.address:
            assert transport_checksum_is_right(quote)


def test_errors_from_inside_reach_the_outside_host(lab: Lab, daemon: Daemon) -> None:
    """Errors come from an inside host that has closed its socket, and from the gateway itself.

    The gateway sends one since its inside network is narrow.
    """
    inside, outside, gateway = lab.inside[0], lab.outside[0], lab.gateway
    with Raw(DCCP, inside, outside) as raw, outside.socket(AF_INET, SOCK_RAW, 1) as icmp:
        raw.ask(b"hello")
        raw.asked()
        raw.client.close()
        raw.answer(gateway, b"too late")
        unreachable = icmp.recv(65535)
        gateway.ip("link set lan mtu 1300")
        try:
            raw.server.setsockopt(IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
            raw.answer(gateway, bytes(1400))
            too_big = icmp.recv(65535)
        finally:
            gateway.ip("link set lan mtu 1500")
    for error, code in ((unreachable, 2), (too_big, 4)):
        assert error[20:22] == bytes([UNREACHABLE, code])
        assert source_address(error) == GATEWAY
        assert destination_address(quoted(error)) == GATEWAY
        assert header_checksum_is_right(quoted(error))
        assert bytes([10, 77, 0]) not in error
    assert transport_checksum_is_right(quoted(unreachable))


# -- what does not leave, and what is the gateway's own -----------------------------


def test_control_protocols_and_groups_do_not_leave(lab: Lab, daemon: Daemon) -> None:
    inside, outside = lab.inside[0], lab.outside[0]
    unsupported = (2, AH, OSPF, VRRP, 0x3A)
    with (
        lab.capture(lab.router, "wan", "not icmp and not arp") as seen,
        ExitStack() as stack,
    ):
        for protocol in unsupported:
            raw = stack.enter_context(inside.socket(AF_INET, SOCK_RAW, protocol))
            raw.sendto(bytes(40), (outside.address, 0))
        dropped = len(unsupported)
        assert eventually(
            lambda: figure(daemon, "nfmasq_errors_total", reason="unsupported") == dropped
        )
        with Raw(EXPERIMENTAL, inside, outside) as last:
            last.ask(b"last")
            last.asked()
    assert [packet.data[-4:] for packet in seen] == [b"last"]


def heard(listener: socket, text: bytes, patience: float = PATIENCE) -> bool:
    """Say whether the socket gets a packet that ends with `text`."""
    listener.settimeout(patience)
    try:
        while not listener.recv(65535).endswith(text):
            pass
    except TimeoutError:
        return False
    return True


def test_the_gateway_keeps_its_own_protocols(lab: Lab) -> None:
    """Packets to groups never reach nfmasq; packets to the gateway alone come out unchanged."""
    gateway, router = lab.gateway, lab.router
    group, wan = "224.0.0.18", router.interfaces["wan"]
    with (
        router.socket(AF_INET, SOCK_RAW, VRRP) as neighbour,
        gateway.socket(AF_INET, SOCK_RAW, VRRP) as own,
    ):
        neighbour.setsockopt(IPPROTO_IP, IP_MULTICAST_IF, inet_aton(wan))
        membership = inet_aton(group) + inet_aton(GATEWAY)
        own.setsockopt(IPPROTO_IP, IP_ADD_MEMBERSHIP, membership)

        neighbour.sendto(b"to all", (group, 0))
        assert heard(own, b"to all")
        neighbour.sendto(b"to one", (GATEWAY, 0))
        assert not heard(own, b"to one", BRIEFLY)  # without nfmasq

        daemon = lab.nfmasq("--other-protocols", "by-address")
        try:
            neighbour.sendto(b"to all again", (group, 0))
            assert heard(own, b"to all again")
            neighbour.sendto(b"to one again", (GATEWAY, 0))
            assert heard(own, b"to one again")
            own.sendto(b"an answer", (wan, 0))
            assert heard(neighbour, b"an answer")
            assert entries(daemon) == []
        finally:
            daemon.stop()


def test_the_gateway_speaks_a_protocol_that_inside_hosts_speak_with_others(
    lab: Lab, daemon: Daemon
) -> None:
    with (
        Raw(ESP, lab.inside[0], lab.outside[1]) as others,
        Raw(ESP, lab.gateway, lab.outside[0]) as own,
    ):
        others.ask(b"hello")
        others.asked()
        own.ask(b"question")
        assert own.asked().endswith(b"question")
        own.answer(lab.gateway, b"answer")
        assert own.answered().endswith(b"answer")
