"""Whether a port may be used again, so soon after the last TCP connection that had it.

Whoever closes a TCP connection first remembers it for a minute (TIME_WAIT). It may take a SYN from
the same port for a late one, which it answers by an ACK. The new connection opens a second later
then, or not at all. So where the outside has closed first, the port goes to sessions with other
outside endpoints in this minute, if there is any other port. This is known for longer than the
entry is there, but not after a flush.

The last segments of a connection that both sides have just closed are still on their way. Whoever
has the port by then gets the outside's, and the inside's are dropped: the two send their FINs again
and again. So another session gets the port only after `SETTLED`. Where there is no other port a
host gets it sooner: its own port, or any port as long as it has few.
"""

from __future__ import annotations

from collections import OrderedDict

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
    entry is remembered, the earliest first. Addresses and ports are in host order, times in
    seconds.
    """

    def __init__(self) -> None:
        self.until: OrderedDict[bytes, float] = OrderedDict()

    def ended(self, ms: IpMasq, now: float) -> None:
        """Note that an entry ends, whose connection the outside has closed first."""
        if now - (ms.timer or now) + ms.timeout >= REMEMBERED:
            return
        key = session_key(ms.daddr, ms.maddr, ms.dport, ms.mport)
        self.until.pop(key, None)
        self.until[key] = now + REMEMBERED
        if len(self.until) > MOST:
            self.until.popitem(last=False)

    def forget(self, now: float, limit: int) -> bool:
        """Forget what the outside has forgotten, `limit` connections at most; true: more is due."""
        until = self.until
        for _ in range(limit):
            if not until or until[next(iter(until))] > now:
                return False
            until.popitem(last=False)
        return True

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
