"""The tables of entries, compared with a model: a plain list of sessions, newest first.

After any sequence of operations, the reference counts, both tables with their chains and indexes,
the taken ports, the counts and the timers say what the list says. When all entries have expired,
nothing is left of them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from nfmasq.engine import (
    BEHAVIOURS,
    PORT_SELECTIONS,
    TCP,
    UDP,
    Flags,
    IpMasq,
    Masquerade,
    port_choice,
)
from nfmasq.engine.sessions import DUE_FOR_A_NEW
from nfmasq.engine.settings import WHEN_PORTS_RUN_OUT
from nfmasq.engine.table import ports, tables
from nfmasq.engine.table.endings import DELETED, FLUSHED
from nfmasq.engine.table.keys import inside_key, mapping_key, masquerade_key, session_key
from nfmasq.engine.table.roll import Roll
from nfmasq.engine.table.tables import Chains
from nfmasq.engine.table.timers import TICK
from tests.gateway import ended, masquerade_with
from tests.packets import destination, dotted, number, source, udp

EI, AD, APD = BEHAVIOURS

PORTS = range(61000, 61003)
ROOM = 12
FORWARDED_PORT = 8080  # outside the range
MADDRS = [number("203.0.113.1"), number("203.0.113.2")]
SADDRS = [number("10.0.0.2"), number("10.0.0.3")]
DADDRS = [number("198.51.100.7"), number("198.51.100.8")]
SPORTS, DPORTS = [1024, 1025], [53, 443]

ONE_OF_MADDRS, ONE_OF_SADDRS = st.sampled_from(MADDRS), st.sampled_from(SADDRS)
ONE_OF_SPORTS, ONE_OF_DPORTS = st.sampled_from(SPORTS), st.sampled_from(DPORTS)
ONE_OF_DADDRS = st.sampled_from(DADDRS)
PROTOCOLS = st.sampled_from([UDP, UDP, TCP])
MPORTS = st.sampled_from([*PORTS, FORWARDED_PORT])
WHICH = st.integers(0, 99)
OPEN_FLAGS = [Flags.NO_DADDR, Flags.NO_DPORT, Flags.NO_SPORT, Flags.DLOOSE, Flags.NO_REPLY]
FLAGS = st.one_of(st.just(0), st.sets(st.sampled_from(OPEN_FLAGS)).map(lambda f: int(sum(f))))

DADDR_PASS = Flags.NO_DADDR | Flags.DLOOSE
DPORT_PASS = Flags.NO_DPORT | Flags.DLOOSE
OPEN = DADDR_PASS | DPORT_PASS | Flags.NO_SPORT


@pytest.fixture(autouse=True, scope="module")
def _repeatable() -> Iterator[None]:
    """Draw ports from `random`, which hypothesis seeds, so that a failure can be repeated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ports, "_random", random)
        yield


@dataclass(eq=False)
class Session:
    """A session as the model knows it; `ms` is the entry that stands for it."""

    ms: IpMasq
    protocol: int
    maddr: int
    mport: int
    saddr: int
    sport: int
    daddr: int
    dport: int
    flags: int
    held: int = 0
    deadline: float | None = None
    control: Session | None = field(default=None, repr=False)

    @property
    def is_open(self) -> bool:
        return bool(self.flags & OPEN)

    def openness(self) -> tuple[bool, bool, bool]:
        """Rank sessions: what knows more of the outside endpoint is found first."""
        return self.is_open, bool(self.flags & DADDR_PASS), bool(self.flags & DPORT_PASS)

    def goes_to(self, daddr: int, dport: int) -> bool:
        return bool(
            (self.daddr == daddr or self.flags & DADDR_PASS)
            and (self.dport == dport or self.flags & DPORT_PASS)
        )


class Sessions(RuleBasedStateMachine):
    """Does each operation to the engine and to the model, and compares the two."""

    @initialize(
        mapping=st.sampled_from(BEHAVIOURS),
        selection=st.sampled_from([*PORT_SELECTIONS]),
        when_ports_run_out=st.sampled_from(WHEN_PORTS_RUN_OUT),
    )
    def start(self, mapping: str, selection: str, when_ports_run_out: str) -> None:
        # The model has no memory of searches in vain for a port to share.
        self.searching = mock.patch.object(port_choice, "SEARCH_AGAIN", 0.0)
        self.searching.start()
        self.masq = masquerade_with(
            ports=PORTS,
            mapping=mapping,
            filtering=APD,
            port_selection=selection,
            when_ports_run_out=when_ports_run_out,
            max_entries=ROOM,
            fast=False,
        )
        self.mapping = mapping
        self.shares = mapping == APD or when_ports_run_out == "overlap"
        self.holders: dict[tuple[int, int, int], tuple[int, int]] = {}
        self.now = 0.0
        self.alive: list[Session] = []
        self.all: list[Session] = []
        self.answered: set[Session] = set()

    # -- the model ------------------------------------------------------------------

    def known_first(self, sessions: list[Session]) -> list[Session]:
        return sorted(sessions, key=lambda s: s.is_open)

    def under_m(self, protocol: int, maddr: int, mport: int) -> list[Session]:
        key = (protocol, maddr, mport)
        return self.known_first([s for s in self.alive if (s.protocol, s.maddr, s.mport) == key])

    def under_s(self, protocol: int, saddr: int, sport: int) -> list[Session]:
        key = (protocol, saddr, sport)
        return self.known_first([s for s in self.alive if (s.protocol, s.saddr, s.sport) == key])

    def for_inbound(
        self, protocol: int, s_addr: int, s_port: int, d_addr: int, d_port: int
    ) -> Session | None:
        found = [s for s in self.under_m(protocol, d_addr, d_port) if s.goes_to(s_addr, s_port)]
        return min(found, key=Session.openness, default=None)

    def for_outbound(
        self, protocol: int, s_addr: int, s_port: int, d_addr: int, d_port: int
    ) -> Session | None:
        of_port = self.under_s(protocol, s_addr, s_port) if s_port else []
        of_host = [s for s in self.under_s(protocol, s_addr, 0) if s.flags & Flags.NO_SPORT]
        for candidates in (of_port, of_host):
            found = [s for s in candidates if s.goes_to(d_addr, d_port)]
            if found:
                return min(found, key=Session.openness)
        return None

    def mapped(self, protocol: int, maddr: int, saddr: int, sport: int, daddr: int) -> int | None:
        """Return the mport that the mapping prescribes; None where it prescribes none."""
        held = self.under_s(protocol, saddr, sport)
        if self.mapping == EI:
            held = [s for s in held if s.maddr == maddr]
        elif self.mapping == AD:
            held = [s for s in held if s.maddr == maddr and s.daddr == daddr and not s.is_open]
        else:
            held = []
        return held[0].mport if held else None

    def unused(self, protocol: int, maddr: int) -> set[int]:
        return {mport for mport in PORTS if not self.under_m(protocol, maddr, mport)}

    def usable(
        self,
        protocol: int,
        maddr: int,
        saddr: int,
        sport: int,
        daddr: int,
        dport: int,
        flags: int = 0,
    ) -> set[int]:
        """Return the mports from which the engine may choose for a new session."""
        mapped = self.mapped(protocol, maddr, saddr, sport, daddr)
        if mapped is not None and (
            self.may_have(protocol, maddr, mapped, (saddr, sport), daddr, dport, flags)
            or (not flags & OPEN and self.is_free_for(protocol, maddr, mapped, daddr, dport))
        ):
            return {mapped}
        unused = self.unused(protocol, maddr)
        if self.shares and not unused and not flags & OPEN:
            return {m for m in PORTS if self.is_free_for(protocol, maddr, m, daddr, dport)}
        return unused

    def is_free_for(self, protocol: int, maddr: int, mport: int, daddr: int, dport: int) -> bool:
        """Say whether no session on an mport would be taken for one with an outside endpoint."""
        return not self.has_session(protocol, maddr, mport, daddr, dport) and not self.has_open(
            protocol, maddr, mport
        )

    def has_session(self, protocol: int, maddr: int, mport: int, daddr: int, dport: int) -> bool:
        return any(
            (s.daddr, s.dport) == (daddr, dport) and not s.is_open
            for s in self.under_m(protocol, maddr, mport)
        )

    def has_open(self, protocol: int, maddr: int, mport: int) -> bool:
        return any(s.is_open for s in self.under_m(protocol, maddr, mport))

    def may_have(
        self,
        protocol: int,
        maddr: int,
        mport: int,
        endpoint: tuple[int, int],
        daddr: int,
        dport: int,
        flags: int,
    ) -> bool:
        """Say whether a session of an inside endpoint may have an mport that was asked for."""
        if not self.under_m(protocol, maddr, mport):
            return True
        is_open = flags & OPEN or self.has_open(protocol, maddr, mport)
        if not is_open and self.has_session(protocol, maddr, mport, daddr, dport):
            return False
        if not is_open and self.mapping == APD:
            return True
        return self.holders[protocol, maddr, mport] == endpoint

    def controlled_by(self, session: Session) -> list[Session]:
        return [s for s in self.alive if s.control is session]

    def pick(self, which: int) -> Session:
        return self.alive[which % len(self.alive)]

    def some_are_alive(self) -> bool:
        return bool(self.alive)

    def came_to_the_head(self, session: Session) -> None:
        self.leaves(session)
        self.enters(session)

    def enters(self, session: Session) -> None:
        """Put a session in front; if its mport is unused, its inside endpoint holds the mport."""
        self.alive.insert(0, session)
        endpoint = (session.saddr, session.sport)
        self.holders.setdefault((session.protocol, session.maddr, session.mport), endpoint)

    def leaves(self, session: Session) -> None:
        self.alive.remove(session)
        if not self.under_m(session.protocol, session.maddr, session.mport):
            del self.holders[session.protocol, session.maddr, session.mport]

    def used(self, session: Session) -> None:
        """Note that a session's entry was looked up and given back."""
        session.deadline = None if session.held else self.now + session.ms.timeout

    def is_gone(self, session: Session) -> None:
        session.deadline = session.control = None
        self.leaves(session)

    def added(
        self, ms: IpMasq | None, fields: tuple[int, ...], usable: Callable[[], set[int]]
    ) -> Session | None:
        """Judge the answer of ip_masq_new by the mports that may be had; returns the session.

        `usable` returns the mports that may be had when all that gave way is gone.
        """
        gave_way = self.some_gave_way(fields[0], fields[1])
        if ms is None:
            no_room = len(self.alive) >= ROOM and not any(map(self.may_give_way, self.alive))
            assert no_room or not usable()
            return None
        # The mport is chosen before the entry that gives way for its place has gone.
        protocol, maddr, _, _, daddr, dport, _ = fields
        shared = (
            gave_way and self.shares and self.is_free_for(protocol, maddr, ms.mport, daddr, dport)
        )
        assert shared or ms.mport in usable()
        assert len(self.alive) < ROOM
        protocol, maddr, saddr, sport, daddr, dport, flags = fields
        session = Session(ms, protocol, maddr, ms.mport, saddr, sport, daddr, dport, flags)
        self.enters(session)
        self.all.append(session)
        return session

    def some_gave_way(self, protocol: int, maddr: int) -> bool:
        """Judge which sessions ended to make room for a new one; a port and a place at most.

        Returns whether any has ended.

        Where the sweep lags, some that are due have ended before.
        """
        self.some_expired(most=2 * DUE_FOR_A_NEW)
        gone = [s for s in self.alive if not s.ms.flags & Flags.HASHED]
        for_port = [s for s in gone if (s.protocol, s.maddr) == (protocol, maddr)]
        assert len(gone) <= (len(self.alive) >= ROOM) + bool(for_port)
        for session in gone:
            assert self.may_give_way(session) or self.may_give_up_port(session)
            assert len(self.alive) >= ROOM or not self.unused(protocol, maddr)
        for session in gone:
            self.is_gone(session)
        return bool(gone)

    def some_expired(self, most: int) -> None:
        """Note which sessions that are due ended, or had their timer set again."""
        controlling = {s for s in self.alive if self.controlled_by(s)}
        due = [s for s in self.alive if s.deadline is not None and s.deadline <= self.now]
        gone = [s for s in due if not s.ms.flags & Flags.HASHED]
        assert len(gone) <= most
        for session in gone:
            self.is_gone(session)
        for session in due:
            if session in self.alive and session.deadline != session.ms.timer:
                assert session in controlling
                self.used(session)

    def may_give_way(self, session: Session) -> bool:
        """Say whether a session gives way in a full table: unanswered, or over."""
        unused = not session.held and not self.controlled_by(session)
        return unused and (bool(session.flags & Flags.NO_REPLY) or self.is_over(session))

    def is_over(self, session: Session) -> bool:
        """Say whether all questions of a session of DNS have their answers."""
        ms = session.ms
        is_dns = ms.state_name == "DNS" and session in self.answered
        return is_dns and 0 < ms.packets_out <= ms.packets_in

    def may_give_up_port(self, session: Session) -> bool:
        """Say whether a session gives up its port when there is none: UDP, idle for 2 minutes."""
        unused = not session.held and not self.controlled_by(session)
        idle = self.now - (session.deadline or self.now) + session.ms.timeout
        return unused and session.ms.state_name == "UDP" and idle > 120

    # -- made -----------------------------------------------------------------------

    @rule(
        protocol=PROTOCOLS,
        maddr=ONE_OF_MADDRS,
        mport=st.one_of(st.just(0), MPORTS),
        saddr=ONE_OF_SADDRS,
        sport=ONE_OF_SPORTS,
        daddr=ONE_OF_DADDRS,
        dport=ONE_OF_DPORTS,
        flags=FLAGS,
    )
    def new(
        self,
        protocol: int,
        maddr: int,
        mport: int,
        saddr: int,
        sport: int,
        daddr: int,
        dport: int,
        flags: int,
    ) -> None:
        sport = 0 if flags & Flags.NO_SPORT else sport
        daddr = 0 if flags & Flags.NO_DADDR else daddr
        dport = 0 if flags & Flags.NO_DPORT else dport

        def usable() -> set[int]:
            if not mport:
                return self.usable(protocol, maddr, saddr, sport, daddr, dport, made_with)
            may = self.may_have(protocol, maddr, mport, (saddr, sport), daddr, dport, made_with)
            return {mport} if may else set()

        made_with = flags
        ms = self.masq.sessions.ip_masq_new(
            protocol, maddr, mport, saddr, sport, daddr, dport, flags
        )
        flags |= Flags.MPORT if mport else 0
        fields = (protocol, maddr, saddr, sport, daddr, dport, flags)
        session = self.added(ms, fields, usable)
        if session is not None:
            session.held = 1

    # -- found and given back -------------------------------------------------------

    @rule(
        protocol=PROTOCOLS,
        saddr=ONE_OF_SADDRS,
        sport=st.sampled_from([0, *SPORTS]),
        daddr=ONE_OF_DADDRS,
        dport=ONE_OF_DPORTS,
    )
    def get_out(self, protocol: int, saddr: int, sport: int, daddr: int, dport: int) -> None:
        self.get(
            self.for_outbound(protocol, saddr, sport, daddr, dport),
            self.masq.sessions.ip_masq_out_get(protocol, saddr, sport, daddr, dport),
        )

    @rule(
        protocol=PROTOCOLS,
        daddr=ONE_OF_DADDRS,
        dport=ONE_OF_DPORTS,
        maddr=ONE_OF_MADDRS,
        mport=MPORTS,
    )
    def get_in(self, protocol: int, daddr: int, dport: int, maddr: int, mport: int) -> None:
        self.get(
            self.for_inbound(protocol, daddr, dport, maddr, mport),
            self.masq.sessions.ip_masq_in_get(protocol, daddr, dport, maddr, mport),
        )

    def get(self, expected: Session | None, ms: IpMasq | None) -> None:
        assert ms is (expected and expected.ms)
        if expected is not None:
            expected.held += 1
            expected.deadline = None

    @rule(protocol=PROTOCOLS, maddr=ONE_OF_MADDRS, mport=MPORTS)
    def get_by_m(self, protocol: int, maddr: int, mport: int) -> None:
        holders = self.under_m(protocol, maddr, mport)
        ms = self.masq.sessions.tables.ip_masq_getbym_unlocked(protocol, maddr, mport)
        assert ms is (holders[0].ms if holders else None)
        if ms is not None:
            assert ms.refcnt == 2 + holders[0].held + 1
            self.masq.sessions.tables.ip_masq_put_unlocked(ms)

    @precondition(lambda self: any(s.held for s in self.all))
    @rule(which=WHICH)
    def put(self, which: int) -> None:
        held = [s for s in self.all if s.held]
        session = held[which % len(held)]
        self.masq.sessions.ip_masq_put(session.ms)
        session.held -= 1
        if session in self.alive:
            self.used(session)

    # -- changed --------------------------------------------------------------------

    @precondition(some_are_alive)
    @rule(which=WHICH)
    def unhash_and_hash(self, which: int) -> None:
        session = self.pick(which)
        tables, ms = self.masq.sessions.tables, session.ms
        assert tables.ip_masq_hash(ms) == 0
        assert tables.ip_masq_unhash(ms) == 1
        assert ms.refcnt == session.held
        assert not ms.flags & Flags.HASHED
        assert tables.ip_masq_unhash(ms) == 0
        assert tables.ip_masq_hash(ms) == 1
        self.came_to_the_head(session)

    @precondition(some_are_alive)
    @rule(which=WHICH, maddr=ONE_OF_MADDRS)
    def move(self, which: int, maddr: int) -> None:
        self.moves(self.pick(which), maddr, lambda s: self.masq.sessions.ip_masq_move(s.ms, maddr))

    def moves(self, session: Session, maddr: int, move: Callable[[Session], object]) -> bool:
        """Judge what `move` does to an entry; says whether it found a port on the other address."""
        self.leaves(session)
        s = session
        mapped = self.mapped(s.protocol, maddr, s.saddr, s.sport, s.daddr)
        endpoint = (s.saddr, s.sport)
        has_moved = bool(move(session))
        self.some_gave_way(s.protocol, maddr)
        usable = self.usable(s.protocol, maddr, s.saddr, s.sport, s.daddr, s.dport, s.flags)
        if mapped is None and self.may_have(
            s.protocol, maddr, s.mport, endpoint, s.daddr, s.dport, s.flags
        ):
            usable = {s.mport}
        assert has_moved == bool(usable)
        if usable:
            assert session.ms.mport in usable
            session.maddr, session.mport = maddr, session.ms.mport
        self.enters(session)
        return bool(usable)

    @precondition(some_are_alive)
    @rule(which=WHICH, controller=WHICH)
    def control(self, which: int, controller: int) -> None:
        session, control = self.pick(which), self.pick(controller)
        above: Session | None = control
        while above is not None and above is not session:
            above = above.control
        if above is None:
            self.masq.sessions.ip_masq_control(session.ms, control.ms)
            session.control = control

    # -- packets --------------------------------------------------------------------

    @rule(
        maddr=ONE_OF_MADDRS,
        saddr=ONE_OF_SADDRS,
        sport=ONE_OF_SPORTS,
        daddr=ONE_OF_DADDRS,
        dport=ONE_OF_DPORTS,
    )
    def packet_from_inside(
        self, maddr: int, saddr: int, sport: int, daddr: int, dport: int
    ) -> None:
        packet = udp((dotted(saddr), sport), (dotted(daddr), dport))
        session = self.for_outbound(UDP, saddr, sport, daddr, dport)

        def sent(_: object = None) -> bytes | None:
            return self.masq.ip_fw_masquerade(packet, maddr, self.now)

        while session is not None and self.must_end(session, maddr):
            self.is_removed(session)
            session = self.for_outbound(UDP, saddr, sport, daddr, dport)
        if session is None:
            outcome = sent()
            ms = self.newest() if outcome is not None else None
            fields = (UDP, maddr, saddr, sport, daddr, dport, int(Flags.NO_REPLY))
            session = self.added(
                ms, fields, lambda: self.usable(UDP, maddr, saddr, sport, daddr, dport)
            )
            if session is None:
                return
        elif self.must_move(session, maddr):
            if not self.moves(session, maddr, sent):
                self.used(session)
                return
            outcome = None
        else:
            outcome = sent()
        if session.flags & Flags.NO_SPORT:
            session.sport = sport
            session.flags &= ~Flags.NO_SPORT
            self.came_to_the_head(session)
        self.complete(session, daddr, dport)
        self.used(session)
        if outcome is not None:
            assert source(outcome) == (dotted(session.maddr), session.mport)

    def must_move(self, session: Session, maddr: int) -> bool:
        """Say whether a session's packet may not leave by the session's own address."""
        control = session.control
        is_announced = control is not None and control.maddr == session.maddr
        return session.maddr != maddr and not is_announced

    def must_end(self, session: Session, maddr: int) -> bool:
        return self.must_move(session, maddr) and not session.flags & Flags.NO_REPLY

    @rule(daddr=ONE_OF_DADDRS, dport=ONE_OF_DPORTS, maddr=ONE_OF_MADDRS, mport=MPORTS)
    def packet_from_outside(self, daddr: int, dport: int, maddr: int, mport: int) -> None:
        packet = udp((dotted(daddr), dport), (dotted(maddr), mport))
        session = self.for_inbound(UDP, daddr, dport, maddr, mport)
        outcome = self.masq.ip_fw_demasquerade(packet, self.now)
        if session is None:
            assert outcome is packet
            return
        if session.flags & Flags.NO_SPORT:
            assert outcome is packet
            return
        assert outcome is not None
        assert destination(outcome) == (dotted(session.saddr), session.sport)
        if session.flags & Flags.NO_REPLY:
            session.flags &= ~Flags.NO_REPLY
            self.answered.add(session)
        self.complete(session, daddr, dport)
        self.used(session)

    def complete(self, session: Session, daddr: int, dport: int) -> None:
        if session.flags & (Flags.NO_DADDR | Flags.NO_DPORT):
            session.flags &= ~(Flags.NO_DADDR | Flags.NO_DPORT)
            session.daddr, session.dport = daddr, dport
            self.came_to_the_head(session)
        elif session.flags & Flags.DLOOSE:
            session.daddr, session.dport = daddr, dport

    def newest(self) -> IpMasq:
        known = {s.ms for s in self.all}
        (ms,) = (ms for ms in self.masq.sessions.entries() if ms not in known)
        return ms

    # -- ended ----------------------------------------------------------------------

    @rule(
        seconds=st.sampled_from([0.1, 30.0, 130.0, 299.9, 301.0, 2000.0]), limit=st.integers(1, 5)
    )
    def time_passes(self, seconds: float, limit: int) -> None:
        self.now += seconds
        while self.sweep(limit):
            pass
        assert all(s.deadline is None or s.deadline > self.now - TICK for s in self.alive)

    @rule(seconds=st.sampled_from([0.1, 301.0]), limit=st.integers(1, 2))
    def time_passes_and_the_sweep_lags(self, seconds: float, limit: int) -> None:
        self.now += seconds
        self.sweep(limit)

    def sweep(self, limit: int) -> bool:
        more = self.masq.sweep(self.now, limit)
        self.some_expired(most=limit)
        for session in self.alive:
            assert session.ms.flags & Flags.HASHED
            assert session.control is None or session.control in self.alive
        return more

    @precondition(some_are_alive)
    @rule(which=WHICH)
    def remove(self, which: int) -> None:
        session = self.pick(which)
        assert self.masq.sessions.remove(session.ms, DELETED)
        assert not self.masq.sessions.remove(session.ms, DELETED)
        self.is_removed(session)

    def is_removed(self, session: Session) -> None:
        for controlled in self.controlled_by(session):
            self.is_removed(controlled)
        self.is_gone(session)

    @rule()
    def flush(self) -> None:
        sessions = self.masq.sessions
        assert sum(sessions.remove(ms, FLUSHED) for ms in sessions.entries()) == len(self.alive)
        for session in list(self.alive):
            self.is_gone(session)

    # -- what is true after each step -------------------------------------------------

    @invariant()
    def references_are_those_of_the_tables_and_of_the_users(self) -> None:
        for session in self.all:
            tables = 2 if session in self.alive else 0
            assert session.ms.refcnt == tables + session.held

    @invariant()
    def entries_are_as_they_were_made_and_completed(self) -> None:
        for s in self.alive:
            ms = s.ms
            assert (ms.protocol, ms.maddr, ms.mport) == (s.protocol, s.maddr, s.mport)
            assert (ms.saddr, ms.sport, ms.daddr, ms.dport) == (s.saddr, s.sport, s.daddr, s.dport)
            assert ms.flags == s.flags | Flags.HASHED
            assert ms.control is (s.control and s.control.ms)
            assert ms.n_control == len(self.controlled_by(s))

    @invariant()
    def both_tables_have_each_entry_in_its_chain(self) -> None:
        tables = self.masq.sessions.tables
        known = [s.ms for s in self.alive if not s.is_open]
        assert linked(tables.m_table, "m_back") == by(masquerade_key, known)
        assert linked(tables.s_table, "s_back") == by(mapping_key, known)

    @invariant()
    def open_ended_entries_are_kept_by_what_is_known(self) -> None:
        kept = self.masq.sessions.tables.open_ended
        are_open = [s.ms for s in self.alive if s.is_open]
        for entries, key in (
            (kept.by_m, masquerade_key),
            (kept.by_s, inside_key),
            (kept.by_mapping, mapping_key),
        ):
            newest_last = {
                k: list(pile) if isinstance(pile, dict) else [pile]
                for k, pile in entries.piles.items()
            }
            assert newest_last == {k: v[::-1] for k, v in by(key, are_open).items()}

    @invariant()
    def the_indexes_have_the_newest_entry_of_each_session(self) -> None:
        known = [s for s in reversed(self.alive) if not s.is_open]
        for protocol in (TCP, UDP):
            mine = [s for s in known if s.protocol == protocol]
            inward = {session_key(s.daddr, s.maddr, s.dport, s.mport): s.ms for s in mine}
            outward = {session_key(s.saddr, s.daddr, s.sport, s.dport): s.ms for s in mine}
            assert self.masq.sessions.tables.in_index[protocol] == inward
            assert self.masq.sessions.tables.out_index[protocol] == outward

    @invariant()
    def a_port_is_taken_as_long_as_an_entry_has_it(self) -> None:
        for protocol in (TCP, UDP):
            per_address = []
            for maddr in MADDRS:
                unused = self.unused(protocol, maddr)
                for mport in PORTS:
                    assert self.masq.sessions.choice.ports.unused(protocol, maddr, mport) == (
                        mport in unused
                    )
                if len(unused) < len(PORTS):
                    per_address.append(len(unused))
            free = sum(per_address) if per_address else len(PORTS)
            assert self.masq.sessions.ports_free(protocol) == free

    @invariant()
    def entries_are_counted(self) -> None:
        counts = Counter(s.protocol for s in self.alive)
        assert all(
            self.masq.sessions.entry_count(protocol) == counts[protocol] for protocol in (TCP, UDP)
        )
        over = Counter(
            s.protocol
            for s in self.alive
            if s.ms.state_name == "DNS" and not s.flags & Flags.NO_REPLY
        )
        assert self.masq.sessions.over_counts() == {"tcp": 0, "udp": over[UDP], "icmp": 0}
        assert Counter(self.masq.sessions.entries()) == Counter(s.ms for s in self.alive)

    @invariant()
    def a_timer_runs_unless_its_entry_is_in_use(self) -> None:
        for s in self.alive:
            assert s.ms.timer == s.deadline
            assert (s.deadline is None) == bool(s.held)
            if s.deadline is not None:
                slot = s.ms.slot
                assert slot is not None
                comes_up = self.masq.sessions.wheel.tick_of(slot) * TICK
                assert comes_up <= max(s.deadline + TICK, self.now)

    def teardown(self) -> None:
        """Give back and let expire every entry; nothing must be left of any."""
        if not hasattr(self, "masq"):
            return
        self.searching.stop()
        for session in self.all:
            while session.held:
                self.masq.sessions.ip_masq_put(session.ms)
                session.held -= 1
        for _ in range(ROOM + 1):  # a controller expires after what it controls, step by step
            self.now += 10_000
            while self.masq.sweep(self.now, 3):
                pass
        tables, ports = self.masq.sessions.tables, self.masq.sessions.choice.ports
        assert not any(self.masq.sessions._dictionaries())
        assert not tables.open_ended
        assert not tables._in_namesakes
        assert not tables._out_namesakes
        assert not ports._taken
        assert all(slot.t_link is slot for slot in self.masq.sessions.wheel._slots)
        assert self.masq.sessions.entries() == []
        for protocol in (TCP, UDP):
            assert self.masq.sessions.entry_count(protocol) == 0
            assert self.masq.sessions.ports_free(protocol) == len(PORTS)
        for session in self.all:
            ms = session.ms
            assert (ms.refcnt, ms.n_control, ms.control, ms.timer, ms.slot) == (
                0,
                0,
                None,
                None,
                None,
            )
            assert ms.m_link is ms.m_back is ms.s_link is ms.s_back is None


def by(key: Callable[[IpMasq], int], entries: list[IpMasq]) -> dict[int, list[IpMasq]]:
    """Group entries by their key."""
    grouped: dict[int, list[IpMasq]] = {}
    for ms in entries:
        grouped.setdefault(key(ms), []).append(ms)
    return grouped


def linked(chains: Chains, back: str) -> dict[int, list[IpMasq]]:
    """Read all chains forwards, and make sure that they are the same backwards."""
    read = {key: list(chains.chain(key)) for key in chains.heads}
    for chain in read.values():
        backwards, ms = [], chain[-1]
        while ms is not None:
            backwards.append(ms)
            ms = getattr(ms, back)
        assert backwards == chain[::-1]
    return read


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# -- single points of the design ------------------------------------------------------

UDP_SESSION = (SADDRS[0], SPORTS[0], DADDRS[0], DPORTS[0])


def made(masq: Masquerade, flags: int = 0, mport: int = 0) -> IpMasq:
    ms = masq.sessions.ip_masq_new(UDP, MADDRS[0], mport, *UDP_SESSION, flags)
    assert ms is not None
    return ms


CHANGES = st.lists(st.tuples(st.booleans(), st.sampled_from([*DADDRS, MADDRS[0]]), WHICH))


@given(CHANGES, st.integers(2, 6), st.integers(0, 40))
def test_a_chain_answers_as_a_walk_does_however_long_it_is(
    changes: list[tuple[bool, int, int]], long: int, asked_from: int
) -> None:
    chains, timeouts = Chains("m_link", "m_back"), [1.0] * 20
    walk: list[IpMasq] = []
    with mock.patch.object(tables, "LONG", long):
        for number_of, (joins, daddr, which) in enumerate(changes):
            if joins or not walk:
                walk.insert(0, IpMasq(UDP, 1, 2, 3, 4, daddr, 5, 0, timeouts))
                chains.insert(7, walk[0])
            else:
                assert chains.remove(7, walk.pop(which % len(walk))) == (not walk)
            assert list(chains.chain(7)) == walk
            if number_of >= asked_from:
                for asked in DADDRS:
                    newest = next((ms for ms in walk if ms.daddr == asked), None)
                    assert chains.newest_with(7, asked) is newest


def test_a_chain_has_its_index_before_it_is_so_long_that_to_make_one_would_be_felt() -> None:
    masq = Masquerade()
    endpoint, maddr = ("10.0.0.2", 4000), MADDRS[0]
    for peer in range(tables.LONG):
        masq.ip_fw_masquerade(udp(endpoint, (dotted(DADDRS[0] + peer), 53)), maddr, 0.0)
    (key,) = masq.sessions.tables.m_table.heads
    assert masq.sessions.tables.m_table._indexed == {key}


def test_a_mport_asked_for_is_flagged() -> None:
    assert made(Masquerade(), mport=FORWARDED_PORT).flags & Flags.MPORT
    assert not made(Masquerade()).flags & Flags.MPORT


def test_an_entry_that_controls_another_outlives_it() -> None:
    masq = Masquerade()
    control = made(masq)
    data = masq.sessions.ip_masq_new(TCP, MADDRS[0], 0, *UDP_SESSION, 0)
    assert data is not None
    masq.sessions.ip_masq_control(data, control)
    masq.sessions.ip_masq_put(control)
    masq.sessions.ip_masq_put(data)
    masq.sweep(1000, 10)
    assert masq.sessions.entry_count(UDP) == 1
    masq.sweep(2000, 10)  # the controlled entry expires; the controller's timer was set again
    assert masq.sessions.entry_count(TCP) == 0
    masq.sweep(2500, 10)
    assert masq.sessions.entry_count(UDP) == 0


def test_an_entry_let_go_by_a_program_while_its_timer_fires_goes_once() -> None:
    """The packet path may set the timer of an entry that has just been removed."""
    masq = Masquerade()
    ms = made(masq)
    masq.sessions.ip_masq_put(ms)
    masq.sessions.remove(ms, DELETED)
    ms.timer = 10.0
    masq.sweep(1000, 10)
    assert masq.sessions.entry_count(UDP) == 0
    assert ended(masq) == {DELETED: 1}


def test_what_an_entry_controls_ends_with_it_without_a_walk_through_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def walk(*_: object) -> None:
        raise AssertionError("the table is walked")

    masq = Masquerade()
    flags = int(Flags.NO_DADDR | Flags.NO_DPORT)
    control, *controlled = (made(masq, flags) for _ in range(4))
    for ms in controlled[:2]:
        assert masq.sessions.ip_masq_control(ms, control)
    assert masq.sessions.ip_masq_control(controlled[2], controlled[1])
    monkeypatch.setattr(Roll, "walk", walk)
    assert masq.sessions.remove(control, DELETED) == 4
    assert ended(masq) == {DELETED: 4}
    assert masq.sessions.entry_count(UDP) == 0
