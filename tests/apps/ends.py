"""Two ends of a TCP connection as real ends are, and a wire that does its worst.

An end sends its text in segments of any length, sends again what is not acknowledged, cut
differently, honours what it is told by SACK blocks (RFC 2018) for ever, and tells the other end
what it has. The wire loses, delays, repeats and swaps packets, before the gateway and behind it,
and divides what is longer than a segment.

Positions count from the first byte of a stream. A FIN takes a position of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple, TypeVar

from tests.packets import ACK, FIN, SYN, checksums_are_right

CIRCLE = 2**32
T = TypeVar("T")

REMEMBERED = 60
"""Packets of which one may come again much later."""

_SACK, _NO_OPERATION = 5, 1
_IP_HEADER = 20


class Segment(NamedTuple):
    """What an end reads of a packet; a block is the edges of a SACK block."""

    seq: int
    ack: int
    flags: int
    payload: bytes
    blocks: list[tuple[int, int]]


class Sent(NamedTuple):
    """What an end writes into a packet."""

    seq: int
    ack: int
    flags: int
    payload: bytes
    options: bytes


def read(packet: bytes) -> Segment:
    """Read a packet; checks the checksums of all but the longest."""
    assert len(packet) > 3000 or checksums_are_right(packet)
    seq, ack, words, flags = struct.unpack_from("!IIBB", packet, _IP_HEADER + 4)
    end = _IP_HEADER + (words >> 4) * 4
    return Segment(seq, ack, flags, packet[end:], list(_blocks(packet[_IP_HEADER + 20 : end])))


def _blocks(options: bytes) -> Iterator[tuple[int, int]]:
    while options:
        if options[0] == _NO_OPERATION:
            options = options[1:]
            continue
        kind, length = options[0], options[1]
        assert 2 <= length <= len(options)
        if kind == _SACK:
            yield from struct.iter_unpack("!II", options[2:length])
        options = options[length:]


class End:
    """One end of a connection. A test fails where an end is told something that is not true."""

    def __init__(self, first_seq: int, text: bytes, closes: bool) -> None:
        self.first = (first_seq + 1) % CIRCLE
        self.peer_first = 0
        self.text = text
        self.total = len(text) + closes
        self.acknowledged = 0
        self.sent = 0
        self.sacked = bytearray(self.total + 1)
        self.received = bytearray()
        self.received_to = 0
        self.closed_at: int | None = None
        self.owes_acknowledgement = False
        self._has = bytearray()
        self._repeated: list[tuple[int, int]] = []

    # -- sending ------------------------------------------------------------------------

    def segment(self, at: int, length: int) -> Sent:
        """Return a segment of at most `length` bytes that begins at `at`."""
        stop = min(at + length, self.total)
        flags = ACK | (FIN if at <= len(self.text) < stop else 0)
        self.sent = max(self.sent, stop)
        self.owes_acknowledgement = False
        is_closed = self.closed_at == self.received_to
        ack = (self.peer_first + self.received_to + is_closed) % CIRCLE
        seq = (self.first + at) % CIRCLE
        return Sent(seq, ack, flags, self.text[max(at, 0) : max(stop, 0)], self._options())

    def again_from(self, at: int, length: int) -> tuple[int, int]:
        """Return where a segment that is sent again begins, and its length.

        It begins at the first byte from `at` on that no SACK block was told of, and ends before the
        next byte that a SACK block was told of.
        """
        at = self.sacked.find(0, max(at, self.acknowledged))
        stop = self.sacked.find(1, at, self.sent)
        return at, min(length, (self.sent if stop < 0 else stop) - at)

    def _options(self) -> bytes:
        blocks, self._repeated = self._repeated + self._runs(), []
        edges = [(self.peer_first + edge) % CIRCLE for block in blocks[:3] for edge in block]
        if not edges:
            return b""
        return struct.pack(f"!BBBB{len(edges)}I", 1, 1, _SACK, 2 + 4 * len(edges), *edges)

    def _runs(self) -> list[tuple[int, int]]:
        """Return what came after a gap, as blocks."""
        runs: list[tuple[int, int]] = []
        at = self._has.find(1, self.received_to)
        while at >= 0:
            stop = self._has.find(0, at)
            runs.append((at, stop if stop >= 0 else len(self._has)))
            at = self._has.find(1, runs[-1][1])
        return runs[::-1]

    # -- receiving ----------------------------------------------------------------------

    def take(self, segment: Segment) -> None:
        """Receive a segment."""
        if segment.flags & SYN:
            self.owes_acknowledgement = True
            return
        acknowledged = signed(segment.ack - self.first)
        assert acknowledged <= self.sent, "acknowledged before it was sent"
        self.acknowledged = max(self.acknowledged, acknowledged)
        for block in segment.blocks:
            self._take_block(acknowledged, *(signed(edge - self.first) for edge in block))
        self._take_bytes(signed(segment.seq - self.peer_first), segment)

    def _take_block(self, acknowledged: int, begin: int, stop: int) -> None:
        assert begin < stop, "an empty block"
        assert stop <= self.sent, "a block of what was not sent"
        assert not begin <= acknowledged < stop, "a block of what is acknowledged next"
        begin, stop = max(begin, 0), max(stop, 0)
        self.sacked[begin:stop] = b"\1" * (stop - begin)

    def _take_bytes(self, at: int, segment: Segment) -> None:
        payload = segment.payload
        end = at + len(payload)
        if payload or segment.flags & FIN or end < self.received_to:
            self.owes_acknowledgement = True
        if segment.flags & FIN:
            assert self.closed_at in (None, end), "the end of the stream moved"
            self.closed_at = end
        payload, at = payload[max(-at, 0) :], max(at, 0)  # the number of the SYN is no byte's
        if not payload:
            return
        missing = end - len(self.received)
        self.received += bytes(max(missing, 0))
        self._has += bytes(max(missing, 0))
        known = self._has[at:end]
        for n in _places(known):
            assert self.received[at + n] == payload[n], f"byte {at + n} changed"
        if end <= self.received_to:
            self._repeated = [(at, end)]
        self.received[at:end], self._has[at:end] = payload, b"\1" * len(payload)
        gap = self._has.find(0, self.received_to)
        self.received_to = gap if gap >= 0 else len(self._has)


def _places(known: bytearray) -> Iterator[int]:
    at = known.find(1)
    while at >= 0:
        yield at
        at = known.find(1, at + 1)


class Wire:
    """The way from each end to the other, through a gateway.

    `build` makes an end's packet of a segment's parts. `gateway` takes a packet of an end, and
    returns what leaves, or None.
    """

    def __init__(
        self,
        random: Random,
        ends: tuple[End, End],
        build: Callable[[End, Sent], bytes],
        gateway: Callable[[End, bytes], bytes | None],
    ) -> None:
        self.ends = ends
        self.before: list[tuple[End, bytes]] = []
        self.behind: list[tuple[End, Segment]] = []
        self._random = random
        self._build, self._gateway = build, gateway
        self._long_ago: list[tuple[End, bytes]] = []
        self._long_ago_behind: list[tuple[End, Segment]] = []

    def other(self, end: End) -> End:
        return self.ends[end is self.ends[0]]

    def send(self, end: End, at: int, length: int) -> None:
        """Have an end send a segment."""
        self.enter(end, self._build(end, end.segment(at, length)))

    def enter(self, end: End, packet: bytes) -> None:
        """Put a packet of an end on the wire."""
        self.before.append((end, packet))
        _remember(self._random, self._long_ago, (end, packet))

    def pass_gateway(self, at: int = 0) -> None:
        """Have one of the packets before the gateway pass it."""
        end, packet = self.before.pop(at)
        passed = self._gateway(end, packet)
        if passed is not None:
            self.behind += [(end, segment) for segment in self._divided(read(passed))]

    def arrive(self, at: int = 0) -> None:
        """Have one of the packets behind the gateway arrive."""
        end, segment = self.behind.pop(at)
        _remember(self._random, self._long_ago_behind, (end, segment))
        self.other(end).take(segment)

    def repeat_what_is_long_ago(self) -> None:
        """Have a packet that was on the wire at any time come again."""
        if self._long_ago:
            self.before.append(self._random.choice(self._long_ago))
        if self._long_ago_behind:
            self.behind.append(self._random.choice(self._long_ago_behind))

    def settle(self) -> None:
        """Have everything on the wire arrive, and be acknowledged, without a loss."""
        turns = 0
        while self.before or self.behind:
            turns += 1
            assert turns < 100, "acknowledgements without an end"
            while self.before:
                self.pass_gateway()
            while self.behind:
                self.arrive()
            for end in self.ends:
                if end.owes_acknowledgement:
                    self.send(end, end.sent, 0)

    def _divided(self, segment: Segment) -> list[Segment]:
        longest = self._random.choice((536, 1460, 70_000))
        if len(segment.payload) <= longest:
            return [segment]
        pieces = []
        for at in range(0, len(segment.payload), longest):
            piece = segment.payload[at : at + longest]
            is_last = at + longest >= len(segment.payload)
            flags = segment.flags if is_last else segment.flags & ~FIN
            seq = (segment.seq + at) % CIRCLE
            pieces.append(segment._replace(seq=seq, payload=piece, flags=flags))
        return pieces


def _remember(random: Random, memory: list[T], item: T) -> None:
    if len(memory) < REMEMBERED:
        memory.append(item)
    else:
        memory[random.randrange(REMEMBERED)] = item


def signed(distance: int) -> int:
    """Return a distance on the circle of sequence numbers, ahead or back, the shorter way."""
    return (distance + 2**31) % CIRCLE - 2**31
