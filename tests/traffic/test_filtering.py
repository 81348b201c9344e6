"""Whom the filtering lets in to a port in use (RFC 4787 REQ-8, RFC 5382 REQ-3), on the wire.

An inside host speaks with one of four outside endpoints: two ports on each of two hosts. Then all
four send to the masquerade endpoint of the inside host. Its neighbour speaks with the other outside
host, and this opens nothing to the first inside host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from socket import (
    AF_INET,
    SO_LINGER,
    SO_REUSEPORT,
    SOCK_DGRAM,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)
from struct import pack

import pytest

from nfmasq.engine.table.mapping import (
    ADDRESS_AND_PORT_DEPENDENT,
    ADDRESS_DEPENDENT,
    ENDPOINT_INDEPENDENT,
)
from nfmasq.lab import Daemon, Lab
from tests.packets import Endpoint
from tests.traffic.clients import BRIEFLY, PATIENCE

SERVER, SERVERS_OTHER_PORT = ("203.0.113.11", 4000), ("203.0.113.11", 4001)
OTHER_HOST, OTHER_HOSTS_OTHER_PORT = ("203.0.113.12", 4000), ("203.0.113.12", 4001)
OUTSIDE = [SERVER, SERVERS_OTHER_PORT, OTHER_HOST, OTHER_HOSTS_OTHER_PORT]
CLIENT, NEIGHBOUR = ("10.77.0.11", 5000), ("10.77.0.12", 5000)

FILTERINGS = {
    ENDPOINT_INDEPENDENT: {SERVERS_OTHER_PORT, OTHER_HOST, OTHER_HOSTS_OTHER_PORT},
    ADDRESS_DEPENDENT: {SERVERS_OTHER_PORT},
    ADDRESS_AND_PORT_DEPENDENT: set(),
}
"""The outside endpoints that each filtering lets in, beside the server."""

Masquerade = Callable[..., Daemon]
OpenAt = Callable[[Endpoint, int], socket]


@pytest.fixture
def open_at(lab: Lab) -> Iterator[OpenAt]:
    """Yield a function that opens a socket at an endpoint of the lab, even if others use it.

    A connection ends with an RST, and nothing of it is left for the next test.
    """
    with ExitStack() as stack:

        def open_socket(endpoint: Endpoint, kind: int) -> socket:
            host = next(host for host in lab.hosts if host.address == endpoint[0])
            opened = stack.enter_context(host.socket(AF_INET, kind))
            opened.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1)
            opened.setsockopt(SOL_SOCKET, SO_LINGER, pack("@ii", 1, 0))
            opened.bind(endpoint)
            return opened

        yield open_socket


@pytest.mark.parametrize("filtering", FILTERINGS)
def test_datagrams_come_in_from_whom_the_filtering_admits(
    masquerade: Masquerade, open_at: OpenAt, filtering: str
) -> None:
    masquerade("--filtering", filtering)
    client, neighbour = open_at(CLIENT, SOCK_DGRAM), open_at(NEIGHBOUR, SOCK_DGRAM)
    server, *others = (open_at(endpoint, SOCK_DGRAM) for endpoint in OUTSIDE)
    client.sendto(b"hello", SERVER)
    neighbour.sendto(b"hello", OTHER_HOST)
    _, seen_as = server.recvfrom(100)

    for outside in (*others, server):
        outside.sendto(b"let me in", seen_as)
    admitted = {*FILTERINGS[filtering], SERVER}
    assert {client.recvfrom(100)[1] for _ in admitted} == admitted


@pytest.mark.parametrize("filtering", FILTERINGS)
def test_connections_come_in_from_whom_the_filtering_admits(
    masquerade: Masquerade, open_at: OpenAt, filtering: str
) -> None:
    masquerade("--filtering", filtering)
    client, neighbour = open_at(CLIENT, SOCK_STREAM), open_at(NEIGHBOUR, SOCK_STREAM)
    server, neighbours_server, *others = (
        open_at(endpoint, SOCK_STREAM) for endpoint in (SERVER, OTHER_HOST, *OUTSIDE[1:])
    )
    for listener in (server, neighbours_server):
        listener.listen()
    client.connect(SERVER)
    neighbour.connect(OTHER_HOST)
    connection, seen_as = server.accept()
    listener = open_at(CLIENT, SOCK_STREAM)
    listener.listen()

    with connection:
        came_in = set()
        for outside in others:
            admitted = outside.getsockname() in FILTERINGS[filtering]
            if reaches(outside, seen_as, PATIENCE if admitted else BRIEFLY):
                came_in.add(outside.getsockname())
        assert came_in == FILTERINGS[filtering]
        assert {listener.accept()[1] for _ in came_in} == came_in
        connection.sendall(b"still here")
        assert client.recv(100) == b"still here"


def reaches(outside: socket, endpoint: Endpoint, patience: float) -> bool:
    """Say whether a connection is accepted, within `patience` seconds."""
    outside.settimeout(patience)
    try:
        outside.connect(endpoint)
    except (TimeoutError, ConnectionRefusedError):
        return False
    return True
