"""Numbers that stand in packets: protocols, and the flags of TCP; and the rows of the counters."""

from __future__ import annotations

TCP = 6
UDP = 17
ICMP = 1

PROTOCOLS: dict[int, str] = {TCP: "tcp", UDP: "udp", ICMP: "icmp"}
"""The protocols with ports, or with an identifier in the place of ports: number to name."""

WITH_PORTS = frozenset({TCP, UDP})

FIN, SYN, RST, ACK, URG = 0x01, 0x02, 0x04, 0x10, 0x20
"""Flags of TCP, in the header's 14th byte."""

OTHER = "other"
ROWS = (*PROTOCOLS.values(), OTHER)
"""What is counted by protocol is counted in these rows."""


def row(protocol: int) -> str:
    """Name the row in which a protocol number is counted."""
    return PROTOCOLS.get(protocol, OTHER)


def protocol_name(packet: bytes) -> str:
    """Name the row in which an IPv4 packet is counted, however short or broken it is."""
    return row(packet[9]) if len(packet) > 9 else OTHER
