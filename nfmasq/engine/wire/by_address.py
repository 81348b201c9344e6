"""Protocols other than TCP, UDP and ICMP: masqueraded by their addresses alone.

Their packets have no ports (GRE, ESP, tunnels), or ports that stay as they are (SCTP, UDP-Lite,
DCCP). So what an outside host sends in one of these protocols can be for one inside host only: the
host that has the entry of (protocol, outside host). As long as this entry lives, other inside hosts
are refused a session with the same outside host. All ports of an entry are 0, and only an outside
host with an entry may send in. (The calls of PPTP, which are GRE, are told apart by call IDs where
a helper knows of them: `helper/calls.py`.)

In some protocols the checksum covers the addresses, and is moved as in TCP and UDP: in UDP-Lite
(RFC 3828, section 3.1) and DCCP (RFC 4340, section 9.1). In other protocols it does not cover them,
and is not looked at: in SCTP (RFC 9260, section 6.8), GRE (RFC 2784, section 2.3) and ESP (RFC
4303, section 2.8).

AH covers the addresses, too, but under a key (RFC 4302, section 3.3.3.1): no address can be
replaced. The protocols by which routers and hosts run their own network have no business on the
other side, and the parts of IPv6 that have protocol numbers have none either. Packets of all these
protocols are dropped. Packets to a multicast group are dropped, too: no answer would come from it.
"""

from __future__ import annotations

from nfmasq.engine.wire.gre import GRE
from nfmasq.engine.wire.protocols import PROTOCOLS

DROP, BY_ADDRESS = "drop", "by-address"
OTHER_PROTOCOLS = (DROP, BY_ADDRESS)
"""The choices of `--other-protocols`."""

IP_IN_IP, DCCP, IPV6, ESP, AH, SCTP, UDPLITE = 4, 33, 41, 50, 51, 132, 136

_NAMES = PROTOCOLS | {
    DCCP: "dccp",
    GRE: "gre",
    ESP: "esp",
    AH: "ah",
    SCTP: "sctp",
    UDPLITE: "udplite",
}
_NUMBERS = {name: number for number, name in _NAMES.items()}

_IGMP, _GGP, _EGP, _IGP, _RSVP, _EIGRP, _OSPF, _PIM, _VRRP, _ISIS = (
    2, 3, 8, 9, 46, 88, 89, 103, 112, 124
)  # fmt: skip
_PARTS_OF_IPV6 = frozenset({0, 43, 44, 58, 59, 60, 135, 140})
_RESERVED = 255  # a raw socket of this number sends whatever address it is given
REFUSED = _PARTS_OF_IPV6 | {
    _RESERVED, AH, _IGMP, _GGP, _EGP, _IGP, _RSVP, _EIGRP, _OSPF, _PIM, _VRRP, _ISIS
}  # fmt: skip
"""Protocol numbers that are never masqueraded."""

_MULTICAST = 224 << 24  # and above, up to the broadcast address

_LEAST = {IP_IN_IP: 20, DCCP: 12, IPV6: 40, GRE: 4, ESP: 8, SCTP: 12, UDPLITE: 8}
"""The least length of a protocol's own header, in bytes, by protocol number."""


def may_go_out(protocol: int, daddr: int) -> bool:
    """Say whether a packet of one of these protocols can be masqueraded, and can have an answer.

    `daddr` is in host order.
    """
    return protocol not in REFUSED and daddr < _MULTICAST


def is_well_formed(packet: bytes, protocol: int, at: int) -> bool:
    """Say whether the header at byte `at` is whole, and the lengths in it are within the packet."""
    room = len(packet) - at
    if room < _LEAST.get(protocol, 0):
        return False
    if protocol == UDPLITE:
        coverage = int.from_bytes(packet[at + 4 : at + 6], "big")
        return coverage == 0 or 8 <= coverage <= room
    if protocol == DCCP:
        return 12 <= packet[at + 4] << 2 <= room
    return True


def name_of(protocol: int) -> str:
    """Return the usual name of a protocol number; where it has none, the number in decimals."""
    return _NAMES.get(protocol, str(protocol))


def number_of(name: str) -> int | None:
    """Return the protocol number (0 to 255) of a name or of decimals; None where there is none."""
    if name.isascii() and name.isdigit() and len(name) <= 3 and int(name) <= 255:
        return int(name)
    return _NUMBERS.get(name)
