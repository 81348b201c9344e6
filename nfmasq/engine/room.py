"""Who makes room: how many entries there are, and which entry gives way to a new entry.

Room is made by entries that only one side has a part in so far, the oldest first
(`table/unanswered.py`). Established sessions never give way. An entry that the inside makes is
given the place of an unanswered entry, whoever made the unanswered entry. Entries that the outside
makes fill half of the table at most; beyond this they only give way to each other. So whoever
floods a port from the outside takes nothing from the inside but what nobody has answered.

A port is made free in the same manner, when there is no free port left. It is a port of a host that
holds far more ports than the host that wants it, or of a session that has waited for its answer in
vain. The waiting sessions are for a flood from many addresses, of which none holds many ports.

Nothing is ended here. An entry that is picked is no candidate any more, and whoever has it picked
(`Sessions`) ends it.
"""

from __future__ import annotations

from collections import Counter

from nfmasq.engine.port_choice import Ends, PortChoice
from nfmasq.engine.table.entry import NO_REPLY, OUTSIDE, IpMasq
from nfmasq.engine.table.limits import InsideHosts
from nfmasq.engine.table.tables import TABLE_REFERENCES
from nfmasq.engine.table.unanswered import Unanswered

FEW_PORTS = 64
"""A host that holds this many ports or fewer gives no port up to another host, unless PATIENCE is
over."""

PATIENCE = 10.0
"""Seconds without an answer, after which a session gives up its port when no port is left."""


def _is_idle(ms: IpMasq) -> bool:
    """Say whether nobody but the tables holds an entry, and the entry controls no other."""
    return ms.refcnt == TABLE_REFERENCES and not ms.n_control


class Room:
    """Counts the entries, and knows which of them may give way."""

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
        """Count a new entry, which may give way until it is answered or confirmed."""
        self._by_protocol[ms.protocol] += 1
        self.entries += 1
        if ms.flags & OUTSIDE:
            self._from_outside += 1
            self._unconfirmed.join(ms, self._from_outside)
        elif ms.flags & NO_REPLY:
            self._unanswered.join(ms, self.entries)

    def left(self, ms: IpMasq) -> None:
        """Stop counting an entry that has left the tables."""
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
        """Whether the entries that the outside made have their half of the table."""
        return self._from_outside * 2 >= self.max_entries

    def gives_way(self) -> IpMasq | None:
        """Pick the entry that gives way to any other entry; None where there is none."""
        return self._unanswered.take(_is_idle) or self._unconfirmed.take(_is_idle)

    def gives_way_to_outside(self) -> IpMasq | None:
        """Pick the entry that gives way to an entry that the outside makes; None: there is none."""
        return self._unconfirmed.take(_is_idle)

    def gives_way_for_host(self, saddr: int) -> IpMasq | None:
        """Pick a host's entry that gives way to an entry that the outside makes with the host.

        None where there is none.
        """
        return self._unconfirmed.take(lambda ms: ms.saddr == saddr and _is_idle(ms))

    def gives_up_port(self, protocol: int, maddr: int, ends: Ends, now: float) -> IpMasq | None:
        """Pick the entry whose mport the new session can have when the entry ends, or None.

        Either no other entry has the mport. Or sessions of several inside endpoints share mports,
        and the entry is the mport's session with the outside endpoint of the new session.
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
