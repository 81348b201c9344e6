"""The life of an entry: made, found and used, given back, expired.

Whoever gets an entry holds a reference to it, and its timer stands still; whoever gives back
the last reference beside those of the tables starts the timer with the entry's timeout.
When the timer fires the entry expires, unless it is in use or controls another.
Everything here that is not called `_unlocked` takes the lock itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from nfmasq.engine.counters import Counters
from nfmasq.engine.forward.forward import Forwards
from nfmasq.engine.hairpin import Hairpins
from nfmasq.engine.helper.app import Apps, Session
from nfmasq.engine.table import mapping as behaviour
from nfmasq.engine.table.entry import HASHED, MPORT, NO_REPLY, OPEN_ENDED, OUTSIDE, USER, IpMasq
from nfmasq.engine.table.limits import InsideHosts
from nfmasq.engine.table.ports import DRAWS, PORT_SELECTIONS, MasqueradePorts
from nfmasq.engine.table.states import NONE, STATE_ICMP, STATE_OTHER, STATE_UDP
from nfmasq.engine.table.tables import (
    TABLE_REFERENCES,
    Tables,
    address_of,
    endpoint_key,
    endpoint_of,
    session_key,
)
from nfmasq.engine.table.timeouts import PROFILES, Timeouts, TimeoutTable
from nfmasq.engine.table.timers import TimingWheel
from nfmasq.engine.table.unanswered import Unanswered
from nfmasq.engine.wire.by_address import BY_ADDRESS, DROP
from nfmasq.engine.wire.protocols import ICMP, PROTOCOLS, ROWS, TCP, UDP, row

_FIRST_STATE = {TCP: NONE, UDP: STATE_UDP, ICMP: STATE_ICMP}

FEW_PORTS = 64
"""A host that holds so many ports or fewer gives none up to another, unless PATIENCE is over."""

PATIENCE = 10.0
"""Seconds without an answer, after which a session gives up its port when none is left."""

MAX_SHARED_LOOK_UPS = 4096
"""Ports that are looked at, for one packet, to find one that its session can share."""

DEFAULT_PORTS = range(61000, 65096)

SEARCH_AGAIN = 1.0
"""Seconds until a port to share with an outside endpoint is looked for again, after a search in
vain: a flood toward one endpoint must not have such a search for each of its packets."""

MOST_SEARCHED = 1024
"""Searches in vain that are remembered."""

Lock = AbstractContextManager[Any]


def _by_protocol(chosen: str | Mapping[int, str]) -> dict[int, str]:
    """A behaviour for each protocol."""
    return dict.fromkeys(PROTOCOLS, chosen) if isinstance(chosen, str) else dict(chosen)


def _is_idle(ms: IpMasq) -> bool:
    """Whether nobody holds an entry but the tables."""
    return ms.refcnt == TABLE_REFERENCES and not ms.n_control


class Sessions:
    """All entries of one masquerade, with their ports and timers.

    `now` is the time of the packet or the sweep in hand. `lock` must be reentrant where it is a
    real one. Settings are those of `configure`.
    """

    def __init__(
        self,
        *,
        ports: Sequence[int] = DEFAULT_PORTS,
        lock: Lock | None = None,
        **settings: Any,
    ) -> None:
        self.ports = MasqueradePorts(ports)
        self.hosts = InsideHosts()
        self.tables = Tables(self._port_taken, self._port_free)
        self.wheel = TimingWheel()
        self.hairpins = Hairpins()
        self.counters = Counters()
        self.timeout_table: TimeoutTable = []
        self.forwards = Forwards()
        self.lock: Lock = lock or nullcontext()
        self.now = 0.0
        self._unanswered = Unanswered()
        self._unconfirmed = Unanswered()
        self._count: Counter[int] = Counter()
        self._entries = 0
        self._count_from_outside = 0
        # Ports recur in very many entries; they share one object for each number.
        self._port_numbers: dict[int, int] = {}
        self._searched: dict[tuple[int, int, int, int], float] = {}
        self.configure(ports=ports, **settings)

    def configure(
        self,
        *,
        ports: Sequence[int] = DEFAULT_PORTS,
        mapping: str | Mapping[int, str] = behaviour.ENDPOINT_INDEPENDENT,
        filtering: str | Mapping[int, str] = behaviour.ADDRESS_DEPENDENT,
        port_selection: str = "sequential",
        timeouts: Timeouts = PROFILES["rfc"],
        max_entries: int = 1_048_576,
        max_entries_per_host: int = 0,
        max_ports_per_host: int = 0,
        max_new_per_host: int = 0,
        other_protocols: str = DROP,
        apps: Apps | None = None,
        forwards: Forwards | None = None,
    ) -> None:
        """Take on settings; what is not given is the default.

        `mapping` and `filtering` are one for all protocols, or by protocol number. Limits of 0 are
        none; `max_new_per_host` is new entries a second.

        It may be done again at any time, and no entry is lost by it. Entries keep their ports and
        servers, and have new timeouts from their next state on; `ip_masq_retime` hurries that.
        """
        with self.lock:
            if ports != self.ports.ports:
                self._change_ports(ports)
            self.hosts.limit(max_entries_per_host, max_ports_per_host, max_new_per_host)
            self.mapping = _by_protocol(mapping)
            self.filtering = _by_protocol(filtering)
            # In place, for every entry refers to it.
            self.timeout_table[:] = timeouts.table()
            self.max_entries = max_entries
            self.by_address = other_protocols == BY_ADDRESS
            self.apps: Apps = apps or {}
            self._select_port = PORT_SELECTIONS[port_selection]
            forwards = forwards or Forwards()
            forwards.go_on_from(self.forwards)
            self.forwards = forwards

    def _change_ports(self, ports: Sequence[int]) -> None:
        """Have other masquerade ports, of which those are taken that entries hold."""
        self.ports = MasqueradePorts(ports)
        for key in self.tables.masquerade_endpoints():
            self.ports.take(*endpoint_of(key))
        self._searched.clear()

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
    ) -> IpMasq | None:
        """A new entry, hashed, with a reference for the caller; None, counted, if it can't be had.

        With an mport of 0 one is found: the one the mapping gives, else a free one. An mport
        that is given must be unused, or held by the same inside endpoint, or forwarded. Of a
        protocol without ports all three are 0, and one session can be had with each outside
        address; a call of PPTP has other numbers (`calls.py`). When the table is full, an entry
        that nothing came back for makes room.
        """
        with self.lock:
            if not self.hosts.may_have_entry(saddr):
                self.counters.errors["host_entries"] += 1
                return None
            session = (saddr, sport, daddr, dport)
            if mport:
                mflags |= MPORT
                chosen = mport if self._may_use(proto, maddr, mport, session, mflags) else None
            else:
                chosen = self._choose_mport(proto, maddr, session, mflags)
            if chosen is None:
                self._count_missing_port(proto, saddr)
                return None
            if not self._has_room():
                self.counters.errors["no_room"] += 1
                return None
            state = _FIRST_STATE.get(proto, STATE_OTHER)
            ms = self._make(proto, maddr, chosen, saddr, sport, daddr, dport, mflags, state)
            ms.refcnt += 1
            self._bind_app(ms)
            return ms

    def _make(
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
    ) -> IpMasq:
        """A new entry, hashed and counted, which nothing is against."""
        port = self._port_numbers.setdefault
        ms = IpMasq(
            proto,
            maddr,
            port(mport, mport),
            saddr,
            port(sport, sport),
            daddr,
            port(dport, dport),
            mflags,
            self.timeout_table,
            state,
        )
        self.tables.ip_masq_hash(ms)
        self.hosts.entered(ms, self.now)
        self._count[proto] += 1
        self._entries += 1
        if mflags & OUTSIDE:
            self._count_from_outside += 1
            self._unconfirmed.join(ms, self._count_from_outside)
        elif mflags & NO_REPLY:
            self._unanswered.join(ms, self._entries)
        self.counters.created[row(proto)] += 1
        return ms

    def get_next_mport(self) -> int:
        """The next port of the range, whether it is taken or not."""
        with self.lock:
            return self.ports.get_next_mport()

    def select_pair(self, proto: int, ms: IpMasq, sport: int) -> int:
        """An even mport for a port of an entry's inside host, free with the next one.

        0 where none was found near those that the port selection gave, or the port has an mport.
        """
        for _ in range(DRAWS):
            mport = self._select_port(self.ports, proto, ms.maddr, sport) or 0
            for even in (mport & ~1, mport + 1 & ~1):
                if self.may_select(proto, ms, sport, even) and self.ports.unused(
                    proto, ms.maddr, even + 1
                ):
                    return even
        return 0

    def may_select(self, proto: int, ms: IpMasq, sport: int, mport: int) -> bool:
        """Whether an mport may be chosen for a port of an entry's inside host."""
        return (
            0 < mport <= 65535
            and self.ports.unused(proto, ms.maddr, mport)
            and self.hosts.may_take_port(ms.saddr)
            and self._mapped_mport(proto, ms.maddr, ms.saddr, sport, ms.daddr) is None
        )

    def _may_use(
        self, proto: int, maddr: int, mport: int, session: tuple[int, int, int, int], flags: int
    ) -> bool:
        """Whether a session (saddr, sport, daddr, dport) can have an mport without a mix-up."""
        if proto not in PROTOCOLS:
            _, _, daddr, dport = session
            return session_key(daddr, maddr, dport, mport) not in self.tables.in_index[proto]
        holder = self.tables.ip_masq_getbym_unlocked(proto, maddr, mport)
        if holder is None:
            return True
        self.tables.ip_masq_put_unlocked(holder)
        saddr, sport, daddr, dport = session
        key = endpoint_key(proto, maddr, mport)
        open_ended = flags & OPEN_ENDED or key in self.tables.m_open.heads
        if not open_ended:
            if session_key(daddr, maddr, dport, mport) in self.tables.in_index[proto]:
                return False
            if self._shares_ports(proto) or self.forwards.find(proto, maddr, mport) is not None:
                return True
        return (holder.saddr, holder.sport) == (saddr, sport)

    def ip_masq_move(self, ms: IpMasq, maddr: int) -> bool:
        """Put an entry on another masquerade address; false, and counted, where it has no port.

        It keeps its mport where that is to be had there, unless its inside endpoint has one.
        """
        with self.lock:
            self.tables.ip_masq_unhash(ms)
            session = (ms.saddr, ms.sport, ms.daddr, ms.dport)
            mport: int | None = ms.mport
            if self._mapped_mport(ms.protocol, maddr, *session[:3]) or not self._may_use(
                ms.protocol, maddr, ms.mport, session, ms.flags
            ):
                mport = self._choose_mport(ms.protocol, maddr, session, ms.flags)
            if mport is None:
                self._count_missing_port(ms.protocol, ms.saddr)
            else:
                ms.maddr, ms.mport = maddr, mport
            self.tables.ip_masq_hash(ms)
            return mport is not None

    def _choose_mport(
        self, proto: int, maddr: int, session: tuple[int, int, int, int], flags: int
    ) -> int | None:
        if proto not in PROTOCOLS:
            return 0 if self._may_use(proto, maddr, 0, session, flags) else None
        saddr, sport, daddr, dport = session
        mapped = self._mapped_mport(proto, maddr, saddr, sport, daddr)
        if mapped is not None and self._may_use(proto, maddr, mapped, session, flags):
            return mapped
        may_take = self.hosts.may_take_port(saddr)
        free = self._select_port(self.ports, proto, maddr, sport) if may_take else None
        if free is None and self._shares_ports(proto) and not flags & OPEN_ENDED:
            free = self._choose_shared_mport(proto, maddr, daddr, dport)
        if free is None and may_take:
            return self._make_port_free(proto, maddr, session, flags)
        return free

    def _shares_ports(self, proto: int) -> bool:
        """Whether one mport serves sessions of several inside endpoints."""
        return self.mapping[proto] == behaviour.ADDRESS_AND_PORT_DEPENDENT

    def _make_port_free(
        self, proto: int, maddr: int, session: tuple[int, int, int, int], flags: int
    ) -> int | None:
        """Have an unanswered session give up its port: see `is_due` for whose.

        That is a port of no other session; or, where ports are shared, of none but sessions with
        other outside endpoints.
        """
        saddr, _, *outside = session
        shared = self._shares_ports(proto)
        held_by = self.hosts.entries_of if shared else self.hosts.ports_of
        fair = max(2 * held_by(saddr), FEW_PORTS)

        def is_due(ms: IpMasq) -> bool:
            """One of a host that holds far more than this one; or one that has waited in vain.

            The latter is for a flood from many addresses, none of which holds many.
            """
            if held_by(ms.saddr) > fair:
                return True
            asked_at = (ms.timer or self.now) - ms.timeout
            return len(self.ports.ports) > FEW_PORTS and self.now - asked_at > PATIENCE

        def gives_up(ms: IpMasq) -> bool:
            is_alone = ms.m_link is None and ms.m_back is None
            of_use = is_alone or (shared and [ms.daddr, ms.dport] == outside)
            right_port = ms.protocol == proto and ms.maddr == maddr and ms.mport in self.ports
            return right_port and of_use and _is_idle(ms) and is_due(ms)

        evicted = self._evict(self._unanswered, gives_up)
        if evicted is None or not self._may_use(proto, maddr, evicted.mport, session, flags):
            return None
        return evicted.mport

    def _count_missing_port(self, proto: int, saddr: int) -> None:
        at_its_limit = proto in PROTOCOLS and not self.hosts.may_take_port(saddr)
        self.counters.errors["host_ports" if at_its_limit else "no_port"] += 1

    def _mapped_mport(
        self, proto: int, maddr: int, saddr: int, sport: int, daddr: int
    ) -> int | None:
        """The mport that the inside endpoint holds already, as the mapping has it."""
        if proto not in PROTOCOLS:
            return None
        like = behaviour.session_to_map_like(
            self.tables, self.mapping[proto], proto, maddr, saddr, sport, daddr
        )
        return like.mport if like is not None else None

    def _choose_shared_mport(self, proto: int, maddr: int, daddr: int, dport: int) -> int | None:
        """The next taken port on which no session with this outside endpoint is.

        No more than MAX_SHARED_LOOK_UPS are looked at, or a packet to an endpoint that has a
        session on each of 65,000 ports would hold up the others for tens of milliseconds. After
        SEARCH_AGAIN others are looked at.
        """
        target = (proto, maddr, daddr, dport)
        if self._searched.get(target, self.now) > self.now:
            return None
        index = self.tables.in_index[proto]
        for _ in range(min(len(self.ports.ports), MAX_SHARED_LOOK_UPS)):
            mport = self.ports.get_next_mport()
            key = endpoint_key(proto, maddr, mport)
            if key in self.tables.m_open.heads or key not in self.tables.m_table.heads:
                continue  # a free one is not for a host that has as many as it may
            if session_key(daddr, maddr, dport, mport) not in index:
                return mport
        if len(self._searched) >= MOST_SEARCHED:
            self._searched.clear()
        self._searched[target] = self.now + SEARCH_AGAIN
        return None

    def _bind_app(self, ms: IpMasq) -> None:
        """Bind the helper of the server's port: the outside one in what the inside made, the
        inside one in what a person has asked for. What the outside makes has no helper."""
        if ms.flags & USER:
            app = self.apps.get((ms.protocol, ms.sport))
        elif ms.flags & NO_REPLY:
            app = self.apps.get((ms.protocol, ms.dport))
        else:
            app = None
        if app is None:
            return
        ms.app_data = Session(ms, self)
        try:
            app.bind(ms.app_data)
        except Exception:
            self.tables.ip_masq_put_unlocked(ms)
            self._release(ms)
            raise
        ms.app = app

    def rebind_app(self, ms: IpMasq, first_seq: int) -> None:
        """Have the helper start anew where a SYN begins another connection of the same entry."""
        session: Session = ms.app_data
        if ms.app is None or session.first_seq in (None, first_seq):
            session.first_seq = first_seq
            return
        session.expect_nothing()
        ms.app.unbind(session)
        ms.out_seq = ms.in_seq = None
        ms.app_data = Session(ms, self)
        ms.app_data.first_seq = first_seq
        ms.app.bind(ms.app_data)

    # -- found and used, given back ---------------------------------------------

    def ip_masq_out_get(
        self, protocol: int, s_addr: int, s_port: int, d_addr: int, d_port: int
    ) -> IpMasq | None:
        """The entry of a packet from the inside, to be given back with ip_masq_put; or None."""
        with self.lock:
            ms = self.tables.ip_masq_out_get_unlocked(protocol, s_addr, s_port, d_addr, d_port)
            if ms is not None:
                self.wheel.stop(ms)
            return ms

    def ip_masq_in_get(
        self, protocol: int, s_addr: int, s_port: int, d_addr: int, d_port: int
    ) -> IpMasq | None:
        """The entry of a packet from the outside, to be given back with ip_masq_put; or None."""
        with self.lock:
            ms = self.tables.ip_masq_in_get_unlocked(protocol, s_addr, s_port, d_addr, d_port)
            if ms is not None:
                self.wheel.stop(ms)
            return ms

    def ip_masq_put(self, ms: IpMasq) -> None:
        """Give a reference back; when only the tables' are left, start the timer again."""
        with self.lock:
            self.tables.ip_masq_put_unlocked(ms)
            if ms.refcnt == TABLE_REFERENCES and ms.flags & HASHED:
                self.wheel.set(ms, self.now, ms.timeout)

    def ip_masq_enter(self, ms: IpMasq, state: int, now: float) -> None:
        """Have an entry take on another state; its timer starts again with that state's timeout."""
        with self.lock:
            if ms.flags & HASHED:
                ms.enter(state)
                self.wheel.set(ms, now, ms.timeout)

    def ip_masq_retime(self, ms: IpMasq, now: float) -> None:
        """Have an entry take on the timeout that its state has by now.

        A shorter one counts from now on, a longer one from its next packet on.
        """
        with self.lock:
            ms.timeout = ms.timeout_table[ms.state]
            if ms.timer is not None and ms.timer > now + ms.timeout:
                self.wheel.set(ms, now, ms.timeout)

    def ip_masq_replied(self, ms: IpMasq) -> None:
        """Note that something came back."""
        with self.lock:
            ms.flags &= ~NO_REPLY

    # -- expired -----------------------------------------------------------------

    def ip_masq_control(self, ms: IpMasq, control: IpMasq) -> bool:
        """Let `control` control `ms`: it will not expire before `ms` does.

        False, and nothing is changed, where one of them is gone or controls itself.
        """
        with self.lock:
            if ms is control or not ms.flags & control.flags & HASHED:
                return False
            self._let_go_of_controller(ms)
            ms.control = control
            control.n_control += 1
            return True

    def masq_expire(self, ms: IpMasq) -> None:
        """What happens when the timer of `ms` fires."""
        with self.lock:
            if ms.flags & HASHED and (ms.refcnt > TABLE_REFERENCES or ms.n_control):
                self.wheel.set(ms, self.now, ms.timeout)
            elif self._release(ms):
                self.counters.expired[row(ms.protocol)] += 1

    def sweep(self, now: float, limit: int) -> bool:
        """Expire what is due, looking at no more than `limit` entries; true where more is due."""
        with self.lock:
            self.now = now
            fired, more = self.wheel.fired(now, limit)
            try:
                while fired:
                    self.masq_expire(fired.pop())
            finally:
                for ms in fired:  # left over where a helper failed: they are due again at once
                    self.wheel.set(ms, now, 0)
            return more

    def remove(self, ms: IpMasq) -> int:
        """End an entry now, and those it controls; returns how many that were."""
        with self.lock:
            controlled = ms.n_control and [e for e in self.tables.entries() if e.control is ms]
            if not self._release(ms):
                return 0
            return 1 + sum(map(self.remove, controlled or ()))

    def _has_room(self) -> bool:
        """Whether the table has room for one more entry, made where there was none."""
        if self._entries < self.max_entries:
            return True
        evicted = self._evict(self._unanswered, _is_idle) or self._evict(
            self._unconfirmed, _is_idle
        )
        return evicted is not None

    def _has_room_from_outside(self, saddr: int) -> bool:
        """The same for an entry that the outside makes: half of the table, and half of a host's.

        So whoever floods a port from outside takes nothing from the inside.
        """
        if self._count_from_outside * 2 >= self.max_entries:
            if self._evict(self._unconfirmed, _is_idle) is None:
                return False
        elif not self._has_room():
            return False
        if self.hosts.may_be_given_entry(saddr):
            return True
        of_the_same = self._evict(self._unconfirmed, lambda ms: ms.saddr == saddr and _is_idle(ms))
        return of_the_same is not None

    def _evict(self, queue: Unanswered, wanted: Callable[[IpMasq], bool]) -> IpMasq | None:
        """End an unanswered entry before its time, and return it; None where none is wanted."""
        ms = queue.take(wanted)
        if ms is not None:
            self._release(ms)
            self.counters.ended["evicted"] += 1
        return ms

    def _release(self, ms: IpMasq) -> bool:
        """Let go of the controller, the tables, the port and the helper; false where it had.

        The port goes with the last entry under it in the m-table, the memory with the last
        reference.
        """
        if not self.tables.ip_masq_unhash(ms):
            return False
        self._let_go_of_controller(ms)
        self.wheel.stop(ms)
        if self.hairpins:
            self.hairpins.forget(ms)
        self._count[ms.protocol] -= 1
        self._entries -= 1
        self._count_from_outside -= ms.flags & OUTSIDE > 0
        self.hosts.left(ms)
        if ms.server is not None:
            ms.server.left(ms.state)
        app, ms.app = ms.app, None
        if app is not None:
            app.unbind(ms.app_data)
        return True

    def _port_taken(self, key: int, ms: IpMasq) -> None:
        if ms.protocol in PROTOCOLS:
            self.ports.take(ms.protocol, ms.maddr, ms.mport)
            self.hosts.took_port(key, ms.saddr)

    def _port_free(self, key: int, ms: IpMasq) -> None:
        if ms.protocol in PROTOCOLS:
            self.ports.give_back(ms.protocol, ms.maddr, ms.mport)
            self.hosts.gave_port_back(key)

    def _let_go_of_controller(self, ms: IpMasq) -> None:
        if ms.control is not None:
            ms.control.n_control -= 1
            ms.control = None

    # -- looked at ----------------------------------------------------------------

    def entries(self) -> list[IpMasq]:
        """All entries; they may change or go while they are read."""
        with self.lock:
            return list(self.tables.entries())

    def entries_on(self, maddr: int) -> list[IpMasq]:
        """The entries on a masquerade address; they may change or go while they are read."""
        with self.lock:
            return [
                ms
                for chains in (self.tables.m_table, self.tables.m_open)
                for key in chains.heads
                if address_of(key) == maddr
                for ms in chains.chain(key)
            ]

    def entry_count(self, protocol: int) -> int:
        """How many entries of a protocol number there are."""
        return self._count[protocol]

    def entry_counts(self) -> dict[str, int]:
        """How many entries there are, by the rows of the counters."""
        counts = dict.fromkeys(ROWS, 0)
        for protocol, count in list(self._count.items()):
            counts[row(protocol)] += count
        return counts

    def ports_free(self, protocol: int) -> int:
        """How many masquerade ports of a protocol number are free."""
        return self.ports.free(protocol)
