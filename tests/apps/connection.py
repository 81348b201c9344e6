"""A TCP connection through a masquerade: two ends, and a wire that may lose packets.

An end sends what it has in pieces of any size, sends again from the first byte that is not
acknowledged, and keeps what it receives, in any order. A test fails where a byte of the stream
comes again with another value, or where bytes are acknowledged that the end has not sent.
"""

from __future__ import annotations

import dpkt

from nfmasq.engine import Flags
from tests.gateway import Gateway
from tests.packets import ACK, FIN, SYN, URG, Endpoint, checksums_are_right, number, source, tcp

CIRCLE = 2**32
LONGEST = 1460


def parsed(packet: bytes) -> dpkt.tcp.TCP:
    assert checksums_are_right(packet)
    return dpkt.ip.IP(packet).data


class End:
    """One end of a connection; positions count from the first byte of its stream."""

    def __init__(self, first_seq: int) -> None:
        self.first = (first_seq + 1) % CIRCLE
        self.text = b""
        self.acknowledged = 0
        self.sent = 0
        self.peer_first = 0
        self.bytes_received: dict[int, int] = {}

    @property
    def received(self) -> bytes:
        """The bytes that came without a gap."""
        return bytes(self.bytes_received[n] for n in range(self._received_to()))

    def _received_to(self) -> int:
        n = 0
        while n in self.bytes_received:
            n += 1
        return n

    def says(self, text: bytes) -> None:
        self.text += text

    def next_piece(self, size: int) -> tuple[int, bytes]:
        """Take at most `size` bytes that were not sent yet: their position, and the bytes."""
        at = self.sent
        self.sent = min(at + size, len(self.text))
        return at, self.text[at : self.sent]

    def first_again(self, size: int) -> tuple[int, bytes]:
        """Return at most `size` bytes that are not acknowledged: their position, and the bytes."""
        at = self.acknowledged
        return at, self.text[at : min(at + size, self.sent)]

    def take(self, segment: dpkt.tcp.TCP) -> None:
        acknowledged = _signed(segment.ack - self.first)
        assert acknowledged <= self.sent
        self.acknowledged = max(self.acknowledged, acknowledged)
        at = _signed(segment.seq - self.peer_first)
        for n, byte in enumerate(segment.data, at):
            if n >= 0:
                assert self.bytes_received.setdefault(n, byte) == byte

    def numbers(self, at: int) -> tuple[int, int]:
        """Return the sequence and acknowledgement numbers of a segment that begins at `at`."""
        return (self.first + at) % CIRCLE, (self.peer_first + self._received_to()) % CIRCLE


class Connection:
    """A connection of a client inside to a server outside, or the other way round.

    A server inside is reached by the masquerade port `forwarded`.
    """

    def __init__(
        self,
        gateway: Gateway,
        client: Endpoint,
        server: Endpoint,
        *,
        forwarded: int | None = None,
        first_seqs: tuple[int, int] = (1000, 2000),
    ) -> None:
        self.gateway = gateway
        self.client, self.server = (End(seq) for seq in first_seqs)
        if forwarded is None:
            self.inside, self.outside = self.client, self.server
            self._inside_at, self._outside_at = client, server
            opening = self.put_through(self.inside, tcp(client, server, SYN, seq=first_seqs[0]))
            assert opening is not None
            self.mapped = source(opening)
            answer = tcp(server, self.mapped, SYN | ACK, seq=first_seqs[1], ack=self.client.first)
            self.put_through(self.outside, answer)
            last = tcp(client, server, ACK, seq=self.client.first, ack=self.server.first)
            self.put_through(self.inside, last)
        else:
            self.inside, self.outside = self.server, self.client
            self._inside_at, self._outside_at = server, client
            self.mapped = (gateway.address, forwarded)
            if not gateway.sessions.forwards:
                forward(gateway, forwarded, server)
            self.put_through(self.outside, tcp(client, self.mapped, SYN, seq=first_seqs[0]))
            answer = tcp(server, client, SYN | ACK, seq=first_seqs[1], ack=self.client.first)
            self.put_through(self.inside, answer)
        self.client.peer_first, self.server.peer_first = self.server.first, self.client.first
        self.acknowledges(self.client)

    def put_through(self, end: End, packet: bytes) -> bytes | None:
        """Send a packet of one end through the gateway; returns what leaves it, or None."""
        return self.gateway.out(packet) if end is self.inside else self.gateway.into(packet)

    def packet(
        self, end: End, at: int, piece: bytes, flags: int = ACK, *, urgent: int = 0
    ) -> bytes:
        """Build a packet of one end with a piece of its stream, and an urgent pointer."""
        seq, ack = end.numbers(at)
        there = self._outside_at if end is self.inside else self.mapped
        here = self._inside_at if end is self.inside else self._outside_at
        flags |= URG if urgent else 0
        return tcp(here, there, flags, piece, seq=seq, ack=ack, urgent=urgent)

    def goes(self, end: End, at: int, piece: bytes, flags: int = ACK) -> bytes | None:
        """Send a piece of an end's stream to the other end; returns what arrives, or None."""
        return self.arrives(end, self.packet(end, at, piece, flags))

    def arrives(self, end: End, packet: bytes) -> bytes | None:
        """Send a packet of one end to the other end; returns the packet as it arrives, or None."""
        arrived = self.put_through(end, packet)
        if arrived is not None:
            self.other(end).take(parsed(arrived))
        return arrived

    def acknowledges(self, end: End) -> None:
        """Send a packet without bytes."""
        self.goes(end, end.sent, b"")

    def other(self, end: End) -> End:
        return self.outside if end is self.inside else self.inside

    def say(self, end: End, text: bytes) -> bytes:
        """Send text in one piece and have it acknowledged; returns what the other end received."""
        before = len(self.other(end).received)
        end.says(text)
        at, piece = end.next_piece(len(text))
        self.goes(end, at, piece)
        self.acknowledges(self.other(end))
        return self.other(end).received[before:]

    def finish(self, size: int = LONGEST) -> None:
        """Have both ends send, in pieces of `size`, until all their text is acknowledged."""
        for end in (self.inside, self.outside):
            for _ in range(4 * len(end.text) + 4):
                piece = (
                    end.next_piece(size)
                    if end.acknowledged == end.sent
                    else (end.first_again(size))
                )
                self.goes(end, *piece)
                self.acknowledges(self.other(end))
                if end.acknowledged == len(end.text):
                    break

    def ends(self, end: End) -> None:
        self.goes(end, end.sent, b"", FIN | ACK)


def forward(gateway: Gateway, mport: int, inside: Endpoint, protocol: int = 6) -> None:
    """Have a masquerade port lead to an inside server, for the first client, as a person may."""
    flags = Flags.USER | Flags.NO_DADDR | Flags.NO_DPORT
    ms = gateway.sessions.ip_masq_new(
        protocol, number(gateway.address), mport, number(inside[0]), inside[1], 0, 0, flags
    )
    assert ms is not None
    gateway.sessions.ip_masq_put(ms)


def _signed(distance: int) -> int:
    return (distance + 2**31) % CIRCLE - 2**31
