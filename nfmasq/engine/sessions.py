"""The life of an entry: made, found and used, given back, ended. All of it happens here.

Whoever gets an entry holds a reference to it, and the entry's timer stands still. Whoever gives
back the last reference, except those of the tables, starts the timer with the entry's timeout. When
the timer fires the entry expires, unless it is in use or controls another entry. A helper may have
the timer fire later: `keep` says until when its entry is to live, whatever the timeout.

Entries begin, change and end through these methods and in no other way. So this is where they are
counted, and where watchers are told of them (`watch.py`). Other parts say which entry: the search
for its port (`port_search.py`), which entry makes room (`room.py`), what the inside and the outside
may begin (`outbound.py`, `inbound.py`).

A method that makes, changes or ends an entry takes the lock itself, unless it says that the caller
holds it. Counts can be read without the lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from nfmasq.engine.cached import CachedFlows, Usage
from nfmasq.engine.counters import Account, Counters
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.helper.app import Apps
from nfmasq.engine.helper.helpers import Helpers
from nfmasq.engine.port_choice import PortChoice
from nfmasq.engine.port_reuse import PortReuse
from nfmasq.engine.port_search import PortSearch
from nfmasq.engine.room import Room, gives_way_at_once
from nfmasq.engine.settings import Settings
from nfmasq.engine.table.endings import CLOSED, EVICTED, EXPIRED, FLUSHED, HELPER, SERVER
from nfmasq.engine.table.entry import (
    CACHED,
    DLOOSE,
    HALF_OPEN,
    HASHED,
    MPORT,
    NO_DADDR,
    NO_DPORT,
    NO_REPLY,
    NO_SPORT,
    OPEN_ENDED,
    OUTSIDE,
    OUTSIDE_WAITS,
    OWN,
    UNCONFIRMED,
    IpMasq,
    Server,
)
from nfmasq.engine.table.hand import Hand
from nfmasq.engine.table.limits import InsideHosts
from nfmasq.engine.table.memory import compact
from nfmasq.engine.table.newest import Newest
from nfmasq.engine.table.numbers import EVENTS, confirms, note, state_after
from nfmasq.engine.table.remains import Remains
from nfmasq.engine.table.roll import Roll
from nfmasq.engine.table.states import (
    CLOSE_WAIT,
    ESTABLISHED,
    NONE,
    OVER,
    STATE_ICMP,
    STATE_OF_SERVICE,
    STATE_OTHER,
    STATE_UDP,
    STATES,
    SYN_SENT,
    TIME_WAIT,
)
from nfmasq.engine.table.tables import Tables, is_in_use
from nfmasq.engine.table.timeouts import TimeoutTable
from nfmasq.engine.table.timers import TimingWheel
from nfmasq.engine.watch import Identity, Watch
from nfmasq.engine.wire.header import FiveTuple, five_tuple
from nfmasq.engine.wire.protocols import ACK, ICMP, OTHER, PROTOCOLS, ROWS, RST, SYN, TCP, UDP, row
from nfmasq.engine.wire.segment import Segment, read_segment

_IS_OVER = [state in OVER for state in range(len(STATES))]
_FIRST_STATE = {TCP: NONE, UDP: STATE_UDP, ICMP: STATE_ICMP}

WALK = 64
"""How many entries a walk takes at a time, with the lock held: a few microseconds of work."""

CONTROLLED_AT_ONCE = 16
"""How many of the entries that an entry controls end in one step with it."""

DUE_FOR_A_NEW = 2
"""How many entries that are due end for each new entry, where the sweep is late."""

CLEARED_AT_ONCE = 4
"""How many entries that a flush has left are taken apart, for each that the sweep may look at."""

CLEARED_FOR_A_NEW = 2
"""How many entries that a flush has left are taken apart for each new entry: what is left and what
is new have no more memory together than the full table had."""

_PORTS = tuple(range(65536))
"""An object for each port number. Entries share them, since a port stands in very many entries.
They are made before all entries: an object that outlives the entries beside it keeps their memory.
"""

Lock = AbstractContextManager[Any]


class Sessions:
    """All entries of one masquerade, with their ports and timers.

    `now` is the time of the packet or the sweep in hand, in seconds. `lock` must be reentrant where
    it is a real lock.
    """

    def __init__(
        self, settings: Settings, apps: Apps, forwards: Forwards, lock: Lock | None = None
    ) -> None:
        self.lock: Lock = lock or nullcontext()
        self.now = 0.0
        self.watch = Watch()
        self.counters = Counters()
        self.hosts = InsideHosts()
        self.tables = Tables(self._port_taken, self._port_free, self._withdraw)
        self.reuse = PortReuse()
        self.choice = PortChoice(self.tables, self.hosts, self.reuse, settings)
        self.room = Room(self.tables, self.hosts, self.choice, self.reuse)
        self.ports = PortSearch(
            self.choice, self.room, self.hosts, self.counters, self._end_unless_in_hand
        )
        self.roll = Roll()
        self.hand = Hand()
        self.cached = CachedFlows(self.tables)
        self.watch.subscribe(self.cached)
        self.room.last_used = self.cached.last_used
        self.wheel: TimingWheel[IpMasq] = TimingWheel()
        self.helpers = Helpers(self)
        self.forwards = Forwards()
        self.timeout_table: TimeoutTable = []
        # By controlling entry: the entries it controls.
        self._controlled: Newest[IpMasq] = Newest()
        # Entries that have ended before all that they control, and why: the sweep ends the rest.
        self._ended_before: deque[tuple[IpMasq, str]] = deque()
        # By entry that a helper keeps: until when the entry is to live, packets or not.
        self._kept_until: dict[IpMasq, float] = {}
        self._to_compact: Iterator[dict[Any, Any]] = iter(())
        self._remains = Remains()
        self.configure(settings, apps, forwards)

    def configure(self, settings: Settings, apps: Apps, forwards: Forwards) -> None:
        """Use other settings, helpers and forwards from now on; no entry is lost by it.

        Entries keep their ports and servers, and get new timeouts with their next state;
        `ip_masq_retime` gives an entry its new timeout at once. `forwards` go on from the forwards
        that were in force.
        """
        with self.lock:
            forwards.go_on_from(self.forwards)
            self.forwards = forwards
            self.helpers.apps = apps
            self.cached.inbound_refresh = settings.inbound_refresh
            self.cached.after = settings.flow_cache_after
            # In place, for every entry refers to this list.
            self.timeout_table[:] = settings.timeouts.table()
            self.room.max_entries = settings.max_entries
            self.hosts.limit(
                settings.max_entries_per_host,
                settings.max_ports_per_host,
                settings.max_new_per_host,
            )
            self.choice.configure(settings, forwards)

    # -- made ------------------------------------------------------------------

    def ip_masq_new(
        self,
        proto: int,
        maddr: int,
        mport: int,
        saddr: int,
        sport: int,
        daddr: int,
        dport: int,
        mflags: int,
        server: Server | None = None,
    ) -> IpMasq | None:
        """Make an entry, hashed, with a reference for the caller; None, counted, if it cannot be.

        With an mport of 0 an mport is chosen; `port_choice.py` says which, and which mport may be
        given. For a protocol without ports all three ports are 0, and only one session can be had
        with each outside address; a call of PPTP has other numbers in the place of ports
        (`helper/calls.py`). When the table is full, an entry that nothing came back for makes room.
        `server` is the inside server that counts the entry; not given, it is the server that leaves
        by the mport.
        """
        with self.lock:
            ends = saddr, sport, daddr, dport
            chosen = None
            if not (mflags & OWN or self._has_room_for_entry(saddr)):
                refusal = "host_entries"
            elif (chosen := self.ports.find(proto, maddr, mport, ends, mflags, self.now)) is None:
                refusal = self.choice.why_none(proto, saddr)
            elif not self.make_room(saddr):
                refusal = "no_room"
                chosen = None
            if chosen is None:
                self.refuse(FiveTuple(proto, *ends), refusal)
                return None
            state = STATE_OF_SERVICE.get((proto, dport)) or _FIRST_STATE.get(proto, STATE_OTHER)
            mflags |= MPORT if mport else 0
            server = server or self._server_on(proto, maddr, chosen, saddr, sport)
            ms = self.make(proto, maddr, chosen, *ends, mflags, state, server)
            ms.refcnt += 1
            try:
                if not mflags & OWN:
                    self.helpers.bind(ms)
            except Exception:
                self.tables.ip_masq_put_unlocked(ms)
                self.remove(ms, HELPER)
                raise
            return ms

    def _server_on(
        self, proto: int, maddr: int, mport: int, saddr: int, sport: int
    ) -> Server | None:
        """Return the server whose sessions leave by a forwarded port, by its endpoint; or None."""
        leaves_by = self.forwards.leaves_by(proto, maddr, saddr, sport)
        return leaves_by[1] if leaves_by is not None and leaves_by[0] == mport else None

    def make(
        self,
        proto: int,
        maddr: int,
        mport: int,
        saddr: int,
        sport: int,
        daddr: int,
        dport: int,
        mflags: int,
        state: int,
        server: Server | None = None,
    ) -> IpMasq:
        """Make an entry that nothing is against: hash it, count it, and tell the watchers.

        The caller holds the lock.
        """
        ms = IpMasq(
            proto,
            maddr,
            _PORTS[mport],
            saddr,
            _PORTS[sport],
            daddr,
            _PORTS[dport],
            mflags,
            self.timeout_table,
            state,
        )
        if self._remains:
            self._clear_away(CLEARED_FOR_A_NEW)
        if server is not None:
            ms.server = server
            server.entered(state)
        try:
            self.tables.ip_masq_hash(ms)
        except MemoryError:
            self.room.is_all_there_is()
            raise
        self.hosts.entered(ms, self.now)
        self.room.entered(ms)
        self.roll.join(ms)
        self.counters.created[PROTOCOLS.get(proto, OTHER)] += 1
        for tell in self.watch.made:
            tell(ms)
        return ms

    def get_next_mport(self) -> int:
        """Return the next port of the range, whether it is taken or not."""
        with self.lock:
            return self.choice.ports.get_next_mport()

    def make_room(self, saddr: int) -> bool:
        """End an entry where an inside host has no room for another; return whether it has now.

        Where the sweep is late, some of the entries that are due end first: under a flood what is
        due must not pile up. The caller holds the lock.
        """
        room = self.room
        if self.now > self.wheel.late_from:
            self._expire(DUE_FOR_A_NEW)
        return room.entries < room.max_entries or self._evict(room.gives_way(saddr))

    def make_room_from_outside(self, saddr: int) -> bool:
        """End an entry where the outside has no room to make an entry with an inside host.

        Returns whether there is room now. The caller holds the lock.
        """
        if self.room.is_full_from_outside:
            has_room = self._evict(self.room.gives_way_to_outside())
        else:
            has_room = self.make_room(saddr)
        if not has_room or self.hosts.may_be_given_entry(saddr):
            return has_room
        return self._evict(self.room.gives_way_for_host(saddr))

    def _has_room_for_entry(self, saddr: int) -> bool:
        """End an entry of a host that has as many as it may have; return whether there is room."""
        may_have = self.hosts.may_have_entry(saddr)
        return may_have or self._evict(self.room.gives_way_to_its_host(saddr))

    def _evict(self, ms: IpMasq | None) -> bool:
        if ms is None:
            return False
        return self._end_unless_in_hand(ms, CLOSED if gives_way_at_once(ms) else EVICTED)

    # -- found and used, given back ---------------------------------------------

    def ip_masq_out_get(
        self, protocol: int, s_addr: int, s_port: int, d_addr: int, d_port: int
    ) -> IpMasq | None:
        """Find the entry of a packet from the inside, or None; give it back with ip_masq_put."""
        with self.lock:
            ms = self.tables.ip_masq_out_get_unlocked(protocol, s_addr, s_port, d_addr, d_port)
            if ms is not None:
                self.wheel.stop(ms)
            return ms

    def ip_masq_in_get(
        self, protocol: int, s_addr: int, s_port: int, d_addr: int, d_port: int
    ) -> IpMasq | None:
        """Find the entry of a packet from the outside, or None; give it back with ip_masq_put."""
        with self.lock:
            ms = self.tables.ip_masq_in_get_unlocked(protocol, s_addr, s_port, d_addr, d_port)
            if ms is not None:
                self.wheel.stop(ms)
            return ms

    def ip_masq_put(self, ms: IpMasq) -> None:
        """Give a reference back; when only the tables' are left, start the timer again."""
        with self.lock:
            self.tables.ip_masq_put_unlocked(ms)
            if ms.flags & HASHED and not is_in_use(ms):
                self._start_timer(ms, self.now)

    def give_back(self, ms: IpMasq, refreshed: bool) -> None:
        """Give a reference back; unless `refreshed`, the timer goes on as it was.

        The caller holds the lock.
        """
        if refreshed or ms.timer is None:
            self.ip_masq_put(ms)
        else:
            self.tables.ip_masq_put_unlocked(ms)

    def take_back(self, ms: IpMasq, before: Identity | None, made: bool) -> None:
        """Give back the reference of a packet that is refused, which changes nothing.

        An entry that the packet has `made` ends. Any other entry gets back the identity that it had
        `before`; None: it has it still. The caller holds the lock.
        """
        self.tables.ip_masq_put_unlocked(ms)
        if made:
            self.remove(ms, HELPER)
        elif before is not None and ms.flags & HASHED and before != Identity.of(ms):
            self._become(ms, before)

    def _become(self, ms: IpMasq, identity: Identity) -> None:
        """Have the tables know an entry by the values that it had a moment ago."""
        after = Identity.of(ms)
        self._withdraw(ms)
        self.tables.ip_masq_unhash(ms)
        _, ms.maddr, ms.mport, ms.saddr, ms.sport, ms.daddr, ms.dport, left_open = identity
        ms.flags = ms.flags & ~OPEN_ENDED | left_open
        if (ms.maddr, ms.mport) != (after.maddr, after.mport):
            self._count_with_server(ms)
        self.tables.ip_masq_hash(ms)
        self._tell_moved(ms, after)

    def _start_timer(self, ms: IpMasq, now: float) -> None:
        self.wheel.set(ms, now, max(ms.timeout, self._kept_until.get(ms, now) - now))

    # -- changed -------------------------------------------------------------------

    def ip_masq_enter(self, ms: IpMasq, state: int, now: float) -> None:
        """Put an entry in a state; its timer starts again with the state's timeout."""
        with self.lock:
            if ms.flags & HASHED:
                if ms.flags & CACHED:
                    self._withdraw(ms)
                before, ms.state = ms.state, state
                ms.timeout = ms.timeout_table[state]
                # As a rule nobody needs to know, and the call is saved.
                is_over_or_opens = _IS_OVER[state] is not _IS_OVER[before]
                if is_over_or_opens or ms.server is not None or self.watch.changed:
                    self._changed(ms, before)
                if ms in self._kept_until:
                    self._start_timer(ms, now)
                else:
                    self.wheel.set(ms, now, ms.timeout)

    def ip_masq_may_enter(self, ms: IpMasq, state: int, ack: int | None, now: float) -> bool:
        """Say whether a segment from the inside leads to a state of TCP; count it if it does not.

        `ack` is its ACK number. A half open connection is established by the acknowledgement of the
        outside's SYN alone. By this the inside host shows that it is there: whoever forges its
        address does not see the number.
        """
        if state != ESTABLISHED or not ms.flags & HALF_OPEN:
            return True
        if ack is None or ack != ms.awaited:
            self.counters.unbelieved["out"] += 1
            return False
        with self.lock:
            if ms.flags & HASHED:
                ms.flags &= ~HALF_OPEN
                ms.awaited = None
                self.room.answered(ms)
                self.hosts.is_there(ms.saddr, now)
        return True

    def enter(self, ms: IpMasq, state: int) -> None:
        """Put an entry in a state and give it the state's timeout; the timer goes on as it was.

        An entry that is in the state already keeps its timeout. The caller holds the lock.
        """
        before = ms.state
        if state != before:
            self._withdraw(ms)
            ms.state = state
            ms.timeout = ms.timeout_table[state]
            self._changed(ms, before)

    def ip_masq_segment(
        self, ms: IpMasq, packet: bytes, outbound: bool, now: float, refreshes: bool
    ) -> None:
        """Have an entry follow a segment that is no plain ACK, and its timer with it.

        `packet` is the packet as it came, without IP options. `refreshes` tells whether packets
        restart the timer where they change no state.
        """
        with self.lock:
            segment = read_segment(packet, 20)
            state = self._judged(ms, segment, outbound, now)
            if state is None:
                return
            if state != ms.state:
                self.ip_masq_enter(ms, state, now)
            elif refreshes and not segment.flags & RST:
                ms.timer = now + ms.timeout

    def follow(self, ms: IpMasq, segment: Segment, outbound: bool) -> bool:
        """Have an entry follow a segment, but for its timer; false where the segment does not fit.

        The segment's numbers are as its sender counts, and its ACK number as its receiver counts.
        The caller holds the lock.
        """
        state = self._judged(ms, segment, outbound, self.now)
        if state is None:
            return False
        self.enter(ms, state)
        return True

    def _judged(self, ms: IpMasq, segment: Segment, outbound: bool, now: float) -> int | None:
        """Return the state that a segment leads to; None, counted, where it does not fit.

        What the segment says is noted (`table/numbers.py`).
        """
        is_plain = segment.flags & EVENTS == ACK
        if ms.flags & CACHED and not is_plain:
            self.cached.catch_up(ms)
        state = state_after(ms, segment, outbound)
        if state is None:
            self.counters.unbelieved["out" if outbound else "in"] += 1
            if segment.flags & (SYN | ACK | RST) == SYN:
                ms.offered = outbound, segment.seq
            return None
        if outbound and not self.ip_masq_may_enter(ms, state, segment.ack, now):
            return None
        # What the cache has seen is older than this segment, and must not be noted after it.
        self._withdraw(ms)
        if not outbound:
            if segment.flags & SYN and ms.flags & HALF_OPEN:
                ms.awaited = segment.seq + 1 & 0xFFFFFFFF
            self.ip_masq_heard(ms, segment.ack)
        note(ms, segment, outbound)
        return state

    def _withdraw(self, ms: IpMasq) -> None:
        """Have a flow cache give a flow back, before something happens to its entry."""
        if ms.flags & CACHED:
            for tell in self.watch.withdrawn:
                tell(ms)

    def _changed(self, ms: IpMasq, before: int) -> None:
        """Count an entry by its new state and tell the watchers, if the state is another."""
        state = ms.state
        if state == before:
            return
        if _IS_OVER[state] is not _IS_OVER[before]:
            ms.flags &= ~OUTSIDE_WAITS
            if before == CLOSE_WAIT and state == TIME_WAIT:
                ms.flags |= OUTSIDE_WAITS
            if state == SYN_SENT and not ms.flags & OWN:
                ms.flags |= HALF_OPEN
                ms.awaited = None
            self.room.changed(ms)
        if ms.server is not None:
            ms.server.left(before)
            ms.server.entered(state)
        for tell in self.watch.changed:
            tell(ms, before)

    def ip_masq_replied(self, ms: IpMasq) -> None:
        """Note that something came back for an entry."""
        with self.lock:
            if ms.flags & (HASHED | NO_REPLY) == HASHED | NO_REPLY:
                ms.flags &= ~NO_REPLY
                if not ms.flags & HALF_OPEN:
                    self.room.answered(ms)
                for tell in self.watch.answered:
                    tell(ms)

    def ip_masq_heard(self, ms: IpMasq, ack: int | None = None) -> None:
        """Note that a packet came from the outside for an entry, over TCP with an ACK number.

        The outside confirms an entry that it has made: over TCP by the number of what the inside
        has sent, over UDP by going on after an answer, for which anybody could wait.
        """
        with self.lock:
            if ms.flags & UNCONFIRMED and (
                ms.packets_out > 0 if ms.protocol != TCP else ack is not None and confirms(ms, ack)
            ):
                ms.flags &= ~UNCONFIRMED
            self.ip_masq_replied(ms)

    def ip_masq_refresh(self, ms: IpMasq, now: float) -> None:
        """Start an entry's timer anew."""
        with self.lock:
            if ms.flags & HASHED:
                self._start_timer(ms, now)

    def ip_masq_retime(self, ms: IpMasq, now: float) -> None:
        """Give an entry the timeout that its state has by now.

        A shorter timeout counts from now on, a longer one from the entry's next packet on.
        """
        with self.lock:
            if not ms.flags & HASHED:
                return
            self._withdraw(ms)
            before = ms.timeout
            ms.timeout = ms.timeout_table[ms.state]
            if ms.timeout < before:
                self._mend_timer(ms, now)

    def ip_masq_keep(self, ms: IpMasq, until: float) -> None:
        """Have an entry live until a time at least, packets or not; a time that is past: no more.

        The timer goes on as it was, with another end.
        """
        with self.lock:
            if not ms.flags & HASHED:
                return
            if until > self.now:
                self._kept_until[ms] = until
            else:
                self._kept_until.pop(ms, None)
            self._mend_timer(ms, self.now)

    def _mend_timer(self, ms: IpMasq, now: float) -> None:
        """Have a timer that runs end as the entry's timeout, and who keeps the entry, say now."""
        timer = ms.timer
        if timer is None:
            return
        kept = self._kept_until.get(ms, now) - now
        # A packet may set the timer by the new timeout at this moment, and the wheel would take it
        # that the entry stands in a slot in time.
        self.wheel.stop(ms)
        self.wheel.set(ms, now, max(0.0, kept, min(timer - now, ms.timeout)))

    def ip_masq_move(self, ms: IpMasq, maddr: int) -> bool:
        """Put an entry on another masquerade address; false, and counted, where it gets no port.

        The entry keeps its mport where it can have the mport on the new address, unless the mapping
        gives its inside endpoint another mport there.
        """
        with self.lock:
            before = Identity.of(ms)
            self._withdraw(ms)
            self.tables.ip_masq_unhash(ms)
            try:
                mport = self._mport_on(maddr, ms)
                if mport is not None:
                    ms.maddr, ms.mport = maddr, mport
                    self._count_with_server(ms)
            finally:
                self.tables.ip_masq_hash(ms)
            if mport is not None:
                self._tell_moved(ms, before)
            return mport is not None

    def _mport_on(self, maddr: int, ms: IpMasq) -> int | None:
        """Return the mport for an entry, out of the tables, on another masquerade address; or None,
        counted."""
        protocol, ends = ms.protocol, (ms.saddr, ms.sport, ms.daddr, ms.dport)
        is_mapped = self.choice.mapped(protocol, maddr, *ends[:3]) is not None
        may_keep = not is_mapped and ms.server is None
        if may_keep and self.choice.may_use(protocol, maddr, ms.mport, ends, ms.flags):
            return ms.mport
        mport = self.ports.find(protocol, maddr, 0, ends, ms.flags, self.now)
        if mport is None:
            self.refuse(FiveTuple(protocol, *ends), self.choice.why_none(protocol, ms.saddr))
        return mport

    def _count_with_server(self, ms: IpMasq) -> None:
        server = self._server_on(ms.protocol, ms.maddr, ms.mport, ms.saddr, ms.sport)
        if ms.server is not None:
            ms.server.left(ms.state)
        if server is not None:
            server.entered(ms.state)
        ms.server = server

    def ip_masq_follow_forward(self, ms: IpMasq) -> None:
        """Put an entry on the forwarded port that its inside endpoint leaves by now.

        An entry that something came back for stays on its port, which is known outside. But a UDP
        session that a server began ends where the port is its no more: from now on the outside's
        packets may go to another server, or to nobody.
        """
        with self.lock:
            is_servers_own = ms.server is not None and not ms.flags & OUTSIDE
            if is_servers_own and ms.protocol == UDP and self.forwards.gives_up(ms):
                self.remove(ms, SERVER)
            if ms.flags & (HASHED | NO_REPLY | OPEN_ENDED) != HASHED | NO_REPLY:
                return
            ends = ms.saddr, ms.sport, ms.daddr, ms.dport
            leaves_by = self.forwards.leaves_by(ms.protocol, ms.maddr, *ends[:2])
            if leaves_by is None or leaves_by[0] == ms.mport:
                return
            if self.choice.may_use(ms.protocol, ms.maddr, leaves_by[0], ends, ms.flags):
                self.ip_masq_move(ms, ms.maddr)

    def learn_source_port(self, ms: IpMasq, sport: int) -> None:
        """Fill in the inside port that an entry leaves open."""
        with self.lock:
            before = Identity.of(ms)
            self.tables.ip_masq_unhash(ms)
            ms.sport = sport
            ms.flags &= ~NO_SPORT
            self.tables.ip_masq_hash(ms)
            self._tell_moved(ms, before)

    def learn_destination(self, ms: IpMasq, daddr: int, dport: int) -> None:
        """Fill in the outside endpoint that an entry leaves open, or note the newest (DLOOSE)."""
        if not ms.flags & (NO_DADDR | NO_DPORT | DLOOSE):
            return
        with self.lock:
            before = Identity.of(ms)
            if ms.flags & (NO_DADDR | NO_DPORT):
                self.tables.ip_masq_unhash(ms)
                ms.daddr, ms.dport = daddr, dport
                ms.flags &= ~(NO_DADDR | NO_DPORT)
                self.tables.ip_masq_hash(ms)
            else:
                ms.daddr, ms.dport = daddr, dport
            if before != Identity.of(ms):
                self._tell_moved(ms, before)

    def _tell_moved(self, ms: IpMasq, before: Identity) -> None:
        for tell in self.watch.moved:
            tell(ms, before)

    def ip_masq_helped(self, ms: IpMasq) -> None:
        """Tell the watchers that a helper was bound to an entry, or begins anew with it.

        The caller holds the lock.
        """
        self._withdraw(ms)
        for tell in self.watch.helped:
            tell(ms)

    def ip_masq_control(self, ms: IpMasq, control: IpMasq) -> bool:
        """Let `control` control `ms`: `control` will not expire before `ms` does.

        False, and nothing is changed, where one of them is gone, or both are the same entry.
        """
        with self.lock:
            if ms is control or not ms.flags & control.flags & HASHED:
                return False
            self._let_go_of_controller(ms)
            ms.control = control
            control.n_control += 1
            self._controlled.add(control, ms)
            return True

    def _let_go_of_controller(self, ms: IpMasq) -> None:
        control = ms.control
        if control is not None:
            ms.control = None
            control.n_control -= 1
            self._controlled.remove(control, ms)

    # -- ended -------------------------------------------------------------------

    def masq_expire(self, ms: IpMasq) -> None:
        """End an entry whose timer has fired, or start the timer again where the entry is needed.

        An entry is needed while it is in use or controls another. Where packets of its flow have
        passed in a flow cache, its timer counts from the newest of them.
        """
        with self.lock:
            if not ms.flags & HASHED:
                return
            if ms.flags & CACHED:
                left = self.cached.last_used(ms) + ms.timeout - self.now
                if left > 0:
                    self.wheel.set(ms, self.now, left)
                    return
            reason = CLOSED if ms.state in OVER else EXPIRED
            is_needed = is_in_use(ms) or ms.n_control
            if is_needed or not self._end_unless_in_hand(ms, reason):
                self._start_timer(ms, self.now)

    def sweep(self, now: float, limit: int) -> bool:
        """Expire what is due, looking at `limit` entries at most; true where more is due."""
        with self.lock:
            self.now = now
            self._end_more_controlled(limit)
            more = self._expire(limit)
            self.hosts.forget(now, limit)
            more = self.reuse.forget(now, limit) or more
            if not more and self._remains:
                self._clear_away(limit * CLEARED_AT_ONCE)
            elif not more:
                self._compact_next()
            return more or bool(self._ended_before or self._remains)

    def _expire(self, limit: int) -> bool:
        fired, more = self.wheel.fired(self.now, limit)
        try:
            while fired:
                self.masq_expire(fired.pop())
        finally:
            for ms in fired:  # left over where a helper failed: they are due again at once
                self.wheel.set(ms, self.now, 0)
        return more

    def _compact_next(self) -> None:
        """Give back what memory of a flood is left in the next of the dictionaries.

        It is a dictionary at a time, since each may take some milliseconds.
        """
        dictionary = next(self._to_compact, None)
        if dictionary is None:
            self._to_compact = self._dictionaries()
        else:
            compact(dictionary)

    def _dictionaries(self) -> Iterator[dict[Any, Any]]:
        yield from self.tables.dictionaries()
        yield from self.hosts.dictionaries()
        yield self._controlled.piles
        yield self._kept_until

    def remove(self, ms: IpMasq, reason: str) -> int:
        """End an entry now, and the entries it controls; returns how many have ended.

        `reason` is one of `table/endings.py`. Where the entry controls many, some of them end now,
        and the others in the next steps of the sweep.
        """
        with self.lock:
            if not ms.flags & HASHED:
                return 0
            try:
                self._end(ms, reason)
            finally:  # also where a helper fails at the end of its session
                ended = self._end_controlled(ms, reason, CONTROLLED_AT_ONCE)
            return 1 + ended

    def flush(self) -> int:
        """End all entries at one stroke; returns how many have ended.

        From now on packets find none of them, their ports are free, and they are counted as ended.
        Watchers and helpers are told of each in the next steps of the sweep, while new entries are
        made. The lock is held for a tenth of a microsecond for each entry, and no flow should be in
        a flow cache by now: to withdraw it takes longer.
        """
        with self.lock:
            count = self.room.entries
            for ms in self.roll.all():
                if ms.flags & CACHED:
                    self._withdraw(ms)
                if ms.server is not None:
                    ms.server.left(ms.state)
                ms.flags &= ~HASHED
                ms.rewrite = None
            for protocol, ended in self.room.by_protocol():
                self.counters.ended[row(protocol)][FLUSHED] += ended
            kept = [*self.tables.begin_anew(), self._controlled.piles, self._kept_until]
            self._remains.add(self.roll, self.hosts.begin_anew(), kept)
            self.roll = Roll()
            self.choice.begin_anew()
            self.room.begin_anew()
            self.wheel.begin_anew()
            self._controlled, self._kept_until = Newest(), {}
            self._ended_before.clear()
            self._to_compact = iter(())
            return count

    def _clear_away(self, most: int) -> None:
        """Take some of the entries apart that a flush has ended; the caller holds the lock."""
        for ms in self._remains.take(most):
            ms.control = ms.server = None
            for tell in self.watch.ended:
                tell(ms, FLUSHED)
            if ms.app is not None:
                self.helpers.unbind(ms)

    def _end_controlled(self, control: IpMasq, reason: str, limit: int) -> int:
        """End `limit` of the entries that an ended entry controls; return how many have ended."""
        ended = 0
        while (ms := self._controlled.get(control)) is not None:
            if ended >= limit:
                self._ended_before.append((control, reason))
                break
            self._let_go_of_controller(ms)
            try:
                ended += self.remove(ms, reason)
            except Exception:
                self._ended_before.append((control, reason))
                raise
        return ended

    def _end_more_controlled(self, limit: int) -> None:
        if self._ended_before:
            self._end_controlled(*self._ended_before.popleft(), limit)

    def _end_unless_in_hand(self, ms: IpMasq, reason: str) -> bool:
        """End an entry to which only the tables refer; false where the packet in hand has it.

        Without a rewrite no further packet takes the entry in hand (`table/hand.py`).
        """
        rewrite, ms.rewrite = ms.rewrite, None
        if self.hand.ms is ms:
            ms.rewrite = rewrite
            return False
        return self._end(ms, reason)

    def _end(self, ms: IpMasq, reason: str) -> bool:
        """Take an entry from the tables, its controller and its helper; false where it had ended.

        Its port is free when the last entry under the port leaves the m-table. Its memory is free
        with the last reference.
        """
        if ms.flags & CACHED:
            self._withdraw(ms)
        if not self.tables.ip_masq_unhash(ms):
            return False
        ms.rewrite = None
        if ms.control is not None:
            self._let_go_of_controller(ms)
        if ms.flags & (OUTSIDE_WAITS | OUTSIDE | OWN) == OUTSIDE_WAITS:
            self.reuse.ended(ms, self.now)
        self.wheel.forget(ms)
        self._kept_until.pop(ms, None)
        self.roll.leave(ms)
        self.room.left(ms)
        self.hosts.left(ms)
        if ms.server is not None:
            ms.server.left(ms.state)
        self.counters.ended[row(ms.protocol)][reason] += 1
        for tell in self.watch.ended:
            tell(ms, reason)
        if ms.app is not None:
            self.helpers.unbind(ms)
        return True

    def _port_taken(self, ms: IpMasq) -> None:
        if ms.protocol in PROTOCOLS:
            self.choice.ports.take(ms.protocol, ms.maddr, ms.mport)
            self.hosts.took_port(ms.protocol, ms.saddr)

    def _port_free(self, ms: IpMasq, holder: int) -> None:
        if ms.protocol in PROTOCOLS:
            self.choice.ports.give_back(ms.protocol, ms.maddr, ms.mport)
            self.hosts.gave_port_back(ms.protocol, holder)

    # -- refused and dropped ---------------------------------------------------------

    def refuse(self, session: FiveTuple, reason: str) -> None:
        """Count that a session cannot be had, and tell the watchers.

        `reason` is one of `counters.REASONS`.
        """
        with self.lock:
            self.counters.errors[reason] += 1
            for tell in self.watch.refused:
                tell(session, reason)

    def drop(self, packet: bytes, reason: str) -> None:
        """Count that a packet is lost, and tell the watchers.

        `reason` is one of `counters.REASONS`.
        """
        with self.lock:
            self.counters.errors[reason] += 1
            if self.watch.dropped:
                values = five_tuple(packet)
                for tell in self.watch.dropped:
                    tell(values, reason)

    # -- looked at ----------------------------------------------------------------

    def walk(self, at_a_time: int = WALK) -> Iterator[IpMasq]:
        """Walk through all entries, the oldest first; the lock is held for some at a time.

        Entries may change, come and go meanwhile (`table/roll.py`).
        """
        return self.roll.walk(self.lock, at_a_time)

    def walk_host(self, saddr: int) -> Iterator[IpMasq]:
        """Walk through the entries of an inside host, the oldest first, as `walk` does."""
        with self.lock:
            roll = self.hosts.roll_of(saddr)
        return roll.walk(self.lock, WALK)

    def entries(self) -> list[IpMasq]:
        """List all entries; they may change or go while they are read."""
        return list(self.walk())

    def account_of(self, ms: IpMasq) -> tuple[Usage, float | None]:
        """Return an entry's packets, bytes and timer, those in a flow cache among them.

        The last times are those of a cache alone.
        """
        with self.lock:
            usage, timer = self.cached.usage(ms), ms.timer
            if timer is not None and ms.flags & CACHED:
                timer = max(timer, self.cached.last_of(usage) + ms.timeout)
            return Usage(
                ms.packets_out + usage.packets_out,
                ms.bytes_out + usage.bytes_out,
                usage.last_out,
                ms.packets_in + usage.packets_in,
                ms.bytes_in + usage.bytes_in,
                usage.last_in,
            ), timer

    def entry_count(self, protocol: int) -> int:
        """Return how many entries of a protocol number there are."""
        return self.room.of_protocol(protocol)

    def entry_counts(self) -> dict[str, int]:
        """Return how many entries there are, by the rows of the counters."""
        counts = dict.fromkeys(ROWS, 0)
        for protocol, count in self.room.by_protocol():
            counts[row(protocol)] += count
        return counts

    def account(self) -> Account:
        """Count the entries at one moment, so that in each row created = ended + live."""
        with self.lock:
            ended = {name: dict(reasons) for name, reasons in self.counters.ended.items()}
            return Account(self.entry_counts(), dict(self.counters.created), ended)

    def over_counts(self) -> dict[str, int]:
        """Return how many entries wait only for their timeout, by the rows of the counters."""
        return {PROTOCOLS[number]: self.room.over_of(number) for number in PROTOCOLS}

    def ports_free(self, protocol: int) -> int:
        """Return how many masquerade ports of a protocol number are free."""
        return self.choice.ports.free(protocol)
