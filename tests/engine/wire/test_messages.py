"""The packets that the masquerade itself makes, byte for byte."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine.wire.messages import segment, unreachable
from tests.packets import dotted, internet_checksum, pseudo_header

addresses = st.integers(0, 2**32 - 1)
ports = st.integers(0, 65535)

INTERNETWORK_CONTROL = 0xC0
"""The precedence of an error (RFC 1812, section 4.3.2.5)."""
MOST_OF_AN_ERROR = 576
"""The most bytes of an error (RFC 1812, section 4.3.2.3)."""


def summed(header: bytes, at: int, checksum: int) -> bytes:
    return header[:at] + struct.pack("!H", checksum) + header[at + 2 :]


def whole(protocol: int, saddr: int, daddr: int, body: bytes, tos: int = 0) -> bytes:
    """Return a packet with a header of 20 bytes: identification 0, no flags, 64 hops."""
    length = 20 + len(body)
    header = struct.pack("!BBHHHBBHII", 0x45, tos, length, 0, 0, 64, protocol, 0, saddr, daddr)
    return summed(header, 10, internet_checksum(header)) + body


@given(st.binary(min_size=20, max_size=1600), st.integers(0, 255), addresses)
def test_an_error_quotes_as_much_as_it_may_and_keeps_the_type_of_service(
    packet: bytes, code: int, saddr: int
) -> None:
    message = struct.pack("!BBHI", 3, code, 0, 0) + packet[: MOST_OF_AN_ERROR - 28]
    message = summed(message, 2, internet_checksum(message))
    tos = INTERNETWORK_CONTROL | (packet[1] & 0x1E)
    sender = int.from_bytes(packet[12:16], "big")
    assert unreachable(packet, code, saddr) == whole(1, saddr, sender, message, tos)


@given(addresses, addresses, ports, ports, addresses, st.integers(0, 255))
def test_a_segment_has_the_number_and_the_flags_and_nothing_else(
    saddr: int, daddr: int, sport: int, dport: int, seq: int, flags: int
) -> None:
    tcp = struct.pack("!HHIIBBHHH", sport, dport, seq, 0, 0x50, flags, 0, 0, 0)
    covered = pseudo_header(dotted(saddr), dotted(daddr), 6, 20) + tcp
    tcp = summed(tcp, 16, internet_checksum(covered))
    assert segment(saddr, daddr, sport, dport, seq, flags) == whole(6, saddr, daddr, tcp)
