"""One masquerade that has the fast path and one that has not, to be led along the same steps.

A `Step` is plain data, so that it can be printed, dropped and taken again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from random import Random
from struct import Struct
from typing import Any, NamedTuple

from nfmasq.apps.ftp import Ftp
from nfmasq.engine import TCP, UDP, Flags, IpMasq, Masquerade, Timeouts
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.forward.trigger import Trigger
from nfmasq.engine.helper.app import App, Apps, Packet, Session
from nfmasq.engine.table import ports
from nfmasq.engine.table.entry import CACHED
from nfmasq.engine.table.states import ESTABLISHED, STATE_DNS, STATE_UDP
from nfmasq.engine.table.tables import TABLE_REFERENCES
from nfmasq.engine.watch import Identity, Watcher
from nfmasq.engine.wire.checksum import UnknownChecksum
from nfmasq.engine.wire.header import FiveTuple
from nfmasq.engine.wire.protocols import PROTOCOLS
from tests.gateway import told

FTP, PUPPET = 21, 69

LONGEST_KEPT = 40
"""Seconds for which `Puppet` keeps a session, at most."""

OPEN_ENDED = Flags.NO_DADDR | Flags.NO_DPORT | Flags.NO_SPORT | Flags.DLOOSE

BRIEF = Timeouts(
    tcp_none=30,
    tcp_established=100,
    tcp_syn_sent=20,
    tcp_syn_recv=10,
    tcp_fin_wait=50,
    tcp_time_wait=4,
    tcp_close=2,
    tcp_close_wait=50,
    tcp_last_ack=3,
    tcp_listen=10,
    udp=20,
    icmp=2,
    other=30,
    udp_dns=1,
)


class Step(NamedTuple):
    """A step: the method of `Way`, its arguments, and how many seconds pass before it."""

    seconds: float
    what: str
    args: tuple[Any, ...]


class _Chance(Random):
    """A source of chance that draws the same, however often it is asked, until it is set anew."""

    drawn = 0

    def choice(self, seq: Any) -> Any:
        return seq[self.drawn % len(seq)]


class Puppet:
    """A helper that does what the payload says: all that a helper may do to the table."""

    name = "puppet"
    ports: tuple[int, ...] = (PUPPET,)

    def __init__(self, protocol: int) -> None:
        self.protocol = protocol

    def bind(self, session: Session) -> None:
        pass

    def unbind(self, session: Session) -> None:
        session.expect_nothing()

    def packet_out(self, session: Session, packet: Packet) -> None:
        self._obey(session, packet)

    def packet_in(self, session: Session, packet: Packet) -> None:
        self._obey(session, packet)

    def _obey(self, session: Session, packet: Packet) -> None:
        word, _, number = packet.payload.partition(b" ")
        said: object = None
        if word in (b"expect", b"anyone"):
            said = session.expect(self.protocol, int(number), anyone=word == b"anyone")
        elif word == b"pair":
            said = session.expect_pair(UDP, int(number))
        elif word == b"keep":
            session.keep(min(int(number), LONGEST_KEPT), b"agreed")
        elif word == b"nothing":
            session.expect_nothing()
        if said is not None and self.protocol == UDP:
            packet.payload = repr(said).encode()


def helpers(which: str) -> Apps:
    """Make the helpers of a name: `all` or `none`."""
    if which == "none":
        return {}
    every: dict[tuple[int, int], App] = {(TCP, FTP): Ftp()}
    for protocol in (TCP, UDP):
        every[protocol, PUPPET] = Puppet(protocol)
    return every


def forwards_of(written: Sequence[Any], triggers: Sequence[Any]) -> Forwards:
    """Make forwards and triggers of their arguments, which are plain data."""
    made = [
        Forward(protocol, ports, [Server(*server) for server in servers], *more)
        for protocol, ports, servers, *more in written
    ]
    return Forwards(made, [Trigger(*each) for each in triggers])


class _Told(Watcher):
    """Notes what is told of entries and lost packets, in order.

    Left out is `changed`: a flow that opens quickly is in its first state from the beginning, and
    the states themselves are compared.
    """

    def __init__(self) -> None:
        self.events: list[Any] = []

    def made(self, ms: IpMasq) -> None:
        self.events.append(("made", Identity.of(ms)))

    def answered(self, ms: IpMasq) -> None:
        self.events.append(("answered", Identity.of(ms)))

    def moved(self, ms: IpMasq, before: Identity) -> None:
        self.events.append(("moved", before, Identity.of(ms)))

    def helped(self, ms: IpMasq) -> None:
        self.events.append(("helped", Identity.of(ms)))

    def ended(self, ms: IpMasq, reason: str) -> None:
        self.events.append(("ended", Identity.of(ms), reason))

    def refused(self, session: FiveTuple, reason: str) -> None:
        self.events.append(("refused", session, reason))

    def dropped(self, packet: FiveTuple | None, reason: str) -> None:
        self.events.append(("dropped", packet, reason))


class Way:
    """A masquerade with a clock, and what can be done to it: a method for each kind of step."""

    longest_kept = LONGEST_KEPT

    def __init__(self, fast: bool) -> None:
        self._told = _Told()
        self.masq = Masquerade(fast=fast)
        self.masq.sessions.watch.subscribe(self._told)
        self.now = 1000.0

    def take(self, step: Step) -> object:
        """Take a step; returns what comes of it."""
        self.now += step.seconds
        self._told.events.clear()
        try:
            return getattr(self, step.what)(*step.args)
        except UnknownChecksum:
            return "unknown checksum"

    # -- packets -------------------------------------------------------------------

    def out(self, packet: bytes, maddr: int, unsummed: bool) -> bytes | None:
        return self.masq.ip_fw_masquerade(packet, maddr, self.now, unsummed)

    def into(self, packet: bytes, unsummed: bool) -> bytes | None:
        return self.masq.ip_fw_demasquerade(packet, self.now, unsummed)

    def own(self, packet: bytes, unsummed: bool) -> bytes | None:
        return self.masq.ip_fw_own(packet, self.now, unsummed)

    def hairpin(self, packet: bytes, maddr: int, unsummed: bool) -> list[bytes | None]:
        sent = self.masq.ip_fw_hairpin(packet, maddr, self.now, unsummed)
        if sent is None or sent is packet:
            return [sent]
        return [sent, self.masq.ip_fw_hairpin_source(sent, self.now)]

    def hairpin_source(self, packet: bytes, unsummed: bool) -> bytes | None:
        return self.masq.ip_fw_hairpin_source(packet, self.now, unsummed)

    def hairpin_own_error(self, packet: bytes) -> bytes | None:
        return self.masq.ip_fw_hairpin_own_error(packet, self.now)

    # -- what else happens ---------------------------------------------------------

    def sweep(self, limit: int) -> bool:
        return self.masq.sweep(self.now, limit)

    def configure(self, settings: dict[str, Any], apps: str, written: Any, triggers: Any) -> None:
        made = told(apps=helpers(apps), forwards=forwards_of(written, triggers), **settings)
        self.masq.configure(*made)

    def addresses(self, maddrs: Any, beside: Any) -> None:
        self.masq.inbound.maddrs = set(maddrs)
        self.masq.outbound.beside = dict(beside)

    def server(self, at: int, alive: bool, weight: int) -> None:
        servers = [s for forward in self.masq.sessions.forwards.all for s in forward.servers]
        for server in servers[at : at + 1]:
            server.alive, server.weight = alive, weight

    def new(self, *values: Any) -> Identity | None:
        """Make an entry as a caller of `ip_masq_new` does, and give it back."""
        self.masq.sessions.now = self.now
        ms = self.masq.sessions.ip_masq_new(*values)
        if ms is None:
            return None
        self.masq.sessions.ip_masq_put(ms)
        return Identity.of(ms)

    def gone(self, who: Identity) -> list[bool]:
        return [self.masq.masq_address_gone(ms, self.now) for ms in self.known_as(who)]

    def retime(self) -> None:
        for ms in self.masq.sessions.entries():
            self.masq.sessions.ip_masq_retime(ms, self.now)

    def follow(self) -> None:
        for ms in self.entries():
            self.masq.sessions.ip_masq_follow_forward(ms)

    def remove(self, who: Identity, reason: str) -> list[int]:
        return [self.masq.sessions.remove(ms, reason) for ms in self.known_as(who)]

    # -- looked at -----------------------------------------------------------------

    def entries(self) -> list[IpMasq]:
        """List the entries, in the order of their values."""
        return sorted(self.masq.sessions.entries(), key=self._visible)

    def known_as(self, who: Identity) -> list[IpMasq]:
        return [ms for ms in self.entries() if Identity.of(ms) == who]

    def state(self) -> list[object]:
        """List all that a step may change."""
        sessions, outbox = self.masq.sessions, self.masq.outbox
        counters, forwards = sessions.counters, sessions.forwards
        traffic = [
            (row.accepted, row.dropped, row.bytes)
            for direction in (counters.outbound, counters.inbound)
            for row in direction.values()
        ]
        servers = [
            (str(server), server.alive, server.weight, server.active, server.inactive, server.total)
            for forward in (*forwards.all, *forwards.triggers)
            for server in forward.servers
        ]
        return [
            [self._visible(ms) for ms in self.entries()],
            traffic,
            [
                counters.errors,
                counters.created,
                counters.ended,
                counters.overlapping,
                counters.unbelieved,
            ],
            servers,
            sessions.choice.ports.masq_port,
            [*outbox],
            self._told.events,
        ]

    def _visible(self, ms: IpMasq) -> tuple[Any, ...]:
        """Return all that can be seen of an entry, whoever carries its packets."""
        shifts = [
            (shift.init_seq, shift.delta, shift.previous_delta) if shift is not None else ()
            for shift in (ms.out_seq, ms.in_seq)
        ]
        control = Identity.of(ms.control) if ms.control is not None else ()
        usage, timer = self.masq.sessions.account_of(ms)
        self.masq.sessions.cached.catch_up(ms)
        flags, refcnt = ms.flags & ~CACHED, ms.refcnt - (ms.flags & CACHED > 0)
        return (
            Identity.of(ms),
            (ms.state, flags, refcnt, timer or 0.0, timer is None, ms.timeout),
            (usage.packets_out, usage.packets_in, usage.bytes_out, usage.bytes_in),
            (ms.app.name if ms.app is not None else "", str(ms.server), control, ms.n_control),
            shifts,
            (_told(ms.numbers_out, ms.window_out), _told(ms.numbers_in, ms.window_in)),
            (ms.scales, ms.offered),
        )


def _told(numbers: int | None, window: int | None) -> tuple[int | None, int | None]:
    """Return what an end's newest segment says; its own number counts until it acknowledges."""
    return numbers if numbers is None or window is None else numbers & 0xFFFFFFFF, window


class TwoWays:
    """The fast way and the plain way, side by side. All that is left to chance is equal on both."""

    def __init__(self, fast: Way | None = None, plain: Way | None = None) -> None:
        self.fast, self.plain = fast or Way(fast=True), plain or Way(fast=False)
        self.plain.masq.identification = deepcopy(self.fast.masq.identification)
        self._chance = _Chance()
        self._taken = 0

    def take(self, step: Step) -> object:
        """Take a step on both ways, and hold them against each other."""
        self._taken += 1
        self._chance.drawn = self._taken * 7919
        before, ports._random = ports._random, self._chance
        try:
            comes_of_it, plainly = self.fast.take(step), self.plain.take(step)
        finally:
            ports._random = before
        assert comes_of_it == plainly, (comes_of_it, plainly)
        fast, plain = self.fast.state(), self.plain.state()
        assert fast == plain, difference(fast, plain)
        for way in (self.fast, self.plain):
            hold_together(way)
        return plainly


def difference(fast: Any, plain: Any) -> tuple[Any, Any]:
    """Return what differs in two states, with as little around it as can be."""
    while isinstance(fast, list | tuple) and len(fast) == len(plain):
        pairs = [pair for pair in zip(fast, plain, strict=True) if pair[0] != pair[1]]
        if len(pairs) != 1:
            break
        ((fast, plain),) = pairs
    return fast, plain


# -- what holds at every moment ------------------------------------------------------


def hold_together(way: Way) -> None:
    """Assert what is true of a masquerade whenever no packet is in hand."""
    sessions = way.masq.sessions
    entries = sessions.entries()
    _are_counted(way, entries)
    assert len(set(entries)) == len(entries)
    for ms in entries:
        assert ms.flags & Flags.HASHED
        assert ms.refcnt == TABLE_REFERENCES + (ms.flags & CACHED > 0)
        assert ms.timer is not None
        assert ms.timer <= way.now + max(ms.timeout, way.longest_kept if ms.app else 0)
    controlled = Counter(ms.control for ms in entries if ms.control is not None)
    assert all(ms.n_control == controlled.pop(ms, 0) for ms in entries)
    assert not controlled
    assert way.masq.hairpins.sessions() <= set(entries)
    _are_found(way, entries)


def _are_counted(way: Way, entries: list[IpMasq]) -> None:
    sessions = way.masq.sessions
    account = sessions.account()
    assert sum(account.live.values()) == len(entries)
    for name, created in account.created.items():
        assert created == sum(account.ended[name].values()) + account.live[name]
    by_host = Counter(ms.saddr for ms in entries)
    assert all(sessions.hosts.entries_of(host) == many for host, many in by_host.items())
    serving = Counter((ms.server, is_active(ms)) for ms in entries if ms.server is not None)
    for server in {s for f in sessions.forwards.all for s in f.servers}:
        assert server.active == serving[server, True]
        assert server.inactive == serving[server, False]


def is_active(ms: IpMasq) -> bool:
    return ms.state in (ESTABLISHED, STATE_UDP, STATE_DNS)


def _are_found(way: Way, entries: list[IpMasq]) -> None:
    """Assert that indexes and ports know just the entries that there are."""
    tables, choice = way.masq.sessions.tables, way.masq.sessions.choice
    fixed = [ms for ms in entries if not ms.flags & OPEN_ENDED]
    by_in = {(ms.protocol, in_key(ms)) for ms in fixed}
    by_out = {(ms.protocol, out_key(ms)) for ms in fixed}
    assert by_in == {(protocol, key) for protocol, key, _ in _indexed(tables.in_index)}
    assert by_out == {(protocol, key) for protocol, key, _ in _indexed(tables.out_index)}
    for protocol, key, ms in _indexed(tables.in_index):
        assert ms in fixed
        assert (protocol, key) == (ms.protocol, in_key(ms))
    for protocol, key, ms in _indexed(tables.out_index):
        assert ms in fixed
        assert (protocol, key) == (ms.protocol, out_key(ms))
    held = {(ms.protocol, ms.maddr, ms.mport) for ms in entries}
    assert {key >> 48 for key in tables.holders} <= {protocol for protocol, _, _ in held}
    assert len(tables.holders) == len(held)
    taken = {
        (protocol, maddr, mport)
        for protocol in PROTOCOLS
        for maddr in {ms.maddr for ms in entries}
        for mport in choice.ports.ports
        if not choice.ports.unused(protocol, maddr, mport)
    }
    masquerade_ports = set(choice.ports.ports)
    assert taken == {end for end in held if end[0] in PROTOCOLS and end[2] in masquerade_ports}


def _indexed(index: Any) -> Iterator[tuple[int, bytes, IpMasq]]:
    for protocol, by_key in index.items():
        for key, ms in by_key.items():
            yield protocol, key, ms


_key = Struct("!IIHH").pack


def in_key(ms: IpMasq) -> bytes:
    return _key(ms.daddr, ms.maddr, ms.dport, ms.mport)


def out_key(ms: IpMasq) -> bytes:
    return _key(ms.saddr, ms.daddr, ms.sport, ms.dport)
