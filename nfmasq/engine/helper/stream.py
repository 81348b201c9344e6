"""One direction of a TCP connection whose payload a helper rewrites, however it is cut up.

What a helper rewrites is a unit: a line, a record. The sender cuts the stream into segments as it
likes, between units or within a unit. It sends again what was lost, cut differently, and packets
overtake each other. Yet the receiver must get one and the same text, and both sides must agree on
the sequence numbers. Nothing here keeps a packet, or sends a packet of its own.

Theory of operation.

* Bytes are read once, in order. A segment that comes before its predecessors is dropped, as if it
  were lost: the sender sends it again.
* Where the end of a unit is missing, its start is held back: the text is kept, and the bytes are
  taken out of the segment. The receiver then acknowledges what comes before these bytes. To the
  sender this acknowledgement is passed on as if it were for the held bytes too (`IpMasqSeq.hold`),
  because a sender may wait for it before it sends the rest (Nagle's algorithm). A segment of which
  nothing is left repeats the byte before instead, which makes the receiver acknowledge.
* With its end the unit is whole and is rewritten. Its text is remembered, and from then on it is
  indivisible: a segment with any part of the unit carries all of it. So a segment that is sent
  again brings the same text, and brings the start of the unit too, which the sender knows as
  acknowledged.
* A segment that thereby becomes too long for a link loses its end, which the sender will send
  again; a short segment may grow. A segment with more units than can be remembered loses its end
  too, until some units are acknowledged. Acknowledged units are forgotten, and skipped where they
  are sent again.

Bytes that are not part of a rewritten unit pass as they are, and a unit holds back little
(`Units`). So a stream without anything to rewrite passes untouched.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from nfmasq.engine.wire.header import Refused
from nfmasq.engine.wire.protocols import FIN, SYN
from nfmasq.engine.wire.sequence import CHANGES_REMEMBERED, IpMasqSeq

MAY_GROW_TO = 1200
"""Bytes of payload that go through any link, near enough: a payload does not grow beyond this
length."""


class Segment(Protocol):
    """The parts of a packet that a stream reads and changes."""

    payload: bytes
    seq: int
    flags: int


class Units(Protocol):
    """Says how a helper divides a stream into units, and what it makes of each, in their order."""

    def length(self, text: bytes, at: int) -> int:
        """Return how many bytes of `text` from `at` on go together; 0: more have to come first.

        It is not 0 for a thousand bytes or more: nothing is held back for ever.
        """

    def rewrite(self, unit: bytes) -> bytes:
        """Return the text to send in the place of a unit; at least a byte.

        The last unit of a stream may be cut short.
        """


class _Rewritten(NamedTuple):
    """A unit from `start` to before `end` in the sender's stream, and its new `text`."""

    start: int
    end: int
    text: bytes


class Stream:
    """Rewrites one direction of a TCP connection, segment by segment.

    Positions in the stream are sequence numbers that do not wrap.
    """

    def __init__(self, units: Units) -> None:
        self.shift = IpMasqSeq()
        self._units: Units | None = units
        self._next: int | None = None  # the first byte not read yet
        self._held = b""  # the bytes before `_next`, as far as they are held back
        self._rewritten: deque[_Rewritten] = deque()
        self._forgotten: int | None = None  # the receiver has all up to here
        self._byte_before = b"\n"  # the last byte before the held bytes

    def leave_alone(self) -> None:
        """Read and rewrite nothing from the next byte on; shifts and remembered units stay."""
        self._units = None

    def rewrite(self, segment: Segment) -> None:
        """Put into a segment the payload that the receiver is to have.

        Raises Refused: out_of_order. The sequence number stays in the sender's count; `shift` is
        for later.
        """
        if segment.flags & SYN:
            self._next = segment.seq + 1
            segment.payload = b""  # what a SYN carries is sent again
            return
        final = segment.flags & FIN != 0
        if not segment.payload and not final:
            return
        if self._next is None:
            self._next = segment.seq
        at = self._next + _signed(segment.seq - self._next)
        if self._units is None and not self._held and at >= self._next:
            self._next = at + len(segment.payload)
            return
        if at > self._next:
            raise Refused("out_of_order")
        self._read(segment.payload[self._next - at :], final)
        self._write(segment, at)

    def _read(self, new: bytes, final: bool) -> None:
        """Take in the bytes that come next; after the `final` bytes nothing is held back.

        A unit that there is no memory for is left unread, as if it had not come.
        """
        assert self._next is not None
        text, begins_held = self._held + new, bool(self._held)
        start = self._next - len(self._held)
        self._next += len(new)
        at = 0
        self._forget_received()
        while at < len(text):
            if len(self._rewritten) == CHANGES_REMEMBERED:
                text = text[: at or len(self._held)]
                self._next = start + len(text)
                break
            length = self._units.length(text, at) if self._units else len(text) - at
            if not length and not final:
                break
            unit = text[at : at + (length or len(text))]
            rewritten = self._units.rewrite(unit) if self._units else unit
            if begins_held or rewritten != unit:
                self._remember(_Rewritten(start + at, start + at + len(unit), rewritten))
            begins_held = False
            self._byte_before = rewritten[-1:]
            at += len(unit)
        self._held = text[at:]
        self.shift.hold((start + at) % 2**32, len(self._held))

    def _remember(self, unit: _Rewritten) -> None:
        self._rewritten.append(unit)
        self.shift.note(unit.start % 2**32, len(unit.text) - (unit.end - unit.start))

    def _forget_received(self) -> None:
        """Forget the units that the receiver has."""
        if self._next is None or self.shift.received is None:
            return
        received = self._next + _signed(self.shift.received - self._next)
        while self._rewritten and self._rewritten[0].end <= received:
            self._forgotten = self._rewritten.popleft().end

    def _write(self, segment: Segment, at: int) -> None:
        """Give a segment its new payload, and have the segment begin where the payload begins.

        `at` is where the segment begins as it came.
        """
        assert self._next is not None
        payload, end = segment.payload, at + len(segment.payload)
        if self._forgotten is not None and at < self._forgotten:
            payload, at = payload[self._forgotten - at :], self._forgotten

        def unchanged(begin: int, end: int) -> bytes:
            return payload[max(begin - at, 0) : max(end - at, 0)]

        held_from = self._next - len(self._held)
        # A FIN without bytes goes with a unit that ends there: the sender may think it received.
        touches = at if segment.payload else at - 1
        first = position = at
        pieces = []
        for unit in self._rewritten:
            if touches < unit.end and unit.start < end:
                first = min(first, unit.start)
                pieces += [unchanged(position, unit.start), unit.text]
                position = unit.end
        pieces.append(unchanged(position, min(end, held_from)))
        text = b"".join(pieces)
        if segment.payload and not text:
            first, text = held_from - 1, self._byte_before  # to make the receiver acknowledge
        most = max(len(segment.payload), MAY_GROW_TO)
        if len(text) > most or end > self._next or self._held:
            segment.flags &= ~FIN
        segment.payload = text[:most]
        segment.seq = first % 2**32


def _signed(distance: int) -> int:
    """Return a distance on the circle of sequence numbers, ahead or back, whichever is shorter."""
    return (distance + 2**31) % 2**32 - 2**31
