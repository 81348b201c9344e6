"""TCP sequence numbers, shifted where a helper made a payload longer or shorter.

An `IpMasqSeq` describes one direction. What comes up to and including the change that begins at
`init_seq`, the last one, is shifted by `previous_delta`, what comes after it by `delta`:

    sent         | earlier bytes  | the changed ones | later bytes |
    shifted by     previous_delta   previous_delta     delta
                                  ^ init_seq

The changes before that one are remembered too, a few, for segments that are sent again.

Bytes at the end of the stream may be held back for a time, because what they are part of is not
whole yet (`stream.py`). To the receiver the stream ends before them; to the sender they are
acknowledged as soon as the receiver has all that comes before.

Sequence numbers of that direction are shifted as they pass; what the other side acknowledges
(ACK number and SACK edges, RFC 2018) is shifted back. All numbers wrap at 2**32, and "after" is
meant as TCP means it: less than half the circle ahead.
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
moves on with the stream, lest the circle come round to it and "after" turn into "before"."""


def after(a: int, b: int) -> bool:
    """Whether sequence number `a` comes after `b`."""
    return 0 < (a - b) % 2**32 < 2**31


class IpMasqSeq:
    """`struct ip_masq_seq`: the shift of one direction."""

    __slots__ = (
        "_earlier",
        "_held",
        "_held_at",
        "delta",
        "init_seq",
        "previous_delta",
        "received",  # before this number the receiver has all; None while that is not known
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
        """The payload that begins at `seq` became longer by `change` bytes.

        A retransmission of the last one changed, or an older segment, adds nothing.
        """
        if change and (self.delta == self.previous_delta or after(seq, self.init_seq)):
            self._earlier.append((self.init_seq, self.previous_delta))
            self.previous_delta = self.delta
            self.delta += change
            self.init_seq = seq

    def hold(self, seq: int, length: int) -> None:
        """The last `length` bytes, from `seq` on, are held back; with a length of 0: none."""
        self._held_at, self._held = seq, length

    def shift(self, seq: int) -> int:
        """A sequence number of this direction as the receiver is to see it."""
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
        """A number that the receiver acknowledges as the sender knows it.

        The inverse of `shift` everywhere but within a change, where there is none.
        """
        return self._with_held(self._unshift(acknowledged))

    def unshift_newest(self, acknowledged: int) -> int:
        """The same for a number before which the receiver has all; the newest is remembered."""
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
        """The shift of what comes before the last change; `is_beyond` tells of an earlier one."""
        delta = self.previous_delta
        for init_seq, previous_delta in reversed(self._earlier):
            if is_beyond(init_seq, previous_delta):
                break
            delta = previous_delta
        return delta


def fix_sequence(
    packet: bytearray, header: Header, sent: IpMasqSeq | None, acknowledged: IpMasqSeq | None
) -> None:
    """Shift a TCP packet: its sequence number by `sent`, of its own direction, and what it
    acknowledges back by `acknowledged`, of the other; the checksum follows."""
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
    """Undo `fix_sequence` in a quoted TCP packet, as far as it is quoted, SACK excepted."""
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
    """Where the edges of the SACK blocks stand; broken options end the search."""
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
