"""What is read of a TCP segment beyond its ports: its numbers, its window, how long it is."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from nfmasq.engine.wire.protocols import ACK, SYN

_read = Struct("!IIBBH").unpack_from
_u32 = Struct("!I").unpack_from

_SEQ, _ACK, _OPTIONS = 4, 8, 20
_END, _NO_OPERATION, _WINDOW_SCALE = 0, 1, 3

LARGEST_SCALE = 14
"""The largest shift of a window that counts (RFC 7323 section 2.3)."""


class Segment(NamedTuple):
    """A segment: `ack` is None without ACK, `length` is the payload's in bytes.

    `window` is as in the header, not scaled. `scale` is the shift that a SYN announces (RFC 7323);
    None where it announces none.
    """

    seq: int
    ack: int | None
    flags: int
    length: int
    window: int = 0
    scale: int | None = None


def read_segment(packet: bytes, at: int, sent: bytes | bytearray | None = None) -> Segment:
    """Read the segment of a well-formed packet, whose TCP header begins at `at`.

    The ACK number is taken from the packet as it is `sent`, if that is given: a helper may shift
    it.
    """
    seq, ack, words, flags, window = _read(packet, at + _SEQ)
    if sent is not None:
        (ack,) = _u32(sent, at + _ACK)
    end = at + (words >> 4 << 2)
    scale = _window_scale(packet, at + _OPTIONS, end) if flags & SYN else None
    return Segment(seq, ack if flags & ACK else None, flags, len(packet) - end, window, scale)


def read_ack(packet: bytes | bytearray, at: int, flags: int) -> int | None:
    """Return the ACK number of a segment with these flags; None where it has none."""
    return int(_u32(packet, at + _ACK)[0]) if flags & ACK else None


def _window_scale(packet: bytes, at: int, end: int) -> int | None:
    """Return the shift that a SYN's options announce; None without, or where they are broken."""
    while at + 2 < end and packet[at] != _END:
        if packet[at] == _NO_OPERATION:
            at += 1
        elif packet[at] == _WINDOW_SCALE:
            return min(packet[at + 2], LARGEST_SCALE)
        elif packet[at + 1] < 2:
            return None
        else:
            at += packet[at + 1]
    return None
