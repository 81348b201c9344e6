"""Which session that is over leaves its port to a new session, as long as there is another way.

Whoever closes a TCP connection first remembers it for a minute or more (TIME_WAIT). It may take a
SYN from the same port for a late one, which it answers by an ACK. The new connection opens a second
later then, or not at all. So where the outside has closed first, the port goes to a session with
another outside endpoint.

The last ACK of a connection that both sides have just closed is still on its way. Whoever has the
port by then gets the ACK, and the connection's host sends its FIN again and again. So the port goes
to nobody for `SETTLED`.
"""

from __future__ import annotations

from nfmasq.engine.port_choice import Outside
from nfmasq.engine.table.entry import OUTSIDE_WAITS, IpMasq
from nfmasq.engine.table.states import TIME_WAIT

SETTLED = 1.0
"""Seconds after which nothing more is to come for a connection that both sides have closed."""


def is_settled(ms: IpMasq, idle: float) -> bool:
    """Say whether nothing more is to come for a session that is over; `idle` is in seconds."""
    return ms.state != TIME_WAIT or idle >= SETTLED


def is_remembered(ms: IpMasq, outside: Outside) -> bool:
    """Say whether an outside endpoint still knows a session from the session's port."""
    return ms.flags & OUTSIDE_WAITS > 0 and (ms.daddr, ms.dport) == outside
