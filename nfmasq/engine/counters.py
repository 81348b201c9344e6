"""What the masquerade has counted: plain integers, added to on a packet's way.

Whoever wants to publish them reads them; nothing here knows who that is.
"""

from __future__ import annotations

from nfmasq.engine.wire.protocols import ROWS

REASONS = (
    "malformed",
    "fragment",
    "unknown",
    "no_port",
    "no_room",
    "no_address",
    "unsupported",
    "ip_option",
    "filtered",
    "host_entries",
    "host_ports",
    "host_rate",
    "unsolicited",
    "address_changed",
    "no_server",
    "out_of_order",
    "exception",
)
"""Why a packet was dropped, all that can be."""

ENDINGS = ("address", "evicted")
"""Why an entry was ended before its time: its address is gone, or another needed its place."""


class Traffic:
    """Packets of one direction and protocol: `accepted`, `dropped`, and the `bytes` accepted."""

    __slots__ = ("accepted", "bytes", "dropped")

    def __init__(self) -> None:
        self.accepted = 0
        self.dropped = 0
        self.bytes = 0

    def count(self, packet: bytes | None) -> None:
        """Count the verdict on one packet: what is sent on, or None for a drop."""
        if packet is None:
            self.dropped += 1
        else:
            self.accepted += 1
            self.bytes += len(packet)


class Counters:
    """Everything counted by one masquerade; what is counted by protocol, by the name in `ROWS`."""

    def __init__(self) -> None:
        self.outbound = {name: Traffic() for name in ROWS}
        self.inbound = {name: Traffic() for name in ROWS}
        self.created = dict.fromkeys(ROWS, 0)
        self.expired = dict.fromkeys(ROWS, 0)
        self.ended = dict.fromkeys(ENDINGS, 0)
        self.errors = dict.fromkeys(REASONS, 0)
