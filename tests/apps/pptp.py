"""Messages of PPTP and packets of its calls, as RFC 2637 has them."""

from __future__ import annotations

import struct

from tests.packets import ip

GRE = 47
START_REQUEST, OUTGOING_REQUEST, OUTGOING_REPLY = 1, 7, 8
INCOMING_REQUEST, INCOMING_REPLY, INCOMING_CONNECTED = 9, 10, 11
CLEAR_REQUEST, DISCONNECT_NOTIFY, WAN_ERROR_NOTIFY, SET_LINK_INFO = 12, 13, 14, 15

CONNECTED, REFUSED = 1, 4

LENGTHS = {1: 156, 2: 156, 7: 168, 8: 32, 9: 220, 10: 24, 11: 28, 12: 16, 13: 148, 14: 40, 15: 24}


def message(kind: int, *ids: int, result: int = 0) -> bytes:
    """Build a control message with its call IDs, two at most; `result` follows two of them."""
    body = b"".join(struct.pack("!H", number) for number in ids)
    if len(ids) == 2:
        body += bytes([result])
    length = LENGTHS[kind]
    head = struct.pack("!HHIHH", length, 1, 0x1A2B3C4D, kind, 0)
    return (head + body).ljust(length, b"\0")


def gre(call_id: int, payload: bytes) -> bytes:
    """Build what follows the IP header: GRE of version 1, with a sequence number."""
    return struct.pack("!BBHHHI", 0x30, 1, 0x880B, len(payload), call_id, 7) + payload


def data(src: str, dst: str, call_id: int, payload: bytes = b"PPP") -> bytes:
    """Build a packet of a call, for the end that has given the call this ID."""
    return ip(src, dst, GRE, gre(call_id, payload))
