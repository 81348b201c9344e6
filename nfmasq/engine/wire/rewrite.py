"""Writing an address and a port into a packet, with the checksums that cover them.

The checksums are not computed anew but moved by the difference (`checksum.py`). So the payload is
not read, and a packet that came in damaged goes out just as damaged: the receiver still notices.

Addresses and ports are ints in host order. For ICMP the identifier stands in the place of the port.
"""

from __future__ import annotations

from struct import Struct

from nfmasq.engine.wire.by_address import DCCP, UDPLITE
from nfmasq.engine.wire.checksum import adjust, adjust_udp, difference
from nfmasq.engine.wire.gre import CALL_ID
from nfmasq.engine.wire.header import Header
from nfmasq.engine.wire.protocols import ICMP, PROTOCOLS, TCP, UDP

_u16 = Struct("!H")
_u32 = Struct("!I")

IP_CHECKSUM = 10
SADDR, DADDR = 12, 16
"""Where the source and the destination address stand in an IPv4 header, in bytes."""

CHECKSUM_OFFSET = {TCP: 16, UDP: 6, ICMP: 2, UDPLITE: 6, DCCP: 6}
"""Where the checksum stands in a transport header, in bytes, by protocol number. The checksums of
other protocols cover nothing that is rewritten."""

ICMP_IDENTIFIER = 4


def rewrite_source(packet: bytes, header: Header, address: int, port: int) -> bytearray:
    """Return a copy of the packet with `address` and `port` as its source."""
    rewritten = bytearray(packet)
    write_source(rewritten, header, address, port)
    return rewritten


def rewrite_destination(packet: bytes, header: Header, address: int, port: int) -> bytearray:
    """Return a copy of the packet with `address` and `port` as its destination."""
    rewritten = bytearray(packet)
    write_destination(rewritten, header, address, port)
    return rewritten


def write_source(packet: bytearray, header: Header, address: int, port: int) -> None:
    """Write a source into a packet; a quoted packet may end after 8 bytes of transport."""
    at = ICMP_IDENTIFIER if header.protocol == ICMP else 0
    old = (header.saddr, header.sport)
    _write(packet, header, SADDR, header.transport + at, old, (address, port))


def write_destination(packet: bytearray, header: Header, address: int, port: int) -> None:
    """Write a destination into a packet; a quoted packet may end after 8 bytes of transport."""
    at = ICMP_IDENTIFIER if header.protocol == ICMP else 2
    old = (header.daddr, header.dport)
    _write(packet, header, DADDR, header.transport + at, old, (address, port))
    if header.is_of_call:
        _u16.pack_into(packet, header.transport + CALL_ID, port)


def _write(
    packet: bytearray,
    header: Header,
    address_at: int,
    port_at: int,
    old: tuple[int, int],
    new: tuple[int, int],
) -> None:
    address_change = difference(old[0], new[0])
    change = difference(old[1], new[1])
    if header.protocol != ICMP:  # the checksum of ICMP covers no addresses
        change += address_change
    _u32.pack_into(packet, address_at, new[0])
    adjust_at(packet, IP_CHECKSUM, address_change)
    if header.protocol in PROTOCOLS:
        _u16.pack_into(packet, port_at, new[1])
    adjust_transport(packet, header, change)


def adjust_transport(packet: bytearray, header: Header, change: int) -> None:
    """Move the transport checksum by a `change`, where the packet is long enough to have it."""
    at = header.transport + CHECKSUM_OFFSET.get(header.protocol, len(packet))
    if len(packet) < at + 2:
        return
    (checksum,) = _u16.unpack_from(packet, at)
    if header.protocol in (UDP, UDPLITE):
        checksum = adjust_udp(checksum, change)
    else:
        checksum = adjust(checksum, change)
        if checksum == 0 and not any(packet[header.transport : at]) and not any(packet[at + 2 :]):
            # Only an ICMP reply can be nothing but zeros. Its sum is 0, and not 65,535.
            checksum = 65535
    _u16.pack_into(packet, at, checksum)


def adjust_at(packet: bytearray, at: int, change: int) -> None:
    """Move the checksum at byte `at` by a `change` (see `checksum.difference`)."""
    (checksum,) = _u16.unpack_from(packet, at)
    _u16.pack_into(packet, at, adjust(checksum, change))
