"""The payload of a packet: taken out for a helper to see, and put back where it was changed.

A packet that came in damaged must not be read as if it were right: the receiver will throw it away.
A packet whose checksum was left to the network card (`checksum.py`) has no checksum to go by.
"""

from __future__ import annotations

from struct import Struct

from nfmasq.engine.helper.app import Packet
from nfmasq.engine.wire.checksum import difference, ones_sum
from nfmasq.engine.wire.header import Header, Refused
from nfmasq.engine.wire.protocols import FIN, TCP
from nfmasq.engine.wire.rewrite import CHECKSUM_OFFSET, IP_CHECKSUM, adjust_at, adjust_transport
from nfmasq.engine.wire.sequence import move_urgent, nearest

_TOTAL_LENGTH, _LONGEST = 2, 65535
_SEQ, _WORDS, _FLAGS = 4, 12, 13
_UDP_LENGTH, _UDP_HEADER = 4, 8

_u16 = Struct("!H")
_u32 = Struct("!I")


def read_payload(packet: bytes | bytearray, header: Header) -> Packet:
    """Return a TCP or UDP packet as a helper sees it."""
    at = header.transport
    if header.protocol == TCP:
        (seq,) = _u32.unpack_from(packet, at + _SEQ)
        return Packet(bytes(packet[_payload_at(packet, header) :]), seq, header.kind)
    (length,) = _u16.unpack_from(packet, at + _UDP_LENGTH)
    return Packet(bytes(packet[at + _UDP_HEADER : at + length]))


def without_payload(packet: bytearray, header: Header) -> bytearray:
    """Return a TCP packet without its payload."""
    seen = read_payload(packet, header)
    if not seen.payload:
        return packet
    seen.payload = b""
    return write_payload(packet, header, seen)


def as_probe(packet: bytearray, header: Header) -> bytearray:
    """Return a TCP packet with the byte before its payload instead, and without a FIN.

    The receiver has that byte and answers with an ACK (RFC 9293 section 3.8.4); the sender sends
    the payload again.
    """
    seen = read_payload(packet, header)
    seen.payload, seen.seq, seen.flags = b"\n", (seen.seq - 1) % 2**32, seen.flags & ~FIN
    return write_payload(packet, header, seen)


def write_payload(packet: bytearray, header: Header, seen: Packet) -> bytearray:
    """Return a packet with what a helper made of it.

    Raises Refused: malformed, where the packet has become longer than 65,535 bytes.
    """
    written = packet[: _payload_at(packet, header)] + seen.payload
    if len(written) > _LONGEST:
        raise Refused("malformed")
    at = header.transport
    _u16.pack_into(written, _TOTAL_LENGTH, len(written))
    adjust_at(written, IP_CHECKSUM, difference(len(packet), len(written)))
    if header.protocol == TCP:
        written[at + _FLAGS] = seen.flags
        move_urgent(written, at, lambda seq, pointer: pointer + nearest(seq, seen.seq) - seen.seq)
        _u32.pack_into(written, at + _SEQ, seen.seq)
    else:
        _u16.pack_into(written, at + _UDP_LENGTH, len(written) - at)
    change = difference(_covered(packet, at), _covered(written, at))
    adjust_transport(written, header, change)
    return written


def is_damaged(packet: bytes, header: Header) -> bool:
    """Say whether a TCP or UDP packet has a checksum that is wrong."""
    (checksum,) = _u16.unpack_from(packet, header.transport + CHECKSUM_OFFSET[header.protocol])
    length = len(packet) - header.transport
    if header.protocol != TCP:
        (length,) = _u16.unpack_from(packet, header.transport + _UDP_LENGTH)
        if checksum == 0:
            return False
    pseudo_header = ones_sum(packet[12:20]) + header.protocol + length
    segment = packet[header.transport : header.transport + length]
    is_right = (ones_sum(segment) + pseudo_header) % 65535 == 0
    is_left_to_the_card = (checksum - pseudo_header) % 65535 == 0
    return not is_right and not is_left_to_the_card


def _payload_at(packet: bytes | bytearray, header: Header) -> int:
    if header.protocol == TCP:
        return header.transport + (packet[header.transport + _WORDS] >> 4 << 2)
    return header.transport + _UDP_HEADER


def _covered(packet: bytearray, at: int) -> int:
    """Return what the transport checksum covers, as a sum, without the addresses."""
    return ones_sum(packet[at:]) + len(packet) - at
