"""Who makes room: how many entries there are, and which entry gives way to a new entry.

Room is made first by what is over: a TCP connection that both sides have closed, or that was reset,
and a question of DNS or a ping that has its answer. An entry of this kind waits only for its
timeout. Then room is made by entries that only one side has a part in so far. A TCP connection that
the inside begins is of this kind until the inside has acknowledged the server's number: a server
answers anybody. The entries of hosts that have not shown that they are there go first, since their
addresses may be forged (`table/limits.py`). Of each kind the oldest goes first.

Established sessions never give way, with an exception: an answered UDP session of a host that may
be forged gives way to a session of a host that is there. An entry that the inside makes is given
the place of an unanswered entry, whoever made the unanswered entry. Entries that the outside makes
fill half of the table at most; beyond this they only give way to each other. So whoever floods a
port from the outside takes nothing from the inside but what nobody has answered.

A port is made free in the same manner, when there is no free port left. Beside the sessions that
are over, it is a port of a host that holds far more ports than the host that wants it; or of a
session that has waited for its answer in vain; or of a host that may be forged (`port_claim.py`).
Of several that may go, a session of the host that holds most ports of the protocol goes.

A port of a session that is over goes to a new session if nobody can take the two for each other
(`port_reuse.py`), as long as there is any other port.

Nothing is ended here. An entry that is picked is no candidate any more, and whoever has it picked
(`Sessions`) ends it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from nfmasq.engine.port_choice import MOST_SEARCHED, SEARCH_AGAIN, Ends, Outside, PortChoice
from nfmasq.engine.port_claim import PortClaim
from nfmasq.engine.port_reuse import PortReuse, is_settled
from nfmasq.engine.table.entry import (
    CACHED,
    NO_REPLY,
    OUTSIDE,
    OUTSIDE_WAITS,
    UNCONFIRMED,
    UNSETTLED,
    IpMasq,
)
from nfmasq.engine.table.limits import InsideHosts
from nfmasq.engine.table.line import Line
from nfmasq.engine.table.states import EXCHANGES, OVER, STATE_UDP
from nfmasq.engine.table.tables import Tables, is_in_use
from nfmasq.engine.wire.protocols import TCP, UDP

_COMPARED = 16
"""How many sessions that wait are compared to find a session of the host that has most ports. A
flood makes a search for each of its packets, and a host that has nearly all ports is among them."""


def _is_idle(ms: IpMasq) -> bool:
    """Say whether nobody but the tables holds an entry, and the entry controls no other."""
    return not is_in_use(ms) and not ms.n_control


def _is_counted_as_over(ms: IpMasq) -> bool:
    return ms.state in OVER or (ms.state in EXCHANGES and not ms.flags & (NO_REPLY | OUTSIDE))


def _is_unconfirmed(ms: IpMasq) -> bool:
    """Say whether the outside, which made the entry, has not shown that it gets the answers.

    A server answers anybody, and the false senders of a flood never see what it answers.
    """
    return ms.flags & UNCONFIRMED > 0


def gives_way_at_once(ms: IpMasq) -> bool:
    """Say whether an entry's session is over, and nobody needs the entry."""
    if ms.state in OVER:
        return _is_idle(ms)
    answered = 0 < ms.packets_out <= ms.packets_in
    return answered and ms.state in EXCHANGES and _is_idle(ms)


def _leave_line(ms: IpMasq) -> None:
    if ms.line is not None:
        ms.line.leave(ms)


def _join(line: Line, ms: IpMasq) -> None:
    """Put an entry at the end of a line, and take it out of the line in which it stands."""
    _leave_line(ms)
    line.join(ms)


class Room:
    """Counts the entries, and knows which of them may give way."""

    def __init__(
        self, tables: Tables, hosts: InsideHosts, choice: PortChoice, reuse: PortReuse
    ) -> None:
        self._tables = tables
        self._hosts = hosts
        self._choice = choice
        self._reuse = reuse
        self.max_entries = 0
        # When the flow of an entry was last used in a flow cache: `CachedFlows.last_used`.
        self.last_used: Callable[[IpMasq], float] = lambda ms: 0.0
        self.begin_anew()

    def begin_anew(self) -> None:
        """Count no entries, and forget who may give way."""
        self.entries = 0
        self._from_outside = 0
        self._by_protocol: dict[int, int] = defaultdict(int)
        self._over_by_protocol: dict[int, int] = defaultdict(int)
        self._over: dict[int, Line] = defaultdict(Line)
        # By whether the host of the entry was genuine when the entry was made.
        self._unanswered = {True: Line(), False: Line()}
        self._unconfirmed = Line(_is_unconfirmed)
        self._answered_udp = Line()
        # By protocol, masquerade address, and whether the host was genuine: how many ports a host
        # held that searched in vain for a port that is given up, and until when nobody like it
        # searches.
        self._in_vain: dict[tuple[int, int, bool], tuple[int, float]] = {}
        # By what was searched for over TCP: until when nobody searches for the port of a session
        # that is over, since there was none among those that were looked at.
        self._none_over: dict[tuple[int, int, Outside | None, bool, int | None], float] = {}

    def entered(self, ms: IpMasq) -> None:
        """Count a new entry, which may give way until it is answered or confirmed."""
        self._by_protocol[ms.protocol] += 1
        self.entries += 1
        if ms.flags & OUTSIDE:
            self._from_outside += 1
            self._unconfirmed.join(ms)
        elif ms.flags & NO_REPLY:
            self._joins_the_unanswered(ms)
        elif _is_counted_as_over(ms):
            self._over_by_protocol[ms.protocol] += 1

    def is_all_there_is(self) -> None:
        """Note that memory does not suffice for more entries: a new entry takes another's place.

        So it stays until there are other settings.
        """
        self.max_entries = max(1, min(self.max_entries, self.entries * 7 // 8))

    def answered(self, ms: IpMasq) -> None:
        """Note that the first packet came back for an entry.

        Where the inside has begun a TCP connection: that the inside has acknowledged it.
        """
        if ms.line in self._unanswered.values():
            _leave_line(ms)
        if ms.state in EXCHANGES:
            self._over_by_protocol[ms.protocol] += 1
            self._joins_the_over(ms)
        elif ms.state == STATE_UDP:
            _join(self._answered_udp, ms)

    def changed(self, ms: IpMasq) -> None:
        """Note that an entry's connection is over, or is over no more."""
        if ms.state in OVER:
            self._over_by_protocol[ms.protocol] += 1
            self._joins_the_over(ms)
        else:
            self._over_by_protocol[ms.protocol] -= 1
            _leave_line(ms)
            if ms.flags & UNSETTLED:
                self._joins_the_unanswered(ms)
            if self._hosts.are_limited:
                self._hosts.is_open_again(ms)

    def _joins_the_unanswered(self, ms: IpMasq) -> None:
        self._unanswered[self._hosts.is_genuine(ms.saddr)].join(ms)

    def _joins_the_over(self, ms: IpMasq) -> None:
        _join(self._over[ms.protocol], ms)
        if self._none_over and ms.protocol == TCP and not ms.flags & OUTSIDE_WAITS:
            self._none_over.clear()
        if self._hosts.are_limited:
            self._hosts.is_over(ms)

    def left(self, ms: IpMasq) -> None:
        """Stop counting an entry that has left the tables."""
        _leave_line(ms)
        self._by_protocol[ms.protocol] -= 1
        self.entries -= 1
        self._from_outside -= ms.flags & OUTSIDE > 0
        if _is_counted_as_over(ms):
            self._over_by_protocol[ms.protocol] -= 1

    def of_protocol(self, protocol: int) -> int:
        """Return how many entries of a protocol number there are."""
        return self._by_protocol[protocol]

    def over_of(self, protocol: int) -> int:
        """Return how many entries of a protocol number are over, or have been answered so far."""
        return self._over_by_protocol[protocol]

    def by_protocol(self) -> list[tuple[int, int]]:
        """List protocol numbers with how many entries of each there are."""
        return list(self._by_protocol.items())

    @property
    def is_full_from_outside(self) -> bool:
        """Whether the entries that the outside made have their half of the table."""
        return self._from_outside * 2 >= self.max_entries

    def gives_way(self, saddr: int) -> IpMasq | None:
        """Pick the entry that gives way to any entry of an inside host; None: there is none."""
        is_genuine = self._hosts.is_genuine

        def may_be_forged(ms: IpMasq) -> bool:
            return _is_idle(ms) and not is_genuine(ms.saddr)

        return (
            self._over_of_any_protocol(gives_way_at_once)
            or self._unanswered[False].take(may_be_forged)
            or self._unanswered[True].take(_is_idle)
            or self._unanswered[False].take(_is_idle)
            or self._unconfirmed.take(_is_idle)
            or (self._answered_udp.take(may_be_forged) if is_genuine(saddr) else None)
        )

    def gives_way_to_outside(self) -> IpMasq | None:
        """Pick the entry that gives way to an entry that the outside makes; None: there is none."""

        def is_over(ms: IpMasq) -> bool:
            return ms.flags & OUTSIDE > 0 and gives_way_at_once(ms)

        return self._over_of_any_protocol(is_over) or self._unconfirmed.take(_is_idle)

    def gives_way_for_host(self, saddr: int) -> IpMasq | None:
        """Pick a host's entry that gives way to an entry that the outside makes with the host.

        None where there is none.
        """

        def is_over(ms: IpMasq) -> bool:
            return ms.flags & OUTSIDE > 0 and gives_way_at_once(ms)

        return self._over_of_host(saddr, is_over) or self._unconfirmed.take(
            lambda ms: ms.saddr == saddr and _is_idle(ms)
        )

    def gives_way_to_its_host(self, saddr: int) -> IpMasq | None:
        """Pick a host's entry that gives way to another entry of the host; None: there is none."""
        return self._over_of_host(saddr, gives_way_at_once)

    def is_over_on_port(
        self,
        protocol: int,
        maddr: int,
        now: float,
        outside: Outside | None = None,
        saddr: int | None = None,
        settled: bool = True,
        own: int | None = None,
    ) -> IpMasq | None:
        """Pick the entry whose session is over and whose mport is free when it ends; or None.

        With `outside`, this endpoint does not take a new session for the entry's session. With
        `saddr`, it is an entry of this inside host. With `settled`, nothing more is to come for the
        entry's session (`port_reuse.py`), unless it is a session of the inside host `own`.
        """

        def frees_port(ms: IpMasq) -> bool:
            return (
                ms.protocol == protocol
                and ms.maddr == maddr
                and ms.mport in self._choice.ports
                and gives_way_at_once(ms)
                and not (outside and self._reuse.would_mix_up(ms, outside))
                and (not settled or ms.saddr == own or self._is_settled(ms, now))
                and self._tables.is_alone_on_mport(ms)
            )

        if saddr is not None:
            return self._over_of_host(saddr, frees_port)
        search = protocol, maddr, outside, settled, own
        if self._none_over.get(search, 0.0) > now:
            return None
        over = self._over[protocol].take(frees_port)
        if over is None and protocol == TCP and settled:
            if len(self._none_over) >= MOST_SEARCHED:
                self._none_over.clear()
            self._none_over[search] = now + SEARCH_AGAIN
        return over

    def leaves_outside_free(self, ms: IpMasq, now: float) -> bool:
        """Say whether a session is over, and its outside endpoint takes another from its port."""
        if ms.flags & OUTSIDE_WAITS or not gives_way_at_once(ms):
            return False
        return self._is_settled(ms, now)

    def _is_settled(self, ms: IpMasq, now: float) -> bool:
        return is_settled(ms, self._seconds_idle(ms, now))

    def gives_up_port(self, protocol: int, maddr: int, ends: Ends, now: float) -> IpMasq | None:
        """Pick the entry whose mport the new session can have when the entry ends, or None.

        Either no other entry has the mport. Or sessions of several inside endpoints share mports,
        and the entry is the mport's session with the outside endpoint of the new session. An mport
        from which that endpoint remembers a connection is given up last (`port_reuse.py`).
        """
        claim = PortClaim(
            protocol, maddr, ends, self._choice, self._hosts, lambda ms: self._seconds_idle(ms, now)
        )
        if self._is_in_vain(protocol, maddr, claim, now):
            return None

        def is_of_use(ms: IpMasq) -> bool:
            if not (claim.is_on_right_port(ms) and _is_idle(ms)):
                return False
            if not (claim.may_share(ms) or self._tables.is_alone_on_mport(ms)):
                return False
            if self._reuse.would_mix_up(ms, ends[2:]):
                passed_over.append(ms)
                return takes_any
            return True

        def unanswered(ms: IpMasq) -> bool:
            return claim.takes_unanswered(ms) and is_of_use(ms)

        def answered(ms: IpMasq) -> bool:
            return claim.takes_answered(ms) and is_of_use(ms)

        def search() -> IpMasq | None:
            return (
                self._unanswered[False].take_most(unanswered, claim.rank, _COMPARED)
                or self._unanswered[True].take_most(unanswered, claim.rank, _COMPARED)
                or (self._answered_udp.take_most(answered, claim.rank) if protocol == UDP else None)
            )

        passed_over: list[IpMasq] = []
        takes_any = False
        given_up = search()
        if given_up is None and passed_over:
            takes_any = True
            given_up = search()
        if given_up is None and claim.may_be_in_vain:
            kind = protocol, maddr, claim.is_genuine
            self._in_vain[kind] = claim.held, now + SEARCH_AGAIN
        return given_up

    def _is_in_vain(self, protocol: int, maddr: int, claim: PortClaim, now: float) -> bool:
        """Say whether a host that holds no more ports has just searched in vain for another's.

        A flood must not cause a search for each of its packets, be it of one host or of many.
        """
        kind = protocol, maddr, claim.is_genuine
        least, until = self._in_vain.get(kind, (0, now))
        return now < until and claim.held >= least and claim.may_be_in_vain

    def _seconds_idle(self, ms: IpMasq, now: float) -> float:
        """Return how long ago the last packet came that restarted an entry's timer."""
        idle = now - ((ms.timer or now) - ms.timeout)
        return min(idle, now - self.last_used(ms)) if ms.flags & CACHED else idle

    def _over_of_any_protocol(self, wanted: Callable[[IpMasq], bool]) -> IpMasq | None:
        taken = (line.take(wanted) for line in self._over.values())
        return next((ms for ms in taken if ms is not None), None)

    def _over_of_host(self, saddr: int, wanted: Callable[[IpMasq], bool]) -> IpMasq | None:
        ms = self._hosts.first_over(saddr, wanted)
        if ms is not None:
            _leave_line(ms)
        return ms
