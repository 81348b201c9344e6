"""GRE of version 1: the packets of a call of PPTP (RFC 2637, section 4.1).

Such a packet says for which of its receiver's calls it is, by the ID that the receiver has given
that call, and nothing of the sender's. The ID stands as the destination port; in the place of the
source port, of which there is none, is what each such packet has there: the protocol type, PPP.
"""

from __future__ import annotations

from struct import Struct

GRE = 47

PPP = 0x880B
"""The protocol type of all packets of calls, which stands as their source port."""

CALL_ID = 6
"""Where the receiver's call ID stands in the header."""

_read = Struct("!BBHxxH")

_KEY, _SEQUENCE = 0x20, 0x10
_VERSION, _ACKNOWLEDGEMENT = 0x01, 0x80


def read_call_id(packet: bytes, at: int) -> int | None:
    """The receiver's call ID in what begins at `at`; None where that is no packet of a call."""
    if len(packet) < at + _read.size:
        return None
    flags, version, protocol_type, call_id = _read.unpack_from(packet, at)
    is_call = (flags & ~_SEQUENCE, version & ~_ACKNOWLEDGEMENT) == (_KEY, _VERSION)
    return int(call_id) if is_call and protocol_type == PPP else None
