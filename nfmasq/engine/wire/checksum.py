"""The Internet checksum (RFC 1071), whole and incremental (RFC 1624).

The words of a buffer make one big number. Modulo 65,535 this number is the one's-complement sum of
the words, because the weight of each word, 65536^k, leaves 1. So a whole buffer is summed by one
`int.from_bytes` and one division, and a change to it adds the difference of the sums. To a receiver
the sums 0 and 65,535 are the same. The sum of a real header is never 0; hence a checksum, which is
the sum's complement, is never 65,535, and the result modulo 65,535 is just the value that a sender
would have written.

A host may leave the checksum of a TCP or UDP packet to its network card. Then the sum of the
pseudo header alone (addresses, protocol, length), not complemented, stands in the field.
`with_checksum` does the work of the card, `without_checksum` leaves the work to be done. A host may
leave other checksums to the card, too: the CRC of SCTP, the checksum of a packet inside a tunnel's
packet. They are not known here.
"""

from __future__ import annotations

from nfmasq.engine.wire.protocols import TCP, UDP

_CHECKSUM_AT = {TCP: 16, UDP: 6}
_number = int.from_bytes  # bound once: to look it up takes half as long as a small packet's sum
_LONG, _PIECE = 2048, 1024  # bytes, even


def ones_sum(data: bytes | bytearray | memoryview) -> int:
    """Return the sum of the 16-bit words of `data`, 0 to 65534.

    An odd last byte is padded with zero.
    """
    length = len(data)
    if length > _LONG:
        return _long_ones_sum(data)
    value = _number(data, "big")
    return (value << 8 if length & 1 else value) % 65535


def _long_ones_sum(data: bytes | bytearray | memoryview) -> int:
    """Return what `ones_sum` does, faster for long data: add up pieces, and divide only once."""
    rest = len(data) // _PIECE * _PIECE
    pieces = (data[at : at + _PIECE] for at in range(0, rest, _PIECE))
    total = sum(int.from_bytes(piece, "big") for piece in pieces)
    return (total + ones_sum(data[rest:])) % 65535


def checksum(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """Return the checksum for `data` whose checksum field is zero, 0 to 65534.

    `start` is added to the sum.
    """
    return 65535 - ((ones_sum(data) + start) % 65535 or 65535)


def difference(old: int, new: int) -> int:
    """Return what is added to a checksum when `new` takes the place of `old`, 0 to 65534.

    Both are whole numbers made of 16-bit words: a port, an address, an address and a port.
    """
    return (old - new) % 65535


def adjust(old: int, change: int) -> int:
    """Return the `old` checksum after a `change` (see `difference`): RFC 1624, equation 4."""
    return (old + change) % 65535


def adjust_udp(old: int, change: int) -> int:
    """Return the `old` checksum of UDP after a `change` (see `difference`).

    In UDP 0 says that there is no checksum (RFC 768): it stays 0, and no other checksum becomes 0.
    """
    if old == 0:
        return 0
    return (old + change) % 65535 or 65535


class UnknownChecksum(Exception):
    """Raised for a packet, neither TCP nor UDP, whose checksum was left to the network card.

    Which checksum is missing is not known here.
    """


def with_checksum(packet: bytes) -> bytes:
    """Return a TCP or UDP packet with the checksum that was left to the network card.

    A packet too short to have the field is returned as it is. Raises UnknownChecksum for a packet
    of another protocol: only the kernel knows which checksum is missing, and where.
    """
    if len(packet) < 20:
        return packet
    if packet[9] not in _CHECKSUM_AT:
        raise UnknownChecksum
    transport = (packet[0] & 0x0F) << 2
    at = transport + _CHECKSUM_AT[packet[9]]
    if at + 2 > len(packet):
        return packet
    # The field has the sum of the pseudo header, which thus is part of the sum of all bytes.
    value = 65535 - (ones_sum(packet[transport:]) or 65535)
    if value == 0 and packet[9] == UDP:
        value = 65535
    return packet[:at] + value.to_bytes(2, "big") + packet[at + 2 :]


def without_checksum(packet: bytes) -> bytes:
    """Return a TCP or UDP packet whose checksum, whatever it was, is left to the network card."""
    transport = (packet[0] & 0x0F) << 2
    at = transport + _CHECKSUM_AT[packet[9]]
    pseudo_header = ones_sum(packet[12:20]) + packet[9] + len(packet) - transport
    return packet[:at] + (pseudo_header % 65535 or 65535).to_bytes(2, "big") + packet[at + 2 :]
