"""What the masquerade reads of a packet's headers, and the checks that make it well-formed."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from nfmasq.engine.counters import ICMP, TCP, UDP

_ip = Struct("!BxHxxHxBxxII").unpack_from
_ports = Struct("!HH").unpack_from
_icmp = Struct("!BBxxHxx").unpack_from
_u16 = Struct("!H").unpack_from

_OFFSET = 0x1FFF
_MORE_FRAGMENTS_OR_OFFSET = 0x3FFF

ECHO_REPLY, UNREACHABLE, SOURCE_QUENCH, ECHO = 0, 3, 4, 8
TIME_EXCEEDED, PARAMETER_PROBLEM = 11, 12
TIMESTAMP, TIMESTAMP_REPLY, INFO, INFO_REPLY, MASK, MASK_REPLY = 13, 14, 15, 16, 17, 18

ICMP_QUERIES = frozenset({ECHO, TIMESTAMP, INFO, MASK})
ICMP_REPLIES = frozenset({ECHO_REPLY, TIMESTAMP_REPLY, INFO_REPLY, MASK_REPLY})
ICMP_ERRORS = frozenset({UNREACHABLE, SOURCE_QUENCH, TIME_EXCEEDED, PARAMETER_PROBLEM})


class Refused(Exception):
    """A packet that cannot be masqueraded, and the reason it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Header(NamedTuple):
    """Headers of a packet: numbers in host order.

    `transport` is where the transport header begins. Ports of TCP and UDP; for an ICMP query or
    reply the identifier stands as `sport` and `dport` alike, for other ICMP both are 0. `kind` is
    the TCP flags' byte or the ICMP type.
    """

    protocol: int
    saddr: int
    daddr: int
    sport: int
    dport: int
    transport: int
    kind: int


def read_header(packet: bytes) -> Header:
    """The headers of a whole IPv4 packet. Refused: malformed, fragment, unsupported."""
    if len(packet) < 20:
        raise Refused("malformed")
    version, length, fragment, protocol, saddr, daddr = _ip(packet)
    transport = (version & 0x0F) << 2
    if version >> 4 != 4 or transport < 20 or length != len(packet) or length < transport:
        raise Refused("malformed")
    if fragment & _MORE_FRAGMENTS_OR_OFFSET:
        raise Refused("fragment")
    room = length - transport
    if protocol == TCP:
        return _read_tcp(packet, room, Header(protocol, saddr, daddr, 0, 0, transport, 0))
    if protocol == UDP:
        return _read_udp(packet, room, Header(protocol, saddr, daddr, 0, 0, transport, 0))
    if protocol == ICMP:
        return _read_icmp(packet, room, Header(protocol, saddr, daddr, 0, 0, transport, 0))
    raise Refused("unsupported")


def read_quoted_header(quote: bytes) -> Header | None:
    """The headers of a packet quoted in an ICMP error, of which 8 bytes of transport suffice.

    None where it can belong to no session: of another protocol, a later fragment, or an
    error itself, about which there are no errors (RFC 1122 section 3.2.2). Refused: malformed.
    """
    if len(quote) < 20:
        raise Refused("malformed")
    version, _, fragment, protocol, saddr, daddr = _ip(quote)
    transport = (version & 0x0F) << 2
    if version >> 4 != 4 or transport < 20 or len(quote) < transport + 8:
        raise Refused("malformed")
    if fragment & _OFFSET:
        return None
    if protocol in (TCP, UDP):
        sport, dport = _ports(quote, transport)
        return Header(protocol, saddr, daddr, sport, dport, transport, 0)
    if protocol != ICMP:
        return None
    kind, _, identifier = _icmp(quote, transport)
    if kind not in ICMP_QUERIES and kind not in ICMP_REPLIES:
        return None
    return Header(protocol, saddr, daddr, identifier, identifier, transport, kind)


def _read_tcp(packet: bytes, room: int, header: Header) -> Header:
    if room < 20:
        raise Refused("malformed")
    at = header.transport
    sport, dport = _ports(packet, at)
    header_length = packet[at + 12] >> 4 << 2
    if header_length < 20 or header_length > room or not sport or not dport:
        raise Refused("malformed")
    return header._replace(sport=sport, dport=dport, kind=packet[at + 13])


def _read_udp(packet: bytes, room: int, header: Header) -> Header:
    if room < 8:
        raise Refused("malformed")
    at = header.transport
    sport, dport = _ports(packet, at)
    (length,) = _u16(packet, at + 4)
    if length < 8 or length > room or not sport or not dport:
        raise Refused("malformed")
    return header._replace(sport=sport, dport=dport)


def _read_icmp(packet: bytes, room: int, header: Header) -> Header:
    if room < 8:
        raise Refused("malformed")
    kind, _, identifier = _icmp(packet, header.transport)
    if kind in ICMP_QUERIES or kind in ICMP_REPLIES:
        return header._replace(sport=identifier, dport=identifier, kind=kind)
    return header._replace(kind=kind)
