"""GRE of version 1: the packets of PPTP calls (RFC 2637, section 4.1).

A packet names its call by the ID that the receiver has given the call; the sender's ID is not in
the packet. In nfmasq the receiver's ID stands as the destination port. There is no source port: in
its place stands the protocol type, which is PPP in all packets of calls.
"""

from __future__ import annotations

from struct import Struct

GRE = 47

PPP = 0x880B
"""The protocol type of all packets of calls, which stands as their source port."""

CALL_ID = 6
"""Where the receiver's call ID stands in the GRE header, in bytes."""

_read = Struct("!BBHxxH")

_KEY, _SEQUENCE = 0x20, 0x10
_VERSION, _ACKNOWLEDGEMENT = 0x01, 0x80


def read_call_id(packet: bytes, at: int) -> int | None:
    """Read the receiver's call ID from the GRE header at byte `at`; None where it has no call."""
    if len(packet) < at + _read.size:
        return None
    flags, version, protocol_type, call_id = _read.unpack_from(packet, at)
    is_call = (flags & ~_SEQUENCE, version & ~_ACKNOWLEDGEMENT) == (_KEY, _VERSION)
    return int(call_id) if is_call and protocol_type == PPP else None
