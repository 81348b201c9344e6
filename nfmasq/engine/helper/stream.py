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
  sender this acknowledgement is passed on as if it were for the held bytes too (`IpMasqSeq`),
  because a sender may wait for it before it sends the rest (Nagle's algorithm). A segment of which
  nothing is left repeats the byte before instead, which makes the receiver acknowledge.
* With its end the unit is whole and is rewritten. Its text is remembered, and from then on it is
  indivisible: a segment with any part of the unit carries all of it. So a segment that is sent
  again brings the same text. A text that is too long for one segment is remembered in parts, each
  in the place of some of the unit's bytes, and each indivisible.
* What the sender knows as acknowledged, and the receiver lacks, the receiver is owed: held bytes,
  whether they are rewritten or released as they are. It goes before the first byte that the sender
  does not know as acknowledged, whenever the sender sends this byte. And it goes with a packet
  without bytes from a sender that has nothing more to say.
* A segment that thereby becomes too long for a link loses its end, which the sender will send
  again; a short segment may grow. A segment with more units than can be remembered loses its end
  too, until some units are acknowledged. Acknowledged units are forgotten, and skipped where they
  are sent again.
* From where a connection is left alone, bytes pass in any order, as they are. What was rewritten
  before stays rewritten, and held bytes are owed.

Bytes that are not part of a rewritten unit pass as they are, and a unit holds back little
(`Units`). So a stream without anything to rewrite passes untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from nfmasq.engine.wire.header import Refused
from nfmasq.engine.wire.protocols import FIN, RST, SYN
from nfmasq.engine.wire.sequence import CHANGES_REMEMBERED, CIRCLE, IpMasqSeq, nearest

MAY_GROW_TO = 1200
"""Bytes of payload that go through any link, near enough: a payload does not grow beyond this
length."""

MOST_UNITS = 256
"""The most units that are read of a segment; the rest of the segment is lost."""


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

        It has at most MAY_GROW_TO bytes for each byte of the unit. The last unit of a stream may be
        cut short.
        """


class _Piece(NamedTuple):
    """What goes in the place of bytes from `start` on, in the sender's count."""

    start: int
    text: bytes


class Stream:
    """Rewrites one direction of a TCP connection, segment by segment.

    Positions in the stream are sequence numbers that do not wrap, in the sender's count. The stream
    is read up to `shift.end`, and what follows is held back.
    """

    def __init__(self, units: Units) -> None:
        self.shift = IpMasqSeq()
        self._units: Units | None = units
        self._start: int | None = None  # the first byte of the stream
        self._held = b""  # the bytes from `shift.end` on that are held back
        self._last_at = 0  # the last byte that was read, or some bytes, as the receiver has them:
        self._last_text = b""  # where in the sender's count, and which

    def leave_alone(self) -> None:
        """Read and rewrite nothing from the next byte on; what was rewritten stays so.

        Bytes that are held back are owed to the receiver as they are.
        """
        self._units = None

    def rewrite(self, segment: Segment) -> None:
        """Put into a segment the payload that the receiver is to have.

        Raises Refused: out_of_order. The sequence number stays in the sender's count; `shift` is
        for later.
        """
        if segment.flags & (SYN | RST):
            segment.payload = b""  # what a SYN carries is sent again
        if segment.flags & SYN:
            self._begin_again(segment.seq + 1)
        elif not segment.flags & RST:
            self._take(segment, segment.flags & FIN != 0)

    def _begin_again(self, start: int) -> None:
        """Begin with a SYN, unless the SYN came before.

        Where the receiver has acknowledged where the stream begins, no other SYN is right.
        """
        if self._start is not None:
            came_before = (start - self._start) % CIRCLE == 0
            if came_before or self.shift.received >= self._start:
                return
        self._begin(start)

    def _begin(self, start: int) -> None:
        self._start = start
        self._held = b""
        self._last_at, self._last_text = start - 1, b"\n"  # the number of the SYN, no byte's
        self.shift.begin(start)

    def _take(self, segment: Segment, final: bool) -> None:
        if self._start is None and (segment.payload or final):
            self._begin(segment.seq)
        if self._units is None:
            self._release()
        next_byte = self.shift.end + len(self._held)
        at = nearest(segment.seq, next_byte)
        if segment.payload or final:
            if self._units is None:
                self.shift.reach(max(self.shift.end, at + len(segment.payload)))
            elif at > next_byte:
                raise Refused("out_of_order")
            else:
                self._read(segment.payload[next_byte - at :], final)
        self._write(segment, at)

    # -- reading ------------------------------------------------------------------------

    def _read(self, new: bytes, final: bool) -> None:
        """Take in the bytes that come next; after the `final` bytes nothing is held back.

        What there is no memory for, and what is more than is read of a segment, is left unread, as
        if it had not come.
        """
        text, held, start = self._held + new, len(self._held), self.shift.end
        at, is_whole = 0, True
        for _ in range(MOST_UNITS):
            if at == len(text) or len(self.shift.changes) >= CHANGES_REMEMBERED:
                break
            length = self._units.length(text, at) if self._units else len(text) - at
            is_whole = bool(length) or final
            if not is_whole:
                break
            unit = text[at : at + (length or len(text))]
            rewritten = self._units.rewrite(unit) if self._units else unit
            self._note(start + at, unit, rewritten, held - at)
            at += len(unit)
            self._hold(start + at, text[at:held])
        if not is_whole:
            self._hold(start + at, text[at:])

    def _hold(self, end: int, held: bytes) -> None:
        """Have the stream read up to a position, and bytes after it held back."""
        self._held = held
        self.shift.reach(end, len(held))

    def _note(self, start: int, unit: bytes, rewritten: bytes, held: int) -> None:
        """Remember what becomes of a unit, of which the first `held` bytes were held back."""
        end = start + len(unit)
        position, text = end - 1, rewritten[-1:]
        if rewritten != unit:
            self._change(start, end, rewritten)
            last = self.shift.changes[-1]
            if last.start == position:
                text = last.text
        elif held > 0:
            self._change(start, min(start + held, end), unit[:held])
        self._last_at, self._last_text = position, text

    def _change(self, start: int, end: int, text: bytes) -> None:
        """Remember a text in the place of a part of the stream.

        Each change is short enough for a segment.
        """
        length, parts = end - start, min(end - start, -(-len(text) // MAY_GROW_TO))
        begin = at = 0
        for n in range(1, parts + 1):
            stop, until = length * n // parts, len(text) * n // parts
            self.shift.change(start + begin, start + stop, text[at:until])
            begin, at = stop, until

    def _release(self) -> None:
        """Hold back nothing any more."""
        if self._held:
            end = self.shift.end + len(self._held)
            self._note(self.shift.end, self._held, self._held, len(self._held))
            self._hold(end, b"")

    # -- writing ------------------------------------------------------------------------

    def _write(self, segment: Segment, at: int) -> None:
        """Give a segment its new payload, and have the segment begin where the payload begins.

        `at` is where the segment begins as it came.
        """
        shift, payload = self.shift, segment.payload
        end = at + len(payload)
        first, stop = max(at, shift.forgotten), min(end, shift.end)
        owed = shift.owed()
        if owed is not None and at <= shift.acknowledged and owed.start <= end:
            first = min(first, owed.start)
        pieces = list(self._pieces(payload, at, first, stop))
        text = b"".join(piece.text for piece in pieces)
        most = max(len(payload), MAY_GROW_TO)
        if len(text) > most or end > shift.end:
            segment.flags &= ~FIN
        if text:
            at = pieces[0].start
        elif payload:
            at, text = self._last_at, self._last_text  # to make the receiver acknowledge
        segment.payload = text[:most]
        segment.seq = at % CIRCLE

    def _pieces(self, payload: bytes, at: int, first: int, stop: int) -> Iterator[_Piece]:
        """Yield what goes in the place of a part of the stream; no change is divided.

        `at` is where the payload begins, which has the unchanged bytes.
        """
        for change in self.shift.changes:
            if change.end <= first or stop <= max(first, change.start):
                continue
            if first < change.start:
                yield _Piece(first, payload[first - at : change.start - at])
            yield _Piece(change.start, change.text)
            first = change.end
        if first < stop:
            yield _Piece(first, payload[first - at : stop - at])
