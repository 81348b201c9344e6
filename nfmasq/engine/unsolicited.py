"""SYNs from the outside that nobody asked for: no answer for six seconds (RFC 5382 REQ-4).

Two hosts that open a connection to each other at the same time both send a SYN. One SYN may arrive
before the other has left: to answer it would end the attempt. So a SYN that nobody asked for is
held. When an outbound SYN of the same connection has made a session meanwhile, the held SYN is
forgotten in silence: its sender sends it again, and then it belongs to the session. Otherwise the
sender is told that the port is unreachable. When too many SYNs are held, any further SYN is
dropped, and nobody is told. Nor is anybody told when too many senders have been told already: SYNs
with forged sources must not have the gateway flood others with errors (RFC 1812, section 4.3.2.8).
"""

from __future__ import annotations

HOLD = 6.0
"""Seconds for which a SYN gets no answer."""

MOST_HELD = 1024

TOLD_PER_SECOND = 100
"""The most senders a second that are told that the port is unreachable."""

ACCEPT, DROP = "accept", "drop"
UNSOLICITED = (DROP, ACCEPT)
"""The choices of `--unsolicited`: hold SYNs that nobody asked for (drop), or leave them to the
gateway's own stack (accept)."""


class Unsolicited:
    """Holds SYNs, by the key of the session that each would belong to."""

    def __init__(self) -> None:
        self._held: dict[bytes, tuple[float, bytes]] = {}

    def hold(self, key: bytes, packet: bytes, now: float) -> None:
        """Hold a SYN; a SYN that was sent again changes nothing."""
        if len(self._held) < MOST_HELD:
            self._held.setdefault(key, (now + HOLD, packet))

    def due(self, now: float, limit: int) -> dict[bytes, bytes]:
        """Return the SYNs, by key, that were held for HOLD seconds, and forget them.

        They are `limit` at most.
        """
        due: dict[bytes, bytes] = {}
        for key, (until, packet) in self._held.items():
            if until > now or len(due) == limit:
                break  # what was held later is due later
            due[key] = packet
        for key in due:
            del self._held[key]
        return due
