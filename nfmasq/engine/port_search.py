"""The search for the mport of a new session: a free mport, or one for which another session ends.

From what is in nobody's way to what somebody may feel:

1. the mport that the mapping gives, or a free mport (`port_choice.py`);
2. the mport of a session that is over, where nobody can take the two for each other
   (`port_reuse.py`);
3. the mport of a session that gives it up (`port_claim.py`);
4. an mport of another inside endpoint, which serves both, where the settings allow it;
5. the mport of any TCP connection that is over.

Where the mapping lets mports serve several inside endpoints anyway, 4 comes before 3.
"""

from __future__ import annotations

from collections.abc import Callable

from nfmasq.engine.counters import Counters
from nfmasq.engine.port_choice import Ends, Outside, PortChoice
from nfmasq.engine.port_claim import FEW_PORTS
from nfmasq.engine.room import Room
from nfmasq.engine.table.endings import CLOSED, EVICTED
from nfmasq.engine.table.entry import OPEN_ENDED, IpMasq
from nfmasq.engine.table.limits import InsideHosts
from nfmasq.engine.wire.protocols import PROTOCOLS, TCP, row


class PortSearch:
    """Finds mports. The caller holds the lock; `now` is the time in seconds.

    `end` ends an entry for a reason, or returns False where the packet in hand has the entry.
    """

    def __init__(
        self,
        choice: PortChoice,
        room: Room,
        hosts: InsideHosts,
        counters: Counters,
        end: Callable[[IpMasq, str], bool],
    ) -> None:
        self._choice = choice
        self._room = room
        self._hosts = hosts
        self._counters = counters
        self._end = end

    def find(
        self, proto: int, maddr: int, mport: int, ends: Ends, mflags: int, now: float
    ) -> int | None:
        """Return the mport for a session with the flags `mflags`, or None; another may end for it.

        `mport` is the mport that was asked for, or 0.
        """
        if mport:
            may_use = self._choice.may_use(proto, maddr, mport, ends, mflags)
            return mport if may_use else None
        chosen = self._choice.choose(proto, maddr, ends, mflags)
        if chosen is not None or proto not in PROTOCOLS:
            return chosen
        at_its_limit = not self._hosts.may_take_port(ends[0])
        owner = ends[0] if at_its_limit else None
        chosen = self.of_what_is_over(proto, maddr, now, outside=ends[2:], saddr=owner)
        if chosen is not None:
            return chosen
        if self._choice.mapping_shares_ports(proto):
            chosen = self._shared(proto, maddr, ends, mflags, now)
        if chosen is None and not at_its_limit:
            chosen = self._given_up(proto, maddr, ends, mflags, now)
            if chosen is None and self._choice.shares_ports(proto):
                chosen = self._shared(proto, maddr, ends, mflags, now)
        if chosen is None and proto == TCP:
            has_many = self._hosts.ports_of_protocol(proto, ends[0]) > FEW_PORTS
            chosen = self.of_what_is_over(
                proto, maddr, now, saddr=owner, settled=has_many, own=ends[0]
            )
        return chosen

    def of_what_is_over(
        self,
        proto: int,
        maddr: int,
        now: float,
        outside: Outside | None = None,
        saddr: int | None = None,
        settled: bool = True,
        own: int | None = None,
    ) -> int | None:
        """End a session that is over for its mport, which is free then; None: there is none.

        `outside` is the outside endpoint of the new session, where it matters. With `saddr` the
        session is of this inside host, with `settled` nothing more is to come for it, unless it is
        of the inside host `own`.
        """
        over = self._room.is_over_on_port(proto, maddr, now, outside, saddr, settled, own)
        if over is None or not self._end(over, CLOSED):
            return None
        return over.mport

    def _given_up(self, proto: int, maddr: int, ends: Ends, mflags: int, now: float) -> int | None:
        given_up = self._room.gives_up_port(proto, maddr, ends, now)
        if given_up is None or not self._end(given_up, EVICTED):
            return None
        mport = given_up.mport
        if self._choice.may_use(proto, maddr, mport, ends, mflags):
            return mport
        return mport if self._choice.may_be_guest(proto, maddr, mport, ends, mflags) else None

    def _shared(self, proto: int, maddr: int, ends: Ends, mflags: int, now: float) -> int | None:
        if mflags & OPEN_ENDED:
            return None
        found = self._choice.shared(
            proto, maddr, ends, now, lambda ms: self._room.leaves_outside_free(ms, now)
        )
        if found is None:
            return None
        mport, in_the_way = found
        if in_the_way is not None and not self._end(in_the_way, CLOSED):
            return None
        self._counters.overlapping[row(proto)] += 1
        return mport
