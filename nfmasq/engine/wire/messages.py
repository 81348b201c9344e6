"""Packets that the masquerade itself makes: ICMP errors about what it refuses, and TCP segments."""

from __future__ import annotations

from struct import Struct

from nfmasq.engine.wire.address import is_host
from nfmasq.engine.wire.checksum import checksum, ones_sum
from nfmasq.engine.wire.header import ICMP_ERRORS, UNREACHABLE, Header
from nfmasq.engine.wire.protocols import ICMP, TCP
from nfmasq.engine.wire.rewrite import CHECKSUM_OFFSET, IP_CHECKSUM, SADDR

PORT_UNREACHABLE = 3
PROHIBITED = 13
"""Codes of an ICMP destination unreachable; PROHIBITED is "administratively prohibited"."""

_HOPS = 64
_PRECEDENCE, _TOS = 0xC0, 0x1E  # internetwork control; bits that are kept of the packet's TOS

_ip = Struct("!BBHHHBBHII")
_icmp_error = Struct("!BBHI")
_tcp = Struct("!HHIIBBHHH")
_pseudo_header = Struct("!IIHH")
_u16 = Struct("!H")

_MOST_QUOTED = 576 - _ip.size - _icmp_error.size


def may_be_told(header: Header) -> bool:
    """Say whether an ICMP error about a packet may be sent (RFC 1812, section 4.3.2.7)."""
    about_error = header.protocol == ICMP and header.kind in ICMP_ERRORS
    return not about_error and is_host(header.saddr) and is_host(header.daddr)


def unreachable(packet: bytes, code: int, saddr: int) -> bytes:
    """Make a destination unreachable to the sender of a packet (RFC 1812, 4.3.2 and 5.2.7).

    `code` is its ICMP code. It comes from `saddr`, in host order; where `saddr` is 0, whoever sends
    the error fills in the source.
    """
    message = bytearray(_icmp_error.pack(UNREACHABLE, code, 0, 0) + packet[:_MOST_QUOTED])
    _u16.pack_into(message, CHECKSUM_OFFSET[ICMP], checksum(message))
    daddr = int.from_bytes(packet[SADDR : SADDR + 4], "big")
    return _packet(ICMP, saddr, daddr, message, _PRECEDENCE | (packet[1] & _TOS))


def segment(saddr: int, daddr: int, sport: int, dport: int, seq: int, flags: int) -> bytes:
    """Make a TCP segment without data; its acknowledgement number is 0.

    Addresses and ports are ints in host order.
    """
    tcp = bytearray(_tcp.pack(sport, dport, seq, 0, _tcp.size << 2, flags, 0, 0, 0))
    pseudo_header = ones_sum(_pseudo_header.pack(saddr, daddr, TCP, _tcp.size))
    _u16.pack_into(tcp, CHECKSUM_OFFSET[TCP], checksum(tcp, pseudo_header))
    return _packet(TCP, saddr, daddr, tcp)


def _packet(protocol: int, saddr: int, daddr: int, body: bytes | bytearray, tos: int = 0) -> bytes:
    """Make a whole packet: an IPv4 header without options, and the `body`."""
    length = _ip.size + len(body)
    ip = bytearray(_ip.pack(0x45, tos, length, 0, 0, _HOPS, protocol, 0, saddr, daddr))
    _u16.pack_into(ip, IP_CHECKSUM, checksum(ip))
    return bytes(ip + body)
