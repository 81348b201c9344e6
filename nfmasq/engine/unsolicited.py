"""SYNs from outside that nobody asked for: no answer for six seconds (RFC 5382 REQ-4).

Two hosts that open a connection to each other at the same time both send a SYN, and one of them may
arrive before the other has left: to answer it would end the attempt. So such a SYN is held. When an
outbound SYN of its connection has made a session meanwhile, the held one is forgotten in silence:
its sender sends it again, and then it belongs to a session. Otherwise the sender is told
that the port is unreachable. What comes when too many are held is dropped, and nobody is told.
"""

from __future__ import annotations

HOLD = 6.0
"""Seconds without an answer."""

MOST_HELD = 1024

ACCEPT, DROP = "accept", "drop"
UNSOLICITED = (DROP, ACCEPT)
"""The choices of `--unsolicited`: hold such SYNs, or leave them to the gateway's own stack."""


class Unsolicited:
    """The SYNs that are held, by the key of the session that each would belong to."""

    def __init__(self) -> None:
        self._held: dict[bytes, tuple[float, bytes]] = {}

    def hold(self, key: bytes, packet: bytes, now: float) -> None:
        """Hold a SYN; one that was sent again changes nothing."""
        if len(self._held) < MOST_HELD:
            self._held.setdefault(key, (now + HOLD, packet))

    def due(self, now: float, limit: int) -> dict[bytes, bytes]:
        """So many at most that were held for long enough, by key; they are held no more."""
        due: dict[bytes, bytes] = {}
        for key, (until, packet) in self._held.items():
            if until > now or len(due) == limit:
                break  # what was held later is due later
            due[key] = packet
        for key in due:
            del self._held[key]
        return due
