"""What the masquerade has counted: plain integers, added to on a packet's way.

Whoever wants to publish them reads them; nothing here knows who that is.
"""

from __future__ import annotations

from typing import NamedTuple

from nfmasq.engine.table.endings import CLOSED, ENDINGS, EXPIRED
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
        self.ended = {name: dict.fromkeys(ENDINGS, 0) for name in ROWS}
        self.errors = dict.fromkeys(REASONS, 0)


class Account(NamedTuple):
    """The entries at one moment, by row: those that are there, all there have been, the ended.

    `ended` is by row and then by reason. In each row, created = ended + live.
    """

    live: dict[str, int]
    created: dict[str, int]
    ended: dict[str, dict[str, int]]

    @property
    def expired(self) -> dict[str, int]:
        """The entries that ended at their time, be their connections over or not."""
        return {name: reasons[EXPIRED] + reasons[CLOSED] for name, reasons in self.ended.items()}
