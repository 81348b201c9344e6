"""TCP sequence numbers, shifted where a helper made a payload longer or shorter.

An `IpMasqSeq` describes one direction of a connection. A change is a part of the stream in whose
place the receiver gets another text. Between two changes all numbers are shifted by an equal
distance:

    the sender's count      | unchanged | changed   | unchanged |
                                        ^ start     ^ end
    the receiver's count    | unchanged | other text   | unchanged |
                                        ^ to           ^ until

A change has no inside: the sender is told of all its bytes or of none, and sends it again as a
whole. The changes that the receiver has are forgotten, except the last.

Bytes at the end of the stream may be held back for a time, because they are part of a unit that is
not whole yet (`helper/stream.py`). To the receiver the stream ends before the held bytes. To the
sender they are acknowledged as soon as the receiver has all bytes before them. Later they are owed
to the receiver: the sender will not send them again.

The sequence numbers of the direction are shifted as they pass. What the other side acknowledges
(ACK number and SACK edges, RFC 2018) is shifted back. The urgent pointer goes on to point behind
the urgent byte (RFC 6093). All numbers wrap at 2**32. In here, positions do not wrap; a number
means the position that is nearest to the end of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import Struct
from typing import NamedTuple

from nfmasq.engine.wire.checksum import difference, ones_sum
from nfmasq.engine.wire.header import Header
from nfmasq.engine.wire.protocols import ACK, URG
from nfmasq.engine.wire.rewrite import adjust_transport

_u16 = Struct("!H")
_u32 = Struct("!I")
_block = Struct("!II")

_END, _NO_OPERATION, _SACK = 0, 1, 5
_SEQ_AT, _ACK_AT, _FLAGS_AT, _URGENT_AT, _OPTIONS_AT = 4, 8, 13, 18, 20

CIRCLE = 2**32

CHANGES_REMEMBERED = 64

_MOST_URGENT = 0xFFFF

_NOWHERE = -CIRCLE
"""A position before all others."""


def after(a: int, b: int) -> bool:
    """Say whether sequence number `a` comes after `b`: less than half the circle ahead."""
    return 0 < (a - b) % CIRCLE < CIRCLE // 2


def nearest(number: int, position: int) -> int:
    """Return the position with a sequence number that is nearest to another position."""
    return position + (number - position + CIRCLE // 2) % CIRCLE - CIRCLE // 2


class Change(NamedTuple):
    """A part of a stream, from `start` to before `end`, in whose place `text` goes, from `to` on.

    `start` and `end` are in the sender's count, `to` and `until` in the receiver's count.
    """

    start: int
    end: int
    to: int
    text: bytes

    @property
    def until(self) -> int:
        """Where the receiver's count goes on after the text."""
        return self.to + len(self.text)


class IpMasqSeq:
    """Shifts sequence numbers of one direction (`struct ip_masq_seq` in the design document).

    `init_seq`, `delta` and `previous_delta` are the document's fields. They describe the last
    change.
    """

    __slots__ = (
        "acknowledged",  # the sender was told of all before this position, in the sender's count
        "changes",  # in order: those that the receiver may lack, and one before
        "end",  # where the stream ends for the receiver, in the sender's count
        "forgotten",  # of changes before this position, in the sender's count, nothing is known
        "held",  # how many bytes are held back, from `end` on
        "received",  # the receiver has all before this position, in the receiver's count
    )

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.end = 0
        self.held = 0
        self.received = self.acknowledged = self.forgotten = _NOWHERE

    @property
    def init_seq(self) -> int:
        """The sequence number at which the last change begins, in the sender's count."""
        return self.changes[-1].start % CIRCLE if self.changes else 0

    @property
    def delta(self) -> int:
        """By how much numbers are shifted after the last change."""
        return self.changes[-1].until - self.changes[-1].end if self.changes else 0

    @property
    def previous_delta(self) -> int:
        """By how much numbers are shifted before the last change."""
        return self.changes[-1].to - self.changes[-1].start if self.changes else 0

    def begin(self, start: int) -> None:
        """Begin with the stream's first byte at a position; nothing of it is acknowledged."""
        self.changes.clear()
        self.end, self.held = start, 0
        self.received = self.acknowledged = start - 1

    def change(self, start: int, end: int, text: bytes) -> None:
        """Note that `text` goes in the place of a part; nothing after it was changed so far."""
        self.changes.append(Change(start, end, self._to(start), text))

    def reach(self, end: int, held: int = 0) -> None:
        """Note where the stream ends for now, and how many bytes after this are held back."""
        self.end, self.held = end, held

    def owed(self) -> Change | None:
        """Return the first change that the receiver lacks though the sender was told of its start.

        From there to what the sender was told of last, there are changes only.
        """
        for change in self.changes:
            if change.until > self.received:
                return change if change.start < self.acknowledged else None
        return None

    # -- numbers ------------------------------------------------------------------------

    def shift(self, seq: int) -> int:
        """Return a sequence number of this direction as the receiver is to see it."""
        at = nearest(seq, self.end)
        return self._to(min(at, self.end) if self.held else at) % CIRCLE

    def shift_urgent(self, seq: int, pointer: int) -> int:
        """Return the urgent pointer of a segment that begins at `seq` as the receiver is to see it.

        0: the urgent byte was not read yet. Where it is held back, the pointer is ahead of the
        segment.
        """
        at = nearest(seq, self.end)
        if at + pointer > self.end + self.held:
            return 0
        return self._to(at + pointer) - self._to(min(at, self.end))

    def unshift(self, seq: int) -> int:
        """Return a number that the receiver was sent as the sender knows it.

        This is the inverse of `shift`, except within a change, where it returns the start.
        """
        return self._back(self._received(seq)) % CIRCLE

    def unshift_ack(self, acknowledged: int) -> int:
        """Return an ACK number as the sender is to see it.

        What is newly acknowledged is remembered, as long as it was sent; the sender is not told of
        less than before.
        """
        at, most = self._received(acknowledged), self._to(self.end)
        if not self.received <= at <= most:
            return self._back(at) % CIRCLE
        self.received = at
        told = self.end + self.held if at == most else self._back(at)
        self.acknowledged = max(self.acknowledged, told)
        while len(self.changes) > 1 and self.changes[0].until <= at:
            self.forgotten = self.changes.pop(0).end
        return self.acknowledged % CIRCLE

    def unshift_block(self, left: int, right: int) -> tuple[int, int] | None:
        """Return the edges of a SACK block as the sender is to see them; None: nothing is left.

        The block has no part of a change, and not the byte that is acknowledged next: where the
        receiver lacks what is owed, the sender's next byte brings it.
        """
        begin = self._back(self._received(left), within_to_end=True)
        end = self._back(self._received(right))
        if begin <= self.acknowledged < end:
            begin = self.acknowledged + 1
        return (begin % CIRCLE, end % CIRCLE) if begin < end else None

    def _received(self, number: int) -> int:
        return nearest(number, self._to(self.end))

    def _to(self, at: int) -> int:
        """Return where a position of the sender's count is in the receiver's count."""
        for change in reversed(self.changes):
            if at > change.start:
                return max(change.to, change.until + at - change.end)
        return at + self._first_shift()

    def _back(self, at: int, within_to_end: bool = False) -> int:
        """Return where a position of the receiver's count is in the sender's count.

        A position within a change is at the start of the change, or at its end.
        """
        for change in reversed(self.changes):
            if at >= change.until:
                return change.end + at - change.until
            if at > change.to:
                return change.end if within_to_end else change.start
        return at - self._first_shift()

    def _first_shift(self) -> int:
        return self.changes[0].to - self.changes[0].start if self.changes else 0


def fix_sequence(
    packet: bytearray, header: Header, sent: IpMasqSeq | None, acknowledged: IpMasqSeq | None
) -> None:
    """Shift a TCP packet's sequence number, and shift back what it acknowledges.

    `sent` is the shift of the packet's own direction, `acknowledged` the shift of the other
    direction; None where a direction has no shift. The checksum follows.
    """
    end = header.transport + (packet[header.transport + 12] >> 4 << 2)
    before = ones_sum(packet[header.transport : end])
    if sent is not None:
        move_urgent(packet, header.transport, sent.shift_urgent)
        _replace(packet, header.transport + _SEQ_AT, sent.shift)
    if acknowledged is not None:
        if header.kind & ACK:
            _replace(packet, header.transport + _ACK_AT, acknowledged.unshift_ack)
        _fix_blocks(packet, header.transport + _OPTIONS_AT, end, acknowledged)
    change = difference(before, ones_sum(packet[header.transport : end]))
    adjust_transport(packet, header, change)


def move_urgent(packet: bytearray, at: int, change: Callable[[int, int], int]) -> None:
    """Change the urgent pointer of a TCP segment that begins at `at`, if it has one.

    `change` gets the sequence number and the urgent pointer, and returns the new pointer. Where it
    is not from 1 to 65,535, the segment has none any more. The checksum stays as it was.
    """
    if not packet[at + _FLAGS_AT] & URG:
        return
    (seq,) = _u32.unpack_from(packet, at + _SEQ_AT)
    (pointer,) = _u16.unpack_from(packet, at + _URGENT_AT)
    pointer = change(seq, pointer)
    if not 0 < pointer <= _MOST_URGENT:
        pointer = 0
        packet[at + _FLAGS_AT] &= ~URG
    _u16.pack_into(packet, at + _URGENT_AT, pointer)


def unfix_quoted(
    packet: bytearray, header: Header, sent: IpMasqSeq | None, acknowledged: IpMasqSeq | None
) -> None:
    """Undo `fix_sequence` in a quoted TCP packet, as far as it is quoted; SACK edges stay."""
    before = ones_sum(packet[header.transport :])
    if sent is not None:
        _replace(packet, header.transport + _SEQ_AT, sent.unshift)
    flags_at = header.transport + _FLAGS_AT
    if acknowledged is not None and len(packet) > flags_at and packet[flags_at] & ACK:
        _replace(packet, header.transport + _ACK_AT, acknowledged.shift)
    adjust_transport(packet, header, difference(before, ones_sum(packet[header.transport :])))


def _replace(packet: bytearray, at: int, change: Callable[[int], int]) -> None:
    (number,) = _u32.unpack_from(packet, at)
    _u32.pack_into(packet, at, change(number))


def _fix_blocks(packet: bytearray, at: int, end: int, acknowledged: IpMasqSeq) -> None:
    """Shift SACK blocks back; the place of a block of which nothing is left is filled up."""
    for option, length in _sack_options(packet, at, end):
        first, after = option + 2, option + length
        blocks = [acknowledged.unshift_block(*b) for b in _block.iter_unpack(packet[first:after])]
        left = b"".join(_block.pack(*block) for block in blocks if block is not None)
        fixed = bytes((_SACK, 2 + len(left))) + left if left else b""
        packet[option:after] = fixed.ljust(length, bytes((_NO_OPERATION,)))


def _sack_options(packet: bytearray, at: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where options with SACK blocks stand, and their lengths.

    Broken options end the search.
    """
    while at < end and packet[at] != _END:
        if packet[at] == _NO_OPERATION:
            at += 1
            continue
        length = packet[at + 1] if at + 1 < end else 0
        if length < 2 or at + length > end:
            return
        if packet[at] == _SACK and length % _block.size == 2:
            yield at, length
        at += length
