"""What the masquerade reads of a packet's headers, and what makes a packet well-formed."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from nfmasq.engine.wire.by_address import is_well_formed
from nfmasq.engine.wire.checksum import ones_sum
from nfmasq.engine.wire.gre import GRE, PPP, read_call_id
from nfmasq.engine.wire.protocols import ACK, ICMP, PROTOCOLS, RST, SYN, TCP, UDP

_ip = Struct("!BxHxxHxBxxII").unpack_from
_ports = Struct("!HH").unpack_from
_tcp = Struct("!HH8xBB").unpack_from
_udp = Struct("!HHH").unpack_from
_icmp = Struct("!BBxxHxx").unpack_from

_OFFSET = 0x1FFF
_MORE_FRAGMENTS_OR_OFFSET = 0x3FFF

_END_OF_OPTIONS, _NO_OPERATION = 0, 1
_WITH_ADDRESSES = frozenset({7, 68, 82, 131, 137, 145, 147, 149, 152})
"""Numbers of IP options that name addresses: record route, timestamp, traceroute, loose and strict
source route, extended internet protocol, address extension, directed broadcast, upstream multicast
(IANA, Internet Protocol Version 4 Parameters)."""

ECHO_REPLY, UNREACHABLE, SOURCE_QUENCH, ECHO = 0, 3, 4, 8
TIME_EXCEEDED, PARAMETER_PROBLEM = 11, 12
TIMESTAMP, TIMESTAMP_REPLY, INFO, INFO_REPLY, MASK, MASK_REPLY = 13, 14, 15, 16, 17, 18

ICMP_QUERIES = frozenset({ECHO, TIMESTAMP, INFO, MASK})
ICMP_REPLIES = frozenset({ECHO_REPLY, TIMESTAMP_REPLY, INFO_REPLY, MASK_REPLY})
ICMP_ERRORS = frozenset({UNREACHABLE, SOURCE_QUENCH, TIME_EXCEEDED, PARAMETER_PROBLEM})


class Refused(Exception):
    """Raised for a packet that cannot be masqueraded; it is counted under the `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SessionRefused(Refused):
    """A packet that would have begun a session that cannot be had; that is counted already."""


class Header(NamedTuple):
    """What was read of a packet's headers; all numbers are in host order.

    `sport` and `dport` are the ports of TCP and UDP. For an ICMP query or reply both are the
    identifier. For a packet of a PPTP call they are PPP and the receiver's call ID (`gre.py`). For
    other ICMP, and for other protocols, both are 0. `transport` is where the transport header
    begins, in bytes. `kind` is the byte of TCP flags (0 in a quoted packet), the ICMP type, or 0.
    """

    protocol: int
    saddr: int
    daddr: int
    sport: int
    dport: int
    transport: int
    kind: int

    @property
    def is_of_call(self) -> bool:
        """Whether the packet belongs to a PPTP call."""
        return self.protocol == GRE and self.sport == PPP

    @property
    def is_first_segment(self) -> bool:
        """Whether the packet is the TCP segment that begins a connection."""
        return self.protocol == TCP and self.kind & (SYN | ACK | RST) == SYN

    @property
    def is_second_segment(self) -> bool:
        """Whether the packet is the TCP segment that answers the first segment of a connection."""
        return self.protocol == TCP and self.kind & (SYN | ACK | RST) == SYN | ACK

    @property
    def is_reset(self) -> bool:
        """Whether the packet resets a TCP connection.

        A reset keeps no entry alive (RFC 7857 section 2.2).
        """
        return self.protocol == TCP and self.kind & RST != 0

    def without_call(self) -> Header:
        """Return the header without a call that no helper knows of: the packet goes by address."""
        return self._replace(sport=0, dport=0)


class FiveTuple(NamedTuple):
    """The five values that tell a flow from other flows; addresses and ports in host order."""

    protocol: int
    saddr: int
    sport: int
    daddr: int
    dport: int


def five_tuple(packet: bytes) -> FiveTuple | None:
    """Read the five values of an IPv4 packet, however odd it is; None where it has no IP header.

    Ports that cannot be read are 0; for an ICMP query or reply both are the identifier.
    """
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return None
    try:
        header = read_header(packet, by_address=True)
    except Refused:
        _, _, _, protocol, saddr, daddr = _ip(packet)
        return FiveTuple(protocol, saddr, 0, daddr, 0)
    return FiveTuple(header.protocol, header.saddr, header.sport, header.daddr, header.dport)


def read_header(packet: bytes, by_address: bool = False) -> Header:
    """Read the headers of a whole IPv4 packet: TCP, UDP, ICMP, or GRE of a PPTP call.

    With `by_address` the packet may be of any protocol. Raises Refused: malformed, fragment,
    unsupported.
    """
    if len(packet) < 20:
        raise Refused("malformed")
    version, length, fragment, protocol, saddr, daddr = _ip(packet)
    transport = (version & 0x0F) << 2
    if version >> 4 != 4 or transport < 20 or length != len(packet) or length < transport:
        raise Refused("malformed")
    if fragment & _MORE_FRAGMENTS_OR_OFFSET:
        raise Refused("fragment")
    if protocol == TCP:
        sport, dport, kind = _read_tcp(packet, transport)
    elif protocol == UDP:
        sport, dport, kind = _read_udp(packet, transport)
    elif protocol == ICMP:
        sport, dport, kind = _read_icmp(packet, transport)
    elif protocol == GRE and (call_id := read_call_id(packet, transport)) is not None:
        sport, dport, kind = PPP, call_id, 0
    elif not by_address:
        raise Refused("unsupported")
    elif is_well_formed(packet, protocol, transport):
        sport = dport = kind = 0
    else:
        raise Refused("malformed")
    return Header(protocol, saddr, daddr, sport, dport, transport, kind)


def is_of_call(packet: bytes) -> bool:
    """Say whether a GRE packet belongs to a PPTP call."""
    return read_call_id(packet, (packet[0] & 0x0F) << 2) is not None


def records_addresses(packet: bytes, header: Header) -> bool:
    """Say whether IP options name addresses, which may be inside addresses.

    Record route, timestamp and source route do (RFC 791), traceroute (RFC 1393) and some others
    that nobody uses (RFC 6814). RFC 7126 has gateways drop packets with them. Options that cannot
    be read count as options that name addresses.
    """
    at = 20
    while at < header.transport and packet[at] != _END_OF_OPTIONS:
        if packet[at] == _NO_OPERATION:
            at += 1
            continue
        length = packet[at + 1] if at + 1 < header.transport else 0
        if packet[at] in _WITH_ADDRESSES or length < 2:
            return True
        at += length
    return False


def read_quoted_header(quote: bytes) -> Header | None:
    """Read the headers of a packet that an ICMP error quotes; 8 bytes of transport are enough.

    None where the quoted packet can belong to no session. It is a later fragment; or an ICMP error
    itself, about which no errors are sent (RFC 1122 section 3.2.2); or damaged, with a wrong header
    checksum (RFC 5508 REQ-3a). Raises Refused: malformed.
    """
    if len(quote) < 20:
        raise Refused("malformed")
    version, _, fragment, protocol, saddr, daddr = _ip(quote)
    transport = (version & 0x0F) << 2
    # In other protocols a whole packet may be shorter than 8 bytes of transport (GRE: 4 bytes).
    least = transport + 8 if protocol in PROTOCOLS else transport
    if version >> 4 != 4 or transport < 20 or len(quote) < least:
        raise Refused("malformed")
    if fragment & _OFFSET or ones_sum(quote[:transport]):
        return None
    if protocol in (TCP, UDP):
        sport, dport = _ports(quote, transport)
        return Header(protocol, saddr, daddr, sport, dport, transport, 0)
    if protocol == GRE and (call_id := read_call_id(quote, transport)) is not None:
        return Header(protocol, saddr, daddr, PPP, call_id, transport, 0)
    if protocol != ICMP:
        return Header(protocol, saddr, daddr, 0, 0, transport, 0)
    kind, _, identifier = _icmp(quote, transport)
    if kind not in ICMP_QUERIES and kind not in ICMP_REPLIES:
        return None
    return Header(protocol, saddr, daddr, identifier, identifier, transport, kind)


def _read_tcp(packet: bytes, at: int) -> tuple[int, int, int]:
    """Read the ports and the flags. Raises Refused: malformed."""
    room = len(packet) - at
    if room < 20:
        raise Refused("malformed")
    sport, dport, words, flags = _tcp(packet, at)
    if words < 0x50 or words >> 2 & 0x3C > room or not sport or not dport:
        raise Refused("malformed")
    return sport, dport, flags


def _read_udp(packet: bytes, at: int) -> tuple[int, int, int]:
    """Read the ports, and 0 since UDP has no flags. Raises Refused: malformed."""
    room = len(packet) - at
    if room < 8:
        raise Refused("malformed")
    sport, dport, length = _udp(packet, at)
    if length < 8 or length > room or not sport or not dport:
        raise Refused("malformed")
    return sport, dport, 0


def _read_icmp(packet: bytes, at: int) -> tuple[int, int, int]:
    """Read the identifier of a query or reply, twice, and the type. Raises Refused: malformed."""
    if len(packet) < at + 8:
        raise Refused("malformed")
    kind, _, identifier = _icmp(packet, at)
    if kind in ICMP_QUERIES or kind in ICMP_REPLIES:
        return identifier, identifier, kind
    return 0, 0, kind
