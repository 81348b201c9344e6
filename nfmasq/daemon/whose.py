"""Says which host a queued packet belongs to, before the packet is handled.

A packet of a known session belongs to the session's inside host, whichever way it goes. Any other
packet belongs to its source, where this is an inside host that has shown that it is there. The rest
share a name for each side, and so a line (`lines.py`): a flood makes no host wait that is at work,
from however many addresses the flood comes, or seems to come.

Only the bytes are looked at that tell this. A packet that is odd is judged where it is handled.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from nfmasq.daemon.netfilter import PREROUTING
from nfmasq.daemon.nfnetlink import LEAST, hook_of, packet_start
from nfmasq.engine import Masquerade
from nfmasq.engine.wire.protocols import ICMP, WITH_PORTS

NEWCOMERS, STRANGERS = -1, -2
"""The names, beside addresses, of those on the inside and on the outside whom nobody knows."""

_u32 = Struct("!I").unpack_from


def whose_packet(engine: Masquerade) -> Callable[[bytes], int]:
    """Make the function that returns the host, an address in host order, of a kernel's message."""
    index = engine.sessions.tables.in_index
    is_genuine = engine.sessions.hosts.is_genuine
    starts: dict[int, int] = {}

    def whose(message: bytes) -> int:
        if len(message) < LEAST:
            return STRANGERS
        hook = hook_of(message)
        start = starts[hook] = packet_start(message, starts.get(hook, 0))
        if len(message) < start + 28:
            return STRANGERS
        if hook == PREROUTING:
            protocol = message[start + 9]
            ms = index[protocol].get(_key(message, start, protocol)) if protocol in index else None
            if ms is not None:
                return ms.saddr
        (source,) = _u32(message, start + 12)
        if is_genuine(source):
            return int(source)
        return STRANGERS if hook == PREROUTING else NEWCOMERS

    return whose


def _key(message: bytes, start: int, protocol: int) -> bytes:
    """Return the key (`tables.in_index`) of a packet from the outside that has no IP options."""
    if protocol in WITH_PORTS:
        return message[start + 12 : start + 24]
    identifier = message[start + 24 : start + 26] if protocol == ICMP else bytes(2)
    return message[start + 12 : start + 20] + bytes(2) + identifier
