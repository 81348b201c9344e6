"""The Internet checksum (RFC 1071), whole and incremental (RFC 1624).

The one's-complement sum of 16-bit words is the number they make, taken modulo 65,535: a
word's weight 65536^k leaves 1. So a whole buffer is summed by one `int.from_bytes` and one
division, and a change to it adds the difference of the sums. A sum of 0 and one of 65,535
are the same to a receiver; the sum of a real header is never 0, hence a checksum (its
complement) is never 65,535, and taking the result modulo 65,535 gives just the value that a
sender would have written.
"""

from __future__ import annotations


def ones_sum(data: bytes | bytearray | memoryview) -> int:
    """The sum of the 16-bit words of `data`, 0 to 65534; an odd last byte is padded with zero."""
    value = int.from_bytes(data, "big")
    return (value << 8 if len(data) & 1 else value) % 65535


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
