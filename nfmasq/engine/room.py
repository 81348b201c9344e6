"""Who makes room: how many entries there are, and which entry gives way to a new entry.

Room is made first by what is over: a TCP connection that both sides have closed, or that was reset,
and a question of DNS or a ping that has its answer. An entry of this kind waits only for its
timeout. Then room is made by entries that only one side has a part in so far. Of each kind the
oldest goes first. Established sessions never give way. An entry that the inside makes is given the
place of an unanswered entry, whoever made the unanswered entry. Entries that the outside makes fill
half of the table at most; beyond this they only give way to each other. So whoever floods a port
from the outside takes nothing from the inside but what nobody has answered.

A port is made free in the same manner, when there is no free port left. Beside the sessions that
are over, it is a port of a host that holds far more ports than the host that wants it; or of a
session that has waited for its answer in vain; or of a UDP session that has been idle for longer
than RFC 4787 protects it. Of several that may go, a session of the host that holds most ports of
the protocol goes. The waiting sessions are for a flood from many addresses, of which none holds
many ports.

Nothing is ended here. An entry that is picked is no candidate any more, and whoever has it picked
(`Sessions`) ends it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from nfmasq.engine.port_choice import Ends, PortChoice
from nfmasq.engine.table.entry import CACHED, NO_REPLY, OUTSIDE, UNCONFIRMED, IpMasq
from nfmasq.engine.table.limits import InsideHosts
from nfmasq.engine.table.line import Line
from nfmasq.engine.table.states import EXCHANGES, OVER, STATE_UDP
from nfmasq.engine.table.tables import Tables, is_in_use
from nfmasq.engine.wire.protocols import UDP

FEW_PORTS = 64
"""A host that holds this many ports or fewer gives no port up to another host, unless PATIENCE is
over."""

PATIENCE = 10.0
"""Seconds without an answer, after which a session gives up its port when no port is left."""

PROTECTED = 120.0
"""Seconds without a packet for which an answered UDP session keeps its port, whatever happens (RFC
4787 REQ-5)."""


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

    def __init__(self, tables: Tables, hosts: InsideHosts, choice: PortChoice) -> None:
        self._tables = tables
        self._hosts = hosts
        self._choice = choice
        self.max_entries = 0
        self.entries = 0
        self._from_outside = 0
        self._by_protocol: dict[int, int] = defaultdict(int)
        self._over_by_protocol: dict[int, int] = defaultdict(int)
        self._over: dict[int, Line] = defaultdict(Line)
        self._unanswered = Line()
        self._unconfirmed = Line(_is_unconfirmed)
        self._answered_udp = Line()
        # When the flow of an entry was last used in a flow cache: `CachedFlows.last_used`.
        self.last_used: Callable[[IpMasq], float] = lambda ms: 0.0

    def entered(self, ms: IpMasq) -> None:
        """Count a new entry, which may give way until it is answered or confirmed."""
        self._by_protocol[ms.protocol] += 1
        self.entries += 1
        if ms.flags & OUTSIDE:
            self._from_outside += 1
            self._unconfirmed.join(ms)
        elif ms.flags & NO_REPLY:
            self._unanswered.join(ms)
        elif _is_counted_as_over(ms):
            self._over_by_protocol[ms.protocol] += 1

    def answered(self, ms: IpMasq) -> None:
        """Note that the first packet came back for an entry."""
        if ms.line is self._unanswered:
            self._unanswered.leave(ms)
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
            if self._hosts.are_limited:
                self._hosts.is_open_again(ms)

    def _joins_the_over(self, ms: IpMasq) -> None:
        _join(self._over[ms.protocol], ms)
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

    def gives_way(self) -> IpMasq | None:
        """Pick the entry that gives way to any other entry; None where there is none."""
        return (
            self._over_of_any_protocol(gives_way_at_once)
            or self._unanswered.take(_is_idle)
            or self._unconfirmed.take(_is_idle)
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

    def is_over_on_port(self, protocol: int, maddr: int, saddr: int | None = None) -> IpMasq | None:
        """Pick the entry whose session is over and whose mport is free when it ends; or None.

        It is an entry of the inside host `saddr`, if that is given.
        """
        ports = self._choice.ports

        def frees_port(ms: IpMasq) -> bool:
            is_right = ms.maddr == maddr and ms.mport in ports and gives_way_at_once(ms)
            return is_right and self._tables.is_alone_on_mport(ms)

        if saddr is None:
            return self._over[protocol].take(frees_port)
        return self._over_of_host(saddr, lambda ms: ms.protocol == protocol and frees_port(ms))

    def gives_up_port(self, protocol: int, maddr: int, ends: Ends, now: float) -> IpMasq | None:
        """Pick the entry whose mport the new session can have when the entry ends, or None.

        Either no other entry has the mport. Or sessions of several inside endpoints share mports,
        and the entry is the mport's session with the outside endpoint of the new session.
        """
        saddr, _, *outside = ends
        choice, hosts = self._choice, self._hosts
        shared = choice.shares_ports(protocol)

        def held_by(host: int) -> int:
            if choice.mapping_shares_ports(protocol):
                return hosts.entries_of(host)
            return hosts.ports_of_protocol(protocol, host)

        fair = max(2 * held_by(saddr), FEW_PORTS)

        def is_due(ms: IpMasq) -> bool:
            if held_by(ms.saddr) > fair:
                return True
            return len(choice.ports.ports) > FEW_PORTS and self._seconds_idle(ms, now) > PATIENCE

        def is_of_use(ms: IpMasq) -> bool:
            right_port = ms.protocol == protocol and ms.maddr == maddr and ms.mport in choice.ports
            with_same = shared and [ms.daddr, ms.dport] == outside
            return right_port and _is_idle(ms) and (with_same or self._tables.is_alone_on_mport(ms))

        def rank(ms: IpMasq) -> int:
            return held_by(ms.saddr)

        given_up = self._unanswered.take_most(lambda ms: is_of_use(ms) and is_due(ms), rank)
        if given_up is None and protocol == UDP:
            given_up = self._answered_udp.take_most(
                lambda ms: is_of_use(ms) and self._seconds_idle(ms, now) > PROTECTED, rank
            )
        return given_up

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
