"""PPTP: two clients inside that give their calls the same ID, and a server outside.

Few kernels have PPP, so both ends are scripts: the control connections are the kernel's TCP, and
the calls' packets go through raw sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from socket import AF_INET, SO_REUSEADDR, SOCK_RAW, SOCK_STREAM, SOL_SOCKET, socket

import pytest

from nfmasq.lab import Daemon, Host, Lab
from tests.apps.pptp import (
    CONNECTED,
    DISCONNECT_NOTIFY,
    GRE,
    LENGTHS,
    OUTGOING_REPLY,
    OUTGOING_REQUEST,
    gre,
    message,
)
from tests.packets import source_address
from tests.traffic.clients import BRIEFLY, PATIENCE
from tests.traffic.observed import entries, eventually

GATEWAY = "198.51.100.2"
OWN_ID = 7
"""The ID that each client gives its call."""

Masquerade = Callable[..., Daemon]


class End(AbstractContextManager["End"]):
    """One end of a control connection, and of its call."""

    def __init__(self, host: Host, control: socket, peer: str) -> None:
        self.control, self.peer = control, peer
        self.calls = host.socket(AF_INET, SOCK_RAW, GRE)

    def __exit__(self, *_: object) -> None:
        self.control.close()
        self.calls.close()

    def hears(self, kind: int) -> bytes:
        """Return the next message, which has this kind, in however many pieces it comes."""
        said = b""
        while len(said) < LENGTHS[kind]:
            piece = self.control.recv(LENGTHS[kind] - len(said))
            assert piece
            said += piece
        assert said[8:10] == bytes([0, kind])
        return said

    def sends(self, call_id: int, text: bytes) -> None:
        """Send a packet for the peer's call."""
        self.calls.sendto(gre(call_id, text), (self.peer, 0))

    def receives(self, call_id: int, text: bytes, patience: float = PATIENCE) -> bool:
        """Say whether a packet with `text` comes for a call of this end."""
        self.calls.settimeout(patience)
        try:
            packet = self.calls.recv(65535)
        except TimeoutError:
            return False
        return source_address(packet) == self.peer and packet[20:] == gre(call_id, text)


def connected(stack: ExitStack, lab: Lab) -> list[tuple[End, End]]:
    """Return both ends, client and server, of a control connection of each inside host."""
    server = lab.outside[0]
    listener = stack.enter_context(server.socket(AF_INET, SOCK_STREAM))
    listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    listener.bind(("", 1723))
    listener.listen()
    both = []
    for host in lab.inside:
        client = host.socket(AF_INET, SOCK_STREAM)
        client.connect((server.address, 1723))
        accepted, _ = listener.accept()
        accepted.settimeout(PATIENCE)
        ends = (End(host, client, server.address), End(server, accepted, GATEWAY))
        for end in ends:
            stack.enter_context(end)
        both.append(ends)
    return both


def called(client: End, server: End, peers_id: int) -> int:
    """Set up a call; returns the ID by which the server knows the client's end."""
    request = message(OUTGOING_REQUEST, OWN_ID)
    client.control.sendall(request[:20])
    client.control.sendall(request[20:])
    told = int.from_bytes(server.hears(OUTGOING_REQUEST)[12:14], "big")
    server.control.sendall(message(OUTGOING_REPLY, peers_id, told, result=CONNECTED))
    reply = client.hears(OUTGOING_REPLY)
    assert reply == message(OUTGOING_REPLY, peers_id, OWN_ID, result=CONNECTED)
    return told


def test_calls_of_one_id_with_one_server_do_not_mix(lab: Lab, masquerade: Masquerade) -> None:
    daemon = masquerade("--app", "pptp", rules=["--other-protocols"])
    with ExitStack() as stack, lab.capture(lab.outside[0], "eth0", "net 10.77.0.0/24") as leaked:
        pairs = connected(stack, lab)
        told = [called(*pair, peers_id) for pair, peers_id in zip(pairs, (1, 2), strict=True)]
        assert told[0] != told[1]
        for n, (client, server) in enumerate(pairs):
            for size in (0, 1400, 3000):
                client.sends(n + 1, bytes(size))
                for _, each in pairs:  # a raw socket gets all that comes to its host
                    assert each.receives(n + 1, bytes(size))
                server.sends(told[n], bytes(size))
                assert client.receives(OWN_ID, bytes(size))
        for client, _ in pairs:
            assert not client.receives(OWN_ID, b"", BRIEFLY)  # nothing of the other client's
        assert len(entries(daemon, protocol="gre")) == 4
        client, server = pairs[0]
        server.control.sendall(message(DISCONNECT_NOTIFY, 1))
        client.hears(DISCONNECT_NOTIFY)
        assert len(entries(daemon, protocol="gre")) == 2
        client.sends(1, b"too late")
        assert not server.receives(1, b"too late", BRIEFLY)
        for client, server in pairs:
            client.control.close()
            server.control.close()
        assert eventually(lambda: not entries(daemon, protocol="gre"))
    assert leaked == []


@pytest.mark.parametrize("options", [(), ("--app", "off")])
def test_without_the_helper_the_messages_pass_unchanged_and_no_call_gets_out(
    lab: Lab, masquerade: Masquerade, options: tuple[str, ...]
) -> None:
    masquerade(*options, rules=["--other-protocols"])
    with ExitStack() as stack:
        for client, server in connected(stack, lab):
            assert called(client, server, 1) == OWN_ID
            client.sends(1, b"text")
            assert not server.receives(1, b"text", BRIEFLY)
