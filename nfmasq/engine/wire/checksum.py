"""The Internet checksum (RFC 1071), whole and incremental (RFC 1624).

The one's-complement sum of 16-bit words is the number they make, taken modulo 65,535: a
word's weight 65536^k leaves 1. So a whole buffer is summed by one `int.from_bytes` and one
division, and a change to it adds the difference of the sums. A sum of 0 and one of 65,535
are the same to a receiver; the sum of a real header is never 0, hence a checksum (its
complement) is never 65,535, and taking the result modulo 65,535 gives just the value that a
sender would have written.

A host may leave the checksum of a TCP or UDP packet to its network card. Then the sum of the
pseudo header alone (addresses, protocol, length), not complemented, stands in the field:
`with_checksum` does what the card would, `without_checksum` leaves it to be done. A card is left
others, too: the CRC of SCTP, the checksum of a packet within a tunnel's. Those are not known here.
"""

from __future__ import annotations

from nfmasq.engine.wire.protocols import TCP, UDP

_CHECKSUM_AT = {TCP: 16, UDP: 6}
_number = int.from_bytes  # bound once: to look it up takes half as long as a small packet's sum
_LONG, _PIECE = 2048, 1024  # bytes, even


def ones_sum(data: bytes | bytearray | memoryview) -> int:
    """The sum of the 16-bit words of `data`, 0 to 65534; an odd last byte is padded with zero."""
    length = len(data)
    if length > _LONG:
        return _long_ones_sum(data)
    value = _number(data, "big")
    return (value << 8 if length & 1 else value) % 65535


def _long_ones_sum(data: bytes | bytearray | memoryview) -> int:
    """The same, faster: pieces are added up, and what they make is divided once."""
    rest = len(data) // _PIECE * _PIECE
    pieces = (data[at : at + _PIECE] for at in range(0, rest, _PIECE))
    total = sum(int.from_bytes(piece, "big") for piece in pieces)
    return (total + ones_sum(data[rest:])) % 65535


def checksum(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """The checksum for `data` whose checksum field is zero; `start` is added to the sum."""
    return 65535 - ((ones_sum(data) + start) % 65535 or 65535)


def difference(old: int, new: int) -> int:
    """What replacing the words of `old` by those of `new` adds to a checksum, 0 to 65534.

    Both are whole numbers made of 16-bit words: a port, an address, an address and a port.
    """
    return (old - new) % 65535


def adjust(check: int, change: int) -> int:
    """The checksum after a `change` (see `difference`): RFC 1624, equation 4."""
    return (check + change) % 65535


def adjust_udp(check: int, change: int) -> int:
    """The same for UDP, where 0 says that there is no checksum (RFC 768)."""
    if check == 0:
        return 0
    return (check + change) % 65535 or 65535


class UnknownChecksum(Exception):
    """What was left to the network card, of a packet neither TCP nor UDP, is not known here."""


def with_checksum(packet: bytes) -> bytes:
    """A TCP or UDP packet with the checksum that was left to the network card.

    One too short to have the field is left as it is. Raises UnknownChecksum for one of another
    protocol: only the kernel knows which checksum is missing, and where.
    """
    if len(packet) < 20:
        return packet
    if packet[9] not in _CHECKSUM_AT:
        raise UnknownChecksum
    transport = (packet[0] & 0x0F) << 2
    at = transport + _CHECKSUM_AT[packet[9]]
    if at + 2 > len(packet):
        return packet
    # The sum of the pseudo header is in the field, and so in the sum of all.
    check = 65535 - (ones_sum(packet[transport:]) or 65535)
    if check == 0 and packet[9] == UDP:
        check = 65535
    return packet[:at] + check.to_bytes(2, "big") + packet[at + 2 :]


def without_checksum(packet: bytes) -> bytes:
    """A TCP or UDP packet with the checksum left to the network card, whatever it was."""
    transport = (packet[0] & 0x0F) << 2
    at = transport + _CHECKSUM_AT[packet[9]]
    pseudo_header = ones_sum(packet[12:20]) + packet[9] + len(packet) - transport
    return packet[:at] + (pseudo_header % 65535 or 65535).to_bytes(2, "big") + packet[at + 2 :]
