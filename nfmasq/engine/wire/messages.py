"""Packets that the masquerade itself makes: ICMP errors about what it refuses, and TCP segments.

There are few of them, and so dpkt may build them; it fills in lengths and checksums. They have 64
hops to go, may be fragmented, and have the identification 0.
"""

from __future__ import annotations

import dpkt

from nfmasq.engine.wire.address import is_host
from nfmasq.engine.wire.header import ICMP_ERRORS, UNREACHABLE, Header
from nfmasq.engine.wire.protocols import ICMP, TCP
from nfmasq.engine.wire.rewrite import SADDR

PORT_UNREACHABLE = 3
PROHIBITED = 13
"""Codes of an ICMP destination unreachable; PROHIBITED is "administratively prohibited"."""

_HOPS = 64
_PRECEDENCE, _TOS = 0xC0, 0x1E  # internetwork control; bits that are kept of the packet's TOS

_UNUSED = bytes(4)  # of an ICMP error, between its checksum and what it quotes
_MOST_QUOTED = 576 - 20 - 8


def may_be_told(header: Header) -> bool:
    """Say whether an ICMP error about a packet may be sent (RFC 1812, section 4.3.2.7)."""
    about_error = header.protocol == ICMP and header.kind in ICMP_ERRORS
    return not about_error and is_host(header.saddr) and is_host(header.daddr)


def unreachable(packet: bytes, code: int, saddr: int) -> bytes:
    """Make a destination unreachable to the sender of a packet (RFC 1812, 4.3.2 and 5.2.7).

    `code` is its ICMP code. It comes from `saddr`, in host order; where `saddr` is 0, whoever sends
    the error fills in the source.
    """
    message = dpkt.icmp.ICMP(type=UNREACHABLE, code=code, data=_UNUSED + packet[:_MOST_QUOTED])
    daddr = int.from_bytes(packet[SADDR : SADDR + 4], "big")
    return _packet(ICMP, saddr, daddr, message, _PRECEDENCE | (packet[1] & _TOS))


def segment(saddr: int, daddr: int, sport: int, dport: int, seq: int, flags: int) -> bytes:
    """Make a TCP segment without data; its acknowledgement number is 0.

    Addresses and ports are ints in host order.
    """
    tcp = dpkt.tcp.TCP(sport=sport, dport=dport, seq=seq, ack=0, flags=flags, win=0)
    return _packet(TCP, saddr, daddr, tcp)


def _packet(protocol: int, saddr: int, daddr: int, body: dpkt.Packet, tos: int = 0) -> bytes:
    """Make a whole packet: an IPv4 header without options, and the `body`."""
    source, destination = saddr.to_bytes(4, "big"), daddr.to_bytes(4, "big")
    return bytes(dpkt.ip.IP(p=protocol, tos=tos, ttl=_HOPS, src=source, dst=destination, data=body))
