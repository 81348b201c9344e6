"""Sockets of clients, and whether they get answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from socket import AF_INET, SO_LINGER, SOCK_STREAM, SOL_SOCKET, socket
from struct import pack

from nfmasq.lab import Host

REFUSED = "No route to host"
"""The error that a program gets where its session is refused: ICMP, administratively prohibited."""

PATIENCE = 20.0
"""Seconds to wait for a packet that is to come, on a busy machine too."""

BRIEFLY = 0.5
"""Seconds to wait for a packet that is not to come."""

RESET_AT_THE_END = pack("@ii", 1, 0)
"""For SO_LINGER: a connection that is closed sends at most one RST.

An orderly end could go on into the next test, and make an entry there.
"""


@contextmanager
def connected(
    host: Host, kind: int, server: Host, port: int, patience: float = PATIENCE
) -> Iterator[socket]:
    """Connect a socket of a host to a port of a server, within the block."""
    with host.socket(AF_INET, kind) as client:
        client.settimeout(patience)
        client.setsockopt(SOL_SOCKET, SO_LINGER, RESET_AT_THE_END)
        client.connect((server.address, port))
        yield client


def connection(
    stack: ExitStack, host: Host, listener: socket, patience: float = PATIENCE
) -> tuple[socket, socket]:
    """Connect a host to a listener; returns client and server, both closed by the stack."""
    client = stack.enter_context(host.socket(AF_INET, SOCK_STREAM))
    client.settimeout(patience)
    client.setsockopt(SOL_SOCKET, SO_LINGER, RESET_AT_THE_END)
    client.connect(listener.getsockname())
    server = stack.enter_context(listener.accept()[0])
    server.settimeout(patience)
    return client, server


def echoed(client: socket) -> bool:
    """Say whether a datagram comes back."""
    client.send(b"hello")
    try:
        return client.recv(100) == b"hello"
    except TimeoutError:
        return False


def answered(client: socket, server: socket) -> bool:
    """Say whether each end of a connection gets what the other end sends."""
    client.sendall(b"question")
    server.sendall(b"answer")
    return (server.recv(100), client.recv(100)) == (b"question", b"answer")
