"""TCP sequence numbers, shifted where a helper made a payload longer or shorter.

An `IpMasqSeq` describes one direction of a connection. The last change of a payload begins at
`init_seq`. What is sent before the change, and the change itself, is shifted by `previous_delta`;
what is sent after it is shifted by `delta`:

    sent         | earlier bytes  | changed bytes    | later bytes |
    shifted by     previous_delta   previous_delta     delta
                                  ^ init_seq

A few earlier changes are remembered, too, for segments that are sent again.

Bytes at the end of the stream may be held back for a time, because they are part of a unit that is
not whole yet (`helper/stream.py`). To the receiver the stream ends before the held bytes. To the
sender they are acknowledged as soon as the receiver has all bytes before them.

The sequence numbers of the direction are shifted as they pass. What the other side acknowledges
(ACK number and SACK edges, RFC 2018) is shifted back. All numbers wrap at 2**32. "After" means what
it means in TCP: less than half the circle ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from struct import Struct

from nfmasq.engine.wire.checksum import difference, ones_sum
from nfmasq.engine.wire.header import Header
from nfmasq.engine.wire.protocols import ACK
from nfmasq.engine.wire.rewrite import adjust_transport

_u32 = Struct("!I")

_END, _NO_OPERATION, _SACK = 0, 1, 5
_ACK_AT, _FLAGS_AT, _OPTIONS_AT = 8, 13, 20

CHANGES_REMEMBERED = 64

_LONG_PAST = 2**30
"""Bytes after which no segment from before the change can be under way any more. `init_seq` then
moves on with the stream. Otherwise the numbers would come round to it, and "after" would turn into
"before"."""


def after(a: int, b: int) -> bool:
    """Say whether sequence number `a` comes after `b`."""
    return 0 < (a - b) % 2**32 < 2**31


class IpMasqSeq:
    """Shifts sequence numbers of one direction (`struct ip_masq_seq` in the design document)."""

    __slots__ = (
        "_earlier",
        "_held",
        "_held_at",
        "delta",
        "init_seq",
        "previous_delta",
        "received",  # the receiver has all before this number; None: not known yet
    )

    def __init__(self) -> None:
        self.init_seq = 0
        self.delta = 0
        self.previous_delta = 0
        self.received: int | None = None
        self._earlier: deque[tuple[int, int]] = deque(maxlen=CHANGES_REMEMBERED)
        self._held_at = 0
        self._held = 0

    def note(self, seq: int, change: int) -> None:
        """Note that the payload that begins at `seq` became longer by `change` bytes.

        A negative `change` says that it became shorter. A retransmission of the last changed
        payload, or of an older segment, adds nothing.
        """
        if change and (self.delta == self.previous_delta or after(seq, self.init_seq)):
            self._earlier.append((self.init_seq, self.previous_delta))
            self.previous_delta = self.delta
            self.delta += change
            self.init_seq = seq

    def hold(self, seq: int, length: int) -> None:
        """Note that the last `length` bytes, from `seq` on, are held back; 0: none are."""
        self._held_at, self._held = seq, length

    def shift(self, seq: int) -> int:
        """Return a sequence number of this direction as the receiver is to see it."""
        if self._held and after(seq, self._held_at):
            seq = self._held_at
        if not after(seq, self.init_seq):
            return (seq + self._earlier_delta(lambda init_seq, _: after(seq, init_seq))) % 2**32
        if (seq - self.init_seq) % 2**32 > _LONG_PAST:
            self._earlier.clear()
            self.previous_delta = self.delta
            self.init_seq = seq
        return (seq + self.delta) % 2**32

    def unshift(self, acknowledged: int) -> int:
        """Return a number that the receiver acknowledges as the sender knows it.

        This is the inverse of `shift`, except within a change, where there is no inverse.
        """
        return self._with_held(self._unshift(acknowledged))

    def unshift_newest(self, acknowledged: int) -> int:
        """Return what `unshift` does, for an ACK number; the newest is remembered as `received`.

        The receiver has all bytes before an ACK number.
        """
        seq = self._unshift(acknowledged)
        if self.received is None or after(seq, self.received):
            self.received = seq
        return self._with_held(seq)

    def _unshift(self, acknowledged: int) -> int:
        def is_beyond(init_seq: int, delta: int) -> bool:
            return after(acknowledged, (init_seq + delta) % 2**32)

        delta = self.delta
        if not is_beyond(self.init_seq, self.previous_delta):
            delta = self._earlier_delta(is_beyond)
        return (acknowledged - delta) % 2**32

    def _with_held(self, seq: int) -> int:
        return (seq + self._held) % 2**32 if self._held and seq == self._held_at else seq

    def _earlier_delta(self, is_beyond: Callable[[int, int], bool]) -> int:
        """Return the shift of a number that does not come after the last change.

        `is_beyond` gets the `init_seq` and `previous_delta` of an earlier change, and says whether
        the number comes after it.
        """
        delta = self.previous_delta
        for init_seq, previous_delta in reversed(self._earlier):
            if is_beyond(init_seq, previous_delta):
                break
            delta = previous_delta
        return delta


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
        _replace(packet, header.transport + 4, sent.shift)
    if acknowledged is not None:
        if header.kind & ACK:
            _replace(packet, header.transport + _ACK_AT, acknowledged.unshift_newest)
        for edge_at in _sack_edges(packet, header.transport + _OPTIONS_AT, end):
            _replace(packet, edge_at, acknowledged.unshift)
    change = difference(before, ones_sum(packet[header.transport : end]))
    adjust_transport(packet, header, change)


def unfix_quoted(
    packet: bytearray, header: Header, sent: IpMasqSeq | None, acknowledged: IpMasqSeq | None
) -> None:
    """Undo `fix_sequence` in a quoted TCP packet, as far as it is quoted; SACK edges stay."""
    before = ones_sum(packet[header.transport :])
    if sent is not None:
        _replace(packet, header.transport + 4, sent.unshift)
    flags_at = header.transport + _FLAGS_AT
    if acknowledged is not None and len(packet) > flags_at and packet[flags_at] & ACK:
        _replace(packet, header.transport + _ACK_AT, acknowledged.shift)
    adjust_transport(packet, header, difference(before, ones_sum(packet[header.transport :])))


def _replace(packet: bytearray, at: int, change: Callable[[int], int]) -> None:
    (number,) = _u32.unpack_from(packet, at)
    _u32.pack_into(packet, at, change(number))


def _sack_edges(packet: bytearray, at: int, end: int) -> Iterator[int]:
    """Yield where the edges of the SACK blocks stand; broken options end the search."""
    while at < end and packet[at] != _END:
        if packet[at] == _NO_OPERATION:
            at += 1
            continue
        length = packet[at + 1] if at + 1 < end else 0
        if length < 2 or at + length > end:
            return
        if packet[at] == _SACK:
            yield from range(at + 2, at + length - 3, 4)
        at += length
