"""What the masquerade has counted, in plain integers that each packet adds to.

Whoever publishes the numbers reads them; nothing here knows who does.
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
"""All reasons why a packet is dropped, or a session refused."""


class Traffic:
    """Counts the packets of one direction and protocol.

    `accepted` and `dropped` are packets; `bytes` are the bytes of the accepted packets, IP headers
    included.
    """

    __slots__ = ("accepted", "bytes", "dropped")

    def __init__(self) -> None:
        self.accepted = 0
        self.dropped = 0
        self.bytes = 0

    def count(self, packet: bytes | None) -> None:
        """Count the verdict on one packet: the packet that is sent on, or None for a drop."""
        if packet is None:
            self.dropped += 1
        else:
            self.accepted += 1
            self.bytes += len(packet)


class Counters:
    """Holds everything that one masquerade counts.

    What is counted by protocol stands under the protocol's name in `ROWS`. `ended` is by row and
    then by reason (one of `ENDINGS`), `errors` by reason (one of `REASONS`). `overlapping` are the
    sessions that were given a port of another inside endpoint, since all ports were taken.
    `unbelieved` are the segments of TCP that did not fit their connection, by direction; they were
    passed on, and changed nothing (`table/numbers.py`).
    """

    def __init__(self) -> None:
        self.outbound = {name: Traffic() for name in ROWS}
        self.inbound = {name: Traffic() for name in ROWS}
        self.created = dict.fromkeys(ROWS, 0)
        self.overlapping = dict.fromkeys(ROWS, 0)
        self.unbelieved = {"out": 0, "in": 0}
        self.ended = {name: dict.fromkeys(ENDINGS, 0) for name in ROWS}
        self.errors = dict.fromkeys(REASONS, 0)


class Account(NamedTuple):
    """The number of entries at one moment, by row: `live` now, `created` in all, and `ended`.

    `ended` is by row and then by reason. In each row, created = ended + live.
    """

    live: dict[str, int]
    created: dict[str, int]
    ended: dict[str, dict[str, int]]

    @property
    def expired(self) -> dict[str, int]:
        """The entries that ended when their timer fired, or were over and made room, by row."""
        return {name: reasons[EXPIRED] + reasons[CLOSED] for name, reasons in self.ended.items()}
