"""Whether a port may be used again, so soon after the last TCP connection that had it.

Whoever closes a TCP connection first remembers it for a minute (TIME_WAIT). It may take a SYN from
the same port for a late one, which it answers by an ACK. The new connection opens a second later
then, or not at all. So where the outside has closed first, the port goes to sessions with other
outside endpoints in this minute, and this is known for longer than the entry is there. Only where
there is no other port does the outside get another connection from the port.

The last ACK of a connection that both sides have just closed is still on its way. Whoever has the
port by then gets the ACK, and the connection's host sends its FIN again and again. So the port goes
to nobody for `SETTLED`.
"""

from __future__ import annotations

from nfmasq.engine.table.entry import OUTSIDE_WAITS, IpMasq
from nfmasq.engine.table.keys import session_key
from nfmasq.engine.table.states import TIME_WAIT
from nfmasq.engine.wire.protocols import TCP

SETTLED = 1.0
"""Seconds after which nothing more is to come for a connection that both sides have closed."""

REMEMBERED = 60.0
"""Seconds for which the outside remembers a connection: as long as Linux does, and others at most
twice as long."""

MOST = 16_384
"""The most connections without an entry that are known here. Beyond them the oldest is not."""


def is_settled(ms: IpMasq, idle: float) -> bool:
    """Say whether nothing more is to come for a session that is over; `idle` is in seconds."""
    return ms.state != TIME_WAIT or idle >= SETTLED


class PortReuse:
    """Knows from which masquerade ports an outside endpoint remembers a connection.

    `until` tells, by the key of a session (`tables.in_index`), until when a connection without an
    entry is remembered; the entry that ended first is first. It is always the same dictionary.
    Addresses and ports are in host order, times in seconds.
    """

    def __init__(self) -> None:
        self.until: dict[bytes, float] = {}

    def ended(self, ms: IpMasq, now: float) -> None:
        """Note that an entry ends, whose connection the outside has closed first."""
        closed = (ms.timer or now) - ms.timeout
        if closed + REMEMBERED <= now:
            return
        key = session_key(ms.daddr, ms.maddr, ms.dport, ms.mport)
        self.until.pop(key, None)
        if len(self.until) >= MOST:
            del self.until[next(iter(self.until))]
        self.until[key] = closed + REMEMBERED

    def forget(self, now: float, limit: int) -> None:
        """Forget what the outside has forgotten, `limit` connections at most."""
        until = self.until
        for _ in range(min(limit, len(until))):
            oldest = next(iter(until))
            if until[oldest] > now:
                break
            del until[oldest]

    def is_remembered(
        self, protocol: int, maddr: int, mport: int, outside: tuple[int, int]
    ) -> bool:
        """Say whether an outside endpoint remembers a connection that has no entry any more."""
        if protocol != TCP or not self.until:
            return False
        return session_key(outside[0], maddr, outside[1], mport) in self.until

    def would_mix_up(self, ms: IpMasq, outside: tuple[int, int]) -> bool:
        """Say whether an outside endpoint takes a session on an entry's port for an earlier one."""
        if ms.flags & OUTSIDE_WAITS and (ms.daddr, ms.dport) == outside:
            return True
        return self.is_remembered(ms.protocol, ms.maddr, ms.mport, outside)
