"""Fragments in any order, and a flood of them (RFC 4787 section 11, REQ-13 and REQ-14).

The kernel puts datagrams together before nfmasq sees them. It knows the datagram of a fragment by
the two addresses, the protocol and the identification. It puts them together for the gateway only:
a datagram passes whole, and is cut anew where it does not fit. A datagram that never becomes whole,
or whose fragments contradict each other, does not pass at all.

Two limits protect from a flood. Each network namespace has its own limit of memory,
`ipfrag_high_thresh` (4 MiB), and a datagram waits for its rest no longer than `ipfrag_time` (30 s).
While the gateway's limit is reached, whoever has sent the fragments, no other datagram is put
together there: what others send in fragments is lost until the time of the flood's fragments is up.
A packet in one piece waits for nothing and is never lost. nfmasq sees nothing of the flood, and the
memory of the machine is safe.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count, cycle, islice, permutations
from pathlib import Path
from random import Random
from socket import AF_INET, IPPROTO_ICMP, SOCK_DGRAM, SOCK_RAW, socket
from threading import Event, Thread
from typing import NamedTuple

import pytest

from nfmasq.lab import Host, Lab, Packet
from tests.packets import (
    ECHO_REPLY,
    Endpoint,
    fragment,
    fragments,
    query,
    quoted,
    source_address,
    udp,
)
from tests.traffic.conftest import taking
from tests.traffic.observed import eventually
from tests.traffic.servers import WebServer, web_server
from tests.traffic.wire import mac, sender

data_path = taking("queue", "no-gso", "routed", "direct")

GATEWAY = "198.51.100.2"
PIECE = 1480  # bytes of data in a fragment that fills a frame
NARROW = 1280
CLIENT_PORT, SERVER_PORT = 5000, 4000
TEXT = "A flood of fragments.\n" * 100_000

_identifications = count(1)


@pytest.fixture(scope="module", autouse=True)
def _masquerading(lab: Lab) -> Iterator[None]:
    """Masquerade; the gateway waits no longer than a second for the rest of a datagram."""
    lab.gateway.sysctl("net.ipv4.ipfrag_time", 1)
    with lab.masquerading():
        yield


@pytest.fixture
def _all_time(lab: Lab) -> Iterator[None]:
    """Have the gateway wait as usual: the last fragment of a whole datagram may come late."""
    lab.gateway.sysctl("net.ipv4.ipfrag_time", 30)
    yield
    lab.gateway.sysctl("net.ipv4.ipfrag_time", 1)


class Way(NamedTuple):
    """A direction through the gateway, and a flow of datagrams in it.

    `send` puts raw packets on the wire to the gateway. `passing` captures within a block the
    packets that the gateway sends on, which come from the address `known_as`.
    """

    send: Callable[[Iterable[bytes]], None]
    source: Endpoint
    destination: Endpoint
    receiver: socket
    passing: Callable[[], AbstractContextManager[list[Packet]]]
    known_as: str

    def datagram(self, payload: bytes) -> bytes:
        return identified(udp(self.source, self.destination, payload))

    def received(self) -> bytes:
        return self.receiver.recv(65535)


def identified(packet: bytes) -> bytes:
    """Return the packet with an identification that no other has, and a right header checksum."""
    number = (next(_identifications) & 0xFFFF).to_bytes(2, "big")
    return fragment(packet[:4] + number + packet[6:], 0, len(packet))


@pytest.fixture(params=["out", "in"])
def way(request: pytest.FixtureRequest, lab: Lab) -> Iterator[Way]:
    inside, outside = lab.inside[0], lab.outside[0]
    with (
        inside.socket(AF_INET, SOCK_DGRAM) as client,
        outside.socket(AF_INET, SOCK_DGRAM) as server,
    ):
        client.bind((inside.address, CLIENT_PORT))
        server.bind((outside.address, SERVER_PORT))
        client.sendto(b"hello", server.getsockname())
        _, visitor = server.recvfrom(100)
        if request.param == "out":
            send = sender(lab, inside, "eth0", "lan")
            ends = client.getsockname(), server.getsockname()
            yield Way(send, *ends, server, lambda: datagrams_out(lab), GATEWAY)
        else:
            send = sender(lab, lab.router, "wan", "wan")
            ends = server.getsockname(), visitor
            yield Way(send, *ends, client, lambda: datagrams_in(lab), outside.address)


def datagrams_out(lab: Lab) -> AbstractContextManager[list[Packet]]:
    """Capture the datagrams that the gateway sends to the outside, whatever source they name."""
    return lab.capture(lab.router, "wan", f"udp and ether src {mac(lab, 'wan')}")


def datagrams_in(lab: Lab) -> AbstractContextManager[list[Packet]]:
    """Capture the datagrams that the gateway sends to the first inside host."""
    return lab.capture(lab.inside[0], "eth0", f"udp and ether src {mac(lab, 'lan')}")


def offset(packet: Packet) -> int:
    """Return the offset of a fragment, in bytes."""
    return (int.from_bytes(packet.data[6:8], "big") & 0x1FFF) * 8


def shuffled(pieces: list[bytes]) -> list[bytes]:
    return Random(1).sample(pieces, len(pieces))


# ---- what comes through, whole ------------------------------------------------------------------


@pytest.mark.usefixtures("_all_time")
@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_fragments_in_any_order_come_through_as_one_datagram(
    way: Way, order: tuple[int, ...]
) -> None:
    payload = os.urandom(3 * PIECE - 100)
    pieces = fragments(way.datagram(payload), PIECE)
    with way.passing() as passed:
        way.send(pieces[number] for number in order)
        assert way.received() == payload
    # The fragments leave in order, whatever the order they came in.
    assert [offset(packet) for packet in passed] == [0, PIECE, 2 * PIECE]
    assert {source_address(packet.data) for packet in passed} == {way.known_as}


@pytest.mark.usefixtures("_all_time")
@pytest.mark.parametrize(("size", "piece"), [(100, 8), (10_000, 552), (65_507, PIECE)])
def test_datagrams_of_any_size_come_through_in_shuffled_fragments(
    way: Way, size: int, piece: int
) -> None:
    payload = os.urandom(size)
    way.send(shuffled(fragments(way.datagram(payload), piece)))
    assert way.received() == payload


def test_of_fragments_that_come_twice_one_datagram_comes_through(way: Way) -> None:
    payload = os.urandom(3 * PIECE - 100)
    first, middle, last = fragments(way.datagram(payload), PIECE)
    way.send([first, first, last, last, first, middle, middle])
    way.send([way.datagram(b"and no other")])
    assert way.received() == payload
    assert way.received() == b"and no other"


@pytest.mark.usefixtures("_all_time")
def test_hosts_with_the_same_identification_are_not_mixed_up(lab: Lab) -> None:
    payloads = [os.urandom(3 * PIECE - 100) for _ in lab.inside]
    with lab.outside[0].socket(AF_INET, SOCK_DGRAM) as server:
        server.bind((lab.outside[0].address, SERVER_PORT))
        pieces = [
            fragments(udp((host.address, CLIENT_PORT), server.getsockname(), payload), PIECE)
            for host, payload in zip(lab.inside, payloads, strict=True)
        ]
        sends = [sender(lab, host, "eth0", "lan") for host in lab.inside]
        for turn in zip(*pieces, strict=True):
            for send, piece in zip(sends, turn, strict=True):
                send([piece])
        assert [server.recv(65535) for _ in lab.inside] == payloads


@pytest.mark.usefixtures("_all_time")
@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_an_echo_request_in_fragments_in_any_order_is_answered(
    lab: Lab, order: tuple[int, ...]
) -> None:
    inside, outside = lab.inside[0], lab.outside[0]
    payload = os.urandom(3 * PIECE - 100)
    request = identified(query((inside.address, 77), outside.address, payload=payload))
    pieces = fragments(request, PIECE)
    with inside.socket(AF_INET, SOCK_RAW, IPPROTO_ICMP) as line:
        sender(lab, inside, "eth0", "lan")(pieces[number] for number in order)
        answer = line.recv(65535)
    assert source_address(answer) == outside.address
    assert (answer[20], answer[24:]) == (ECHO_REPLY, request[24:])


# ---- what is not whole --------------------------------------------------------------------------


def without(missing: int, packet: bytes) -> list[bytes]:
    pieces = fragments(packet, PIECE)
    return pieces[:missing] + pieces[missing + 1 :]


NOT_WHOLE: dict[str, Callable[[bytes], list[bytes]]] = {
    "the first is missing": lambda packet: without(0, packet),
    "one between is missing": lambda packet: without(1, packet),
    "the last is missing": lambda packet: without(2, packet),
    "two overlap": lambda packet: [
        fragment(packet, 0, PIECE),
        fragment(packet, PIECE - 8, PIECE),
        fragment(packet, 2 * PIECE - 8, PIECE),
    ],
    "the second overlaps the header of the first": lambda packet: [
        fragment(packet, 0, 16),
        fragment(packet, 8, PIECE),
        fragment(packet, PIECE + 8, PIECE),
        fragment(packet, 2 * PIECE + 8, PIECE),
    ],
    "there are two ends": lambda packet: [
        *without(1, packet),
        fragment(packet[:-8], 2 * PIECE, PIECE),
        fragment(packet, PIECE, PIECE),
    ],
    "it ends past 65535": lambda packet: [
        *fragments(packet, PIECE)[:2],
        fragment(packet.ljust(20 + 65_600, b"."), 65_520, 80),
    ],
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_nothing_passes_of_a_datagram_that_is_not_whole(way: Way, case: str) -> None:
    packet = way.datagram(os.urandom(3 * PIECE - 100))
    with way.passing() as passed:
        way.send(NOT_WHOLE[case](packet))
        way.send([way.datagram(b"whole")])
        assert way.received() == b"whole"
    assert len(passed) == 1


def test_what_the_gateway_says_of_a_missing_rest_names_no_inside_address(
    lab: Lab, way: Way
) -> None:
    """The gateway tells only senders outside, whose packets are for the gateway itself."""
    first, *_ = fragments(way.datagram(bytes(3 * PIECE)), PIECE)
    assert eventually(lambda: fragment_memory(lab.gateway) == 0)
    # What the gateway says of those before may still wait for nfmasq: it is gone when this is here.
    way.send([way.datagram(b"whole")])
    assert way.received() == b"whole"
    is_told = way.known_as != GATEWAY
    with lab.capture(lab.router, "wan", f"src {GATEWAY}") as said:
        seen, told = fragments_seen(lab.gateway), times_exceeded(lab.outside[0])
        way.send([first])
        assert eventually(lambda: fragments_seen(lab.gateway) > seen)
        assert eventually(lambda: fragment_memory(lab.gateway) == 0)
        # The gateway may have sent the error a while before it is on the wire.
        assert eventually(lambda: times_exceeded(lab.outside[0]) == told + is_told)
    assert [quoted(packet.data)[:20] for packet in said] == [first[:20]] * is_told


# ---- too large for the outside ------------------------------------------------------------------


@pytest.fixture
def _narrow(lab: Lab) -> Iterator[None]:
    """Make the link from the gateway to the outside narrow; what is learned of it is forgotten."""
    lab.set_mtu("wan", NARROW)
    yield
    lab.set_mtu("wan", 1500)
    lab.inside[0].ip("route flush cache")


@pytest.mark.usefixtures("_narrow")
def test_what_may_be_cut_leaves_in_fragments_in_order(lab: Lab) -> None:
    ping = ["ping", "-c", "1", "-W", "10", "-M", "dont", "-s", "1400", lab.outside[0].address]
    with lab.capture(lab.router, "wan", f"src {GATEWAY}") as sent:
        assert "1 received" in lab.inside[0].run(ping).stdout
    assert [offset(packet) for packet in sent] == [0, (NARROW - 20) // 8 * 8]


@pytest.mark.usefixtures("_narrow")
def test_a_sender_is_told_what_is_too_large_and_may_not_be_cut(lab: Lab) -> None:
    ping = ["ping", "-c", "1", "-W", "10", "-M", "do", "-s", "1400", lab.outside[0].address]
    with lab.capture(lab.router, "wan", f"src {GATEWAY}") as sent:
        told = lab.inside[0].run(ping, check=False).stdout
    assert re.search(rf"From {lab.gateway.interfaces['lan']} .*mtu ?= ?{NARROW}", told)
    assert sent == []


# ---- a flood ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web(lab: Lab) -> Iterator[WebServer]:
    with web_server(lab.outside[0]) as web:
        web.files["/text"] = TEXT.encode()
        yield web


def fragment_memory(host: Host) -> int:
    """Return the bytes that the host's kernel has of datagrams that are not whole yet."""
    sockets = host.call(Path("/proc/thread-self/net/sockstat").read_text)
    return int(re.findall(r"FRAG: inuse \d+ memory (\d+)", sockets)[0])


def fragments_seen(host: Host) -> int:
    """Return how many fragments have come to the host's kernel to be put together."""
    return counted(host, "Ip", "ReasmReqds")


def times_exceeded(host: Host) -> int:
    """Return how many ICMP errors "time exceeded" have come to the host."""
    return counted(host, "Icmp", "InTimeExcds")


def counted(host: Host, protocol: str, name: str) -> int:
    names, figures = (
        line.split()
        for line in host.call(Path("/proc/thread-self/net/snmp").read_text).splitlines()
        if line.startswith(f"{protocol}: ")
    )
    return int(figures[names.index(name)])


def is_full(host: Host) -> bool:
    return fragment_memory(host) >= int(host.sysctl("net.ipv4.ipfrag_high_thresh"))


@contextmanager
def flooding(send: Callable[[Iterable[bytes]], None], packet: bytes) -> Iterator[None]:
    """Send first fragments without end within the block, and never the rest of a datagram."""
    flood = cycle([fragment(identified(packet), 0, PIECE) for _ in range(4000)])
    enough = Event()

    def keep_sending() -> None:
        while not enough.is_set():
            send(islice(flood, 100))
            time.sleep(0.005)

    thread = Thread(target=keep_sending)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def pings(host: Host, server: Host, size: int) -> bool:
    """Say whether all of five pings with `size` bytes of data are answered."""
    ping = ["ping", "-q", "-c", "5", "-i", "0.05", "-W", "10", "-s", str(size), server.address]
    return host.run(ping, check=False).returncode == 0


@pytest.mark.parametrize("side", ["inside", "outside"])
def test_a_flood_of_fragments_does_not_stop_other_traffic(
    lab: Lab, web: WebServer, side: str
) -> None:
    inside, outside, gateway = lab.inside[0], lab.outside[0], lab.gateway
    if side == "inside":
        send, passing = sender(lab, lab.inside[1], "eth0", "lan"), datagrams_out
        ends = (lab.inside[1].address, CLIENT_PORT), (outside.address, SERVER_PORT)
    else:
        send, passing = sender(lab, lab.router, "wan", "wan"), datagrams_in
        ends = (lab.outside[1].address, SERVER_PORT), (GATEWAY, 61000)

    download = ["curl", "-sSf", "--max-time", "50", f"{web.url}/text"]
    with passing(lab) as passed:
        with flooding(send, udp(*ends, bytes(3000))):
            assert eventually(lambda: is_full(gateway))
            assert inside.run(download).stdout == TEXT
            assert pings(inside, outside, 56)
            # It is full but for moments, when the time of many fragments is up at once.
            assert eventually(lambda: is_full(gateway))
        assert eventually(lambda: fragment_memory(gateway) == 0)
    assert passed == []
    assert pings(inside, outside, 4000)
