"""Who makes room: how many entries there are, and which of them gives way to a new one.

Room is made by entries that only one side has a part in so far, the oldest first
(`table/unanswered.py`). Established sessions never give way. An entry that the inside makes is
given the place of an unanswered one, whoever made that; what the outside makes fills half of the
table at most, and gives way to itself: so whoever floods a port from outside takes nothing from
the inside.

A port is made free likewise, when there is none left. It is that of a host that holds far more
than the one that wants it, or of a session that has waited for its answer in vain: the latter is
for a flood from many addresses, none of which holds many.

Nothing is ended here: `Sessions` ends the entry that is named.
"""

from __future__ import annotations

from collections import Counter

from nfmasq.engine.port_choice import Ends, PortChoice
from nfmasq.engine.table.entry import NO_REPLY, OUTSIDE, IpMasq
from nfmasq.engine.table.limits import InsideHosts
from nfmasq.engine.table.tables import TABLE_REFERENCES
from nfmasq.engine.table.unanswered import Unanswered

FEW_PORTS = 64
"""A host that holds so many ports or fewer gives none up to another, unless PATIENCE is over."""

PATIENCE = 10.0
"""Seconds without an answer, after which a session gives up its port when none is left."""


def _is_idle(ms: IpMasq) -> bool:
    """Say whether nobody holds an entry but the tables."""
    return ms.refcnt == TABLE_REFERENCES and not ms.n_control


class Room:
    """The entries by their number, and those among them that may give way."""

    def __init__(self, hosts: InsideHosts, choice: PortChoice) -> None:
        self._hosts = hosts
        self._choice = choice
        self.max_entries = 0
        self.entries = 0
        self._from_outside = 0
        self._by_protocol: Counter[int] = Counter()
        self._unanswered = Unanswered()
        self._unconfirmed = Unanswered()

    def entered(self, ms: IpMasq) -> None:
        """Count a new entry, which may give way until it is answered, or confirmed."""
        self._by_protocol[ms.protocol] += 1
        self.entries += 1
        if ms.flags & OUTSIDE:
            self._from_outside += 1
            self._unconfirmed.join(ms, self._from_outside)
        elif ms.flags & NO_REPLY:
            self._unanswered.join(ms, self.entries)

    def left(self, ms: IpMasq) -> None:
        """Count an entry no more."""
        self._by_protocol[ms.protocol] -= 1
        self.entries -= 1
        self._from_outside -= ms.flags & OUTSIDE > 0

    def of_protocol(self, protocol: int) -> int:
        """Return how many entries of a protocol number there are."""
        return self._by_protocol[protocol]

    def by_protocol(self) -> list[tuple[int, int]]:
        """List protocol numbers with how many entries of each there are."""
        return list(self._by_protocol.items())

    @property
    def is_full_from_outside(self) -> bool:
        """Whether what the outside made has its half of the table."""
        return self._from_outside * 2 >= self.max_entries

    def gives_way(self) -> IpMasq | None:
        """Name the entry that gives way to any other; None: there is none."""
        return self._unanswered.take(_is_idle) or self._unconfirmed.take(_is_idle)

    def gives_way_to_outside(self) -> IpMasq | None:
        """Name the entry that gives way to what the outside makes; None: there is none."""
        return self._unconfirmed.take(_is_idle)

    def gives_way_for_host(self, saddr: int) -> IpMasq | None:
        """Name the entry of an inside host that gives way to what the outside makes with it."""
        return self._unconfirmed.take(lambda ms: ms.saddr == saddr and _is_idle(ms))

    def gives_up_port(self, protocol: int, maddr: int, ends: Ends, now: float) -> IpMasq | None:
        """Name the entry whose port is free when it ends; None: there is none.

        That is a port of no other entry; or, where sessions of several inside endpoints share
        ports, of none but sessions with other outside endpoints than the new one's.
        """
        saddr, _, *outside = ends
        choice, hosts = self._choice, self._hosts
        shared = choice.shares_ports(protocol)
        held_by = hosts.entries_of if shared else hosts.ports_of
        fair = max(2 * held_by(saddr), FEW_PORTS)

        def is_due(ms: IpMasq) -> bool:
            if held_by(ms.saddr) > fair:
                return True
            asked_at = (ms.timer or now) - ms.timeout
            return len(choice.ports.ports) > FEW_PORTS and now - asked_at > PATIENCE

        def gives_up(ms: IpMasq) -> bool:
            is_alone = ms.m_link is None and ms.m_back is None
            of_use = is_alone or (shared and [ms.daddr, ms.dport] == outside)
            right_port = ms.protocol == protocol and ms.maddr == maddr and ms.mport in choice.ports
            return right_port and of_use and _is_idle(ms) and is_due(ms)

        return self._unanswered.take(gives_up)
