"""Hole punching (RFC 5128): two hosts that a server outside has introduced speak with each other.

A rendezvous server tells each of two peers the endpoint at which it sees the other peer, and both
send there. The filtering may drop what one peer sends until the other peer has sent, too. But an
inside endpoint has the same mapping to the server and to the peer, so the holes meet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from socket import (
    AF_INET,
    SHUT_WR,
    SO_LINGER,
    SO_REUSEADDR,
    SOCK_DGRAM,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)
from struct import pack

import pytest

from nfmasq.engine.table.mapping import ADDRESS_AND_PORT_DEPENDENT, BEHAVIOURS
from nfmasq.lab import Daemon, Host, Lab
from tests.packets import Endpoint
from tests.traffic.observed import eventually, figure

GATEWAY = "198.51.100.2"
RENDEZVOUS_PORT, PEER_PORT = 3000, 5000

Masquerade = Callable[..., Daemon]
Open = Callable[..., socket]


@pytest.fixture
def open_socket(lab: Lab) -> Iterator[Open]:
    """Yield a function that opens a socket of a kind at a port of a host, even if others use it.

    A connection ends with an RST, and nothing of it is left for the next test.
    """
    with ExitStack() as stack:

        def open_socket(host: Host, kind: int, port: int = PEER_PORT) -> socket:
            opened = stack.enter_context(host.socket(AF_INET, kind))
            opened.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            opened.setsockopt(SOL_SOCKET, SO_LINGER, pack("@ii", 1, 0))
            opened.bind((host.address, port))
            return opened

        yield open_socket


# ---- the rendezvous -----------------------------------------------------------------------------


def introduced_by_udp(server: socket, *peers: socket) -> list[Endpoint]:
    """Introduce two peers to each other; returns the other's endpoint as each is told it."""
    seen = []
    for peer in peers:
        peer.sendto(b"here I am", server.getsockname())
        seen.append(server.recvfrom(100)[1])
    for there, other in zip(seen, reversed(seen), strict=True):
        server.sendto(written(other), there)
    return [read(peer.recv(100)) for peer in peers]


@contextmanager
def introduced_by_tcp(server: socket, *peers: socket) -> Iterator[list[Endpoint]]:
    """Introduce two peers to each other; yields the other's endpoint as each is told it.

    Within the block the server stays connected.
    """
    server.listen()
    with ExitStack() as stack:
        accepted = []
        for peer in peers:
            peer.connect(server.getsockname())
            accepted.append(stack.enter_context(server.accept()[0]))
        for connection, other in zip(accepted, reversed(accepted), strict=True):
            connection.sendall(written(other.getpeername()))
        yield [read(peer.recv(100)) for peer in peers]


def written(endpoint: Endpoint) -> bytes:
    return b"%s %d" % (endpoint[0].encode(), endpoint[1])


def read(told: bytes) -> Endpoint:
    address, port = told.decode().split()
    return address, int(port)


# ---- peers behind the same masquerade -----------------------------------------------------------


@pytest.mark.parametrize("filtering", BEHAVIOURS)
def test_two_inside_hosts_exchange_datagrams_by_hole_punching(
    lab: Lab, masquerade: Masquerade, open_socket: Open, filtering: str
) -> None:
    masquerade("--filtering", filtering)
    server = open_socket(lab.outside[0], SOCK_DGRAM, RENDEZVOUS_PORT)
    one, two = (open_socket(host, SOCK_DGRAM) for host in lab.inside)
    where_two_is, where_one_is = introduced_by_udp(server, one, two)
    assert {where_one_is[0], where_two_is[0]} == {GATEWAY}

    one.sendto(b"punch", where_two_is)
    two.sendto(b"punch", where_one_is)
    one.sendto(b"from one", where_two_is)
    two.sendto(b"from two", where_one_is)
    assert heard(one) == (b"from two", where_two_is)
    assert heard(two) == (b"from one", where_one_is)


def heard(peer: socket) -> tuple[bytes, Endpoint]:
    """Return the first datagram that is not just to punch a hole, and its source endpoint."""
    data, source = peer.recvfrom(100)
    return (data, source) if data != b"punch" else heard(peer)


@pytest.mark.parametrize("filtering", BEHAVIOURS)
def test_two_inside_hosts_connect_to_each_other_by_hole_punching(
    lab: Lab, masquerade: Masquerade, open_socket: Open, filtering: str
) -> None:
    masquerade("--filtering", filtering)
    server = open_socket(lab.outside[0], SOCK_STREAM, RENDEZVOUS_PORT)
    peers = [open_socket(host, SOCK_STREAM) for host in lab.inside]
    with introduced_by_tcp(server, *peers) as there, ThreadPoolExecutor() as executor:
        one, two = executor.map(punched, [open_socket] * 2, lab.inside, there)
        assert [one.getpeername(), two.getpeername()] == there
        assert speak(one, two)


def punched(open_socket: Open, host: Host, peer: Endpoint) -> socket:
    """Return a connection from a host's port to a peer that connects to the host at the same time.

    A first segment that comes to the peer a moment before the peer has sent its own is answered
    with "connection refused"; then both try again.
    """
    deadline = time.monotonic() + 30
    while True:
        attempt = open_socket(host, SOCK_STREAM)
        try:
            attempt.connect(peer)
        except ConnectionRefusedError:
            attempt.close()
            assert time.monotonic() < deadline
        else:
            return attempt


def speak(one: socket, two: socket) -> bool:
    """Say whether each end of a connection gets what the other end sends, and then its FIN."""
    for end, text in ((one, b"from one"), (two, b"from two")):
        end.sendall(text)
        end.shutdown(SHUT_WR)
    return (one.recv(100), one.recv(100)) == (b"from two", b"") and (
        (two.recv(100), two.recv(100)) == (b"from one", b"")
    )


# ---- one peer outside ---------------------------------------------------------------------------


def test_a_peer_outside_is_let_in_once_the_inside_host_has_sent_to_it(
    lab: Lab, masquerade: Masquerade, open_socket: Open
) -> None:
    """The filtering is the strictest."""
    masquerade("--filtering", ADDRESS_AND_PORT_DEPENDENT)
    server = open_socket(lab.outside[0], SOCK_DGRAM, RENDEZVOUS_PORT)
    inside = open_socket(lab.inside[0], SOCK_DGRAM)
    peer = open_socket(lab.outside[1], SOCK_DGRAM)
    peers_other_port = open_socket(lab.outside[1], SOCK_DGRAM, PEER_PORT + 1)
    where_peer_is, where_inside_is = introduced_by_udp(server, inside, peer)
    assert where_peer_is == peer.getsockname()

    peer.sendto(b"too early", where_inside_is)
    server.sendto(b"now", where_inside_is)
    assert inside.recv(100) == b"now"

    inside.sendto(b"from inside", where_peer_is)
    assert peer.recvfrom(100) == (b"from inside", where_inside_is)
    peers_other_port.sendto(b"not I", where_inside_is)
    peer.sendto(b"from peer", where_inside_is)
    assert inside.recvfrom(100) == (b"from peer", where_peer_is)


def test_a_peer_outside_whose_connection_comes_too_early_is_connected_when_the_inside_host_calls(
    lab: Lab, masquerade: Masquerade, open_socket: Open
) -> None:
    """The peer's first segment is dropped in silence, so its attempt goes on (RFC 5382 REQ-4)."""
    daemon = masquerade("--filtering", ADDRESS_AND_PORT_DEPENDENT)
    server = open_socket(lab.outside[0], SOCK_STREAM, RENDEZVOUS_PORT)
    hosts = lab.inside[0], lab.outside[1]
    with introduced_by_tcp(server, *(open_socket(host, SOCK_STREAM) for host in hosts)) as there:
        inside, peer = (open_socket(host, SOCK_STREAM) for host in hosts)
        with ThreadPoolExecutor() as executor:
            calling = executor.submit(peer.connect, there[1])
            assert eventually(lambda: held(daemon) >= 1)
            inside.connect(there[0])
            calling.result()
        assert speak(inside, peer)


def held(daemon: Daemon) -> float:
    """Return how many first segments that nobody asked for came from outside."""
    return figure(daemon, "nfmasq_errors_total", reason="unsolicited")
