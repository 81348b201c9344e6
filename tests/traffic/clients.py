"""Sockets of clients, and whether they get answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from socket import AF_INET, SO_LINGER, SOCK_STREAM, SOL_SOCKET, socket
from struct import pack

from nfmasq.lab import Host

REFUSED = "No route to host"
"""What a program reads whose session cannot be had: ICMP, administratively prohibited."""

PATIENCE = 20.0
"""Seconds to wait for what is to come, on a busy machine too."""

BRIEFLY = 0.5
"""Seconds to wait for what is not to come."""

RESET_AT_THE_END = pack("@ii", 1, 0)
"""For SO_LINGER: of a connection that is closed, one RST is left at most.

An orderly end could go on into the next test, and make an entry there.
"""


@contextmanager
def connected(
    host: Host, kind: int, server: Host, port: int, patience: float = PATIENCE
) -> Iterator[socket]:
    """A connected socket, within the block."""
    with host.socket(AF_INET, kind) as client:
        client.settimeout(patience)
        client.setsockopt(SOL_SOCKET, SO_LINGER, RESET_AT_THE_END)
        client.connect((server.address, port))
        yield client


def connection(
    stack: ExitStack, host: Host, listener: socket, patience: float = PATIENCE
) -> tuple[socket, socket]:
    """A TCP connection to a listener, for as long as the stack: its two ends."""
    client = stack.enter_context(host.socket(AF_INET, SOCK_STREAM))
    client.settimeout(patience)
    client.setsockopt(SOL_SOCKET, SO_LINGER, RESET_AT_THE_END)
    client.connect(listener.getsockname())
    server = stack.enter_context(listener.accept()[0])
    server.settimeout(patience)
    return client, server


def echoed(client: socket) -> bool:
    """Whether a datagram comes back."""
    client.send(b"hello")
    try:
        return client.recv(100) == b"hello"
    except TimeoutError:
        return False


def answered(client: socket, server: socket) -> bool:
    """Whether what each end of a connection sends comes to the other."""
    client.sendall(b"question")
    server.sendall(b"answer")
    return (server.recv(100), client.recv(100)) == (b"question", b"answer")
