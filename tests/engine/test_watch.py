"""The gate: whatever begins, changes or ends an entry is counted, and told to the watchers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from nfmasq.apps import helpers
from nfmasq.engine import ICMP, TCP, UDP, Flags, IpMasq, Timeouts, Watcher
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.forward.trigger import Trigger
from nfmasq.engine.table.endings import DELETED, ENDINGS, FLUSHED
from nfmasq.engine.watch import Identity
from nfmasq.engine.wire.header import FiveTuple
from nfmasq.engine.wire.protocols import ROWS, row
from tests.gateway import GATEWAY, INSIDE, NEIGHBOUR, NEW_ADDRESS, SERVER, Gateway, entries_on
from tests.packets import (
    ACK,
    FIN,
    REDIRECT,
    RST,
    SYN,
    Endpoint,
    icmp,
    number,
    query,
    tcp,
    udp,
)

FTP, TRIGGERING, FORWARDED, TRIGGERED = 21, 9, 61006, 61007
MPORTS = range(61000, 61008)

HOSTS = "10.0.0.2", "10.0.0.3"
SERVERS = "198.51.100.7", "198.51.100.8"
INSIDE_SERVERS = Server(number("10.0.0.8"), 80), Server(number("10.0.0.9"), 80)


class Copy(Watcher):
    """A watcher that makes a copy of the table, and keeps whatever else it is told."""

    def __init__(self) -> None:
        self.identities: dict[IpMasq, Identity] = {}
        self.states: dict[IpMasq, int] = {}
        self.unanswered: set[IpMasq] = set()
        self.ended_for = Counter[str]()
        self.refusals: list[tuple[FiveTuple, str]] = []
        self.drops: list[tuple[FiveTuple | None, str]] = []
        self.helpers_begun = Counter[IpMasq]()

    def made(self, ms: IpMasq) -> None:
        assert ms not in self.identities
        self.identities[ms] = Identity.of(ms)
        self.states[ms] = ms.state
        if ms.flags & Flags.NO_REPLY:
            self.unanswered.add(ms)

    def answered(self, ms: IpMasq) -> None:
        self.unanswered.remove(ms)

    def changed(self, ms: IpMasq, before: int) -> None:
        assert self.states[ms] == before != ms.state
        self.states[ms] = ms.state

    def moved(self, ms: IpMasq, before: Identity) -> None:
        assert self.identities[ms] == before
        self.identities[ms] = Identity.of(ms)

    def helped(self, ms: IpMasq) -> None:
        assert ms in self.identities
        assert ms.app is not None
        self.helpers_begun[ms] += 1

    def ended(self, ms: IpMasq, reason: str) -> None:
        del self.identities[ms], self.states[ms]
        self.unanswered.discard(ms)
        self.helpers_begun.pop(ms, None)
        self.ended_for[reason] += 1

    def refused(self, session: FiveTuple, reason: str) -> None:
        self.refusals.append((session, reason))

    def dropped(self, packet: FiveTuple | None, reason: str) -> None:
        self.drops.append((packet, reason))


class Watched(Gateway):
    """A gateway with all that can begin, change or end an entry, and a watcher."""

    def __init__(self, **choice: Any) -> None:
        super().__init__(**self.all_of_it(choice))
        self.copy = Copy()
        self.flushed: set[IpMasq] = set()  # of which the watcher will be told
        self.sessions.watch.subscribe(self.copy)
        self.masq.inbound.maddrs = {number(GATEWAY)}

    def all_of_it(self, choice: dict[str, Any]) -> dict[str, Any]:
        alive = [Server(server.address, server.port) for server in INSIDE_SERVERS]
        trigger = Trigger(
            (TCP, [range(TRIGGERING, TRIGGERING + 1)]), TCP, range(TRIGGERED, TRIGGERED + 1), 20
        )
        return {
            "ports": MPORTS[:6],
            "max_entries": 8,
            "filtering": "endpoint-independent",
            "timeouts": Timeouts(tcp_syn_sent=20, tcp_established=100, udp=10, icmp=5),
            "apps": helpers({"ftp": [FTP]}),
            "forwards": Forwards([Forward(TCP, range(FORWARDED, FORWARDED + 1), alive)], [trigger]),
        } | choice

    # -- what may happen ---------------------------------------------------------------

    def leaves(self, protocol: int, host: str, sport: int, daddr: str, dport: int, f: int) -> None:
        inside, outside = (host, sport), (daddr, dport)
        if protocol == TCP:
            self.out(tcp(inside, outside, f))
        elif protocol == UDP:
            self.out(udp(inside, outside, b"ask"))
        else:
            self.out(query(inside, daddr))

    def comes(self, protocol: int, saddr: str, sport: int, mport: int, flags: int) -> None:
        there = (self.address, mport)
        self.into(
            tcp((saddr, sport), there, flags) if protocol == TCP else udp((saddr, sport), there)
        )

    def is_announced(self, host: str, port: int) -> None:
        """Have an FTP client announce a port, so that its server is expected to connect."""
        high, low = divmod(port, 256)
        line = f"PORT {host.replace('.', ',')},{high},{low}\r\n".encode()
        client, server = (host, 40000), (SERVERS[0], FTP)
        self.out(tcp(client, server, SYN, seq=99))
        for ms in self.sessions.entries():
            if (ms.saddr, ms.dport) == (number(host), FTP):
                mapped = self.address, ms.mport
                self.into(tcp(server, mapped, SYN | ACK, seq=199, ack=100))
                self.out(tcp(client, server, ACK, b"USER me\r\n" + line, seq=100, ack=200))
                return

    def is_looked_for(self, mport: int, sport: int) -> None:
        """Have an entry made for whoever comes first, as a program may; a `sport` of 0 is open."""
        flags = int(Flags.NO_DADDR | Flags.NO_DPORT | Flags.NO_REPLY)
        if not sport:
            flags |= Flags.NO_SPORT
        there = number(self.address), mport, number(HOSTS[0]), sport, 0, 0
        ms = self.sessions.ip_masq_new(UDP, *there, flags)
        if ms is not None:
            self.sessions.ip_masq_put(ms)

    def is_renumbered(self, address: str) -> None:
        gone, self.address = self.address, address
        self.masq.inbound.maddrs = {number(address)}
        if gone != address:
            for ms in entries_on(self, number(gone)):
                self.masq.masq_address_gone(ms, self.now)

    def loses_a_server(self, which: int, alive: bool) -> None:
        self.sessions.forwards.all[0].servers[which].alive = alive

    def is_deleted(self, which: int) -> None:
        if entries := self.sessions.entries():
            self.sessions.remove(entries[which % len(entries)], DELETED)

    def is_flushed(self) -> None:
        entries = self.sessions.entries()
        assert self.masq.flush() == len(entries)
        assert not self.sessions.entries()
        self.flushed.update(entries)

    def is_reloaded(self, max_entries: int) -> None:
        self.configure(**self.all_of_it({"max_entries": max_entries}))

    # -- what is true at every moment ----------------------------------------------------

    def verify(self) -> None:
        entries = self.sessions.entries()
        self.flushed &= self.copy.identities.keys()
        known = {*entries} | self.flushed
        assert self.copy.identities == {ms: Identity.of(ms) for ms in known}
        assert self.copy.states == {ms: ms.state for ms in known}
        assert self.copy.unanswered == {ms for ms in known if ms.flags & Flags.NO_REPLY}
        assert self.copy.helpers_begun.keys() == {ms for ms in known if ms.app is not None}
        account = self.sessions.account()
        live = Counter(row(ms.protocol) for ms in entries)
        for name in ROWS:
            assert account.live[name] == live[name]
            assert account.created[name] == sum(account.ended[name].values()) + live[name]
        told = Counter(reason for _, reason in (*self.copy.refusals, *self.copy.drops))
        assert told == self.errors
        to_be_told = Counter({FLUSHED: len(self.flushed)} if self.flushed else {})
        assert self.copy.ended_for + to_be_told == self.ended
        for ms in entries:
            rewrite = ms.rewrite
            if rewrite is not None:
                assert ms.app is None
                there = rewrite.saddr, rewrite.sport, rewrite.maddr, rewrite.mport
                assert there == (ms.saddr, ms.sport, ms.maddr, ms.mport)


hosts, servers = st.sampled_from(HOSTS), st.sampled_from(SERVERS)
sports, mports = st.sampled_from((40000, 40000, 40001, 5000)), st.sampled_from(MPORTS)
dports = st.sampled_from((80, 80, 443, FTP, TRIGGERING))
all_flags = st.sampled_from((SYN, SYN, SYN | ACK, ACK, FIN | ACK, RST))
protocols = st.sampled_from((TCP, TCP, UDP, ICMP))

STEPS = st.one_of(
    st.tuples(st.just("leaves"), protocols, hosts, sports, servers, dports, all_flags),
    st.tuples(st.just("comes"), st.sampled_from((TCP, UDP)), servers, dports, mports, all_flags),
    st.tuples(st.just("is_announced"), hosts, st.sampled_from((5000, 5001))),
    st.tuples(st.just("is_looked_for"), mports | st.just(0), st.sampled_from((5000, 0))),
    st.tuples(st.just("is_renumbered"), st.sampled_from((GATEWAY, NEW_ADDRESS))),
    st.tuples(st.just("loses_a_server"), st.sampled_from((0, 1)), st.booleans()),
    st.tuples(st.just("passes"), st.sampled_from((0.3, 6.0, 25.0, 300.0))),
    st.tuples(st.just("is_deleted"), st.integers(0, 9)),
    st.tuples(st.just("is_flushed")),
    st.tuples(st.just("is_reloaded"), st.sampled_from((3, 8))),
)


@settings(max_examples=500)
@given(
    st.fixed_dictionaries(
        {"fast": st.booleans()},
        optional={
            "mapping": st.just("address-and-port-dependent"),
            "max_ports_per_host": st.just(2),
            "max_entries_per_host": st.just(3),
            "max_new_per_host": st.just(2),
        },
    ),
    st.lists(STEPS, min_size=5, max_size=40),
)
def test_what_is_created_has_ended_or_lives_and_a_watcher_knows_the_table(
    choice: dict[str, Any], steps: list[tuple[Any, ...]]
) -> None:
    gateway = Watched(**choice)
    for name, *arguments in steps:
        getattr(gateway, name)(*arguments)
        gateway.verify()
    for reason in gateway.copy.ended_for:
        event(f"ended: {reason}")


def test_every_reason_for_an_end_is_told() -> None:
    """Each reason is told once, and no other."""
    gateway = Watched(max_entries=100)
    gateway.leaves(UDP, HOSTS[0], 40000, SERVERS[0], 80, 0)
    gateway.passes(11)  # expired
    client: Endpoint = ("198.51.100.7", 9)
    gateway.into(tcp(client, (GATEWAY, FORWARDED), SYN))
    (ms,) = gateway.sessions.entries()
    assert isinstance(ms.server, Server)
    ms.server.alive = False
    gateway.into(tcp(client, (GATEWAY, FORWARDED), SYN))  # server
    gateway.into(tcp(client, (GATEWAY, FORWARDED), RST))
    gateway.out(tcp(("10.0.0.9", 80), client, RST | ACK))
    gateway.into(tcp(client, (GATEWAY, FORWARDED), SYN))  # replaced
    gateway.out(tcp(("10.0.0.9", 80), client, RST | ACK))
    gateway.passes(300)  # closed
    gateway.is_announced(HOSTS[0], 5000)
    gateway.into(tcp((SERVERS[0], FTP), (GATEWAY, 61001), RST, seq=200))  # helper
    gateway.is_flushed()  # flushed, the control connection alone
    gateway.passes(0)
    gateway.leaves(UDP, HOSTS[0], 40000, SERVERS[0], 80, 0)
    gateway.is_deleted(0)  # deleted
    mapped = gateway.send(INSIDE, SERVER)
    assert gateway.lets_in(SERVER, mapped)
    gateway.is_renumbered(NEW_ADDRESS)  # address
    gateway.configure(max_entries=1)
    gateway.send(INSIDE, SERVER)
    gateway.send(NEIGHBOUR, SERVER)  # evicted
    assert gateway.copy.ended_for == dict.fromkeys(ENDINGS, 1)


def test_a_refused_session_is_told_with_its_five_values() -> None:
    gateway = Watched(ports=MPORTS[:1])
    gateway.send(INSIDE, SERVER)
    assert gateway.out(udp(NEIGHBOUR, SERVER)) is None
    session = FiveTuple(UDP, number(NEIGHBOUR[0]), NEIGHBOUR[1], number(SERVER[0]), SERVER[1])
    assert gateway.copy.refusals == [(session, "no_port")]
    assert gateway.copy.drops == []


@pytest.mark.parametrize(
    ("packet", "reason", "told"),
    [
        (tcp(INSIDE, SERVER)[:30], "malformed", FiveTuple(TCP, number(INSIDE[0]), 0, 0, 0)),
        (icmp(INSIDE[0], SERVER[0], REDIRECT, 0, bytes(4)), "unknown", None),
        (b"\x45", "malformed", None),
    ],
)
def test_a_dropped_packet_is_told_as_far_as_it_can_be_read(
    packet: bytes, reason: str, told: FiveTuple | None
) -> None:
    gateway = Watched()
    assert gateway.out(packet) is None
    ((five, why),) = gateway.copy.drops
    assert why == reason
    if told is not None:
        assert five == told._replace(daddr=number(SERVER[0]))


def test_a_helper_that_cannot_be_bound_leaves_no_entry_and_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_: object) -> None:
        raise ZeroDivisionError

    gateway = Watched()
    monkeypatch.setattr(gateway.sessions.helpers.apps[TCP, FTP], "bind", fails)
    with pytest.raises(ZeroDivisionError):
        gateway.out(tcp(INSIDE, (SERVER[0], FTP), SYN))
    assert gateway.copy.ended_for == {"helper": 1}
    gateway.verify()


def test_an_entry_that_moves_or_is_completed_is_told_with_what_it_was_known_by() -> None:
    gateway = Watched()
    gateway.send(INSIDE, SERVER)
    gateway.is_renumbered(NEW_ADDRESS)
    assert gateway.send(INSIDE, SERVER)[0] == NEW_ADDRESS
    gateway.verify()
    gateway.is_looked_for(0, 0)
    gateway.send((HOSTS[0], 5000), SERVER)
    gateway.verify()
    assert len(gateway.copy.identities) == 2


def test_a_helper_that_begins_anew_with_another_connection_is_told_of_again() -> None:
    gateway = Watched()
    for seq in (99, 99, 500):
        gateway.out(tcp(INSIDE, (SERVER[0], FTP), SYN, seq=seq))
    assert list(gateway.copy.helpers_begun.values()) == [2]


def test_a_helper_that_comes_to_an_entry_takes_its_rewrite_away() -> None:
    gateway = Gateway()
    gateway.out(tcp(INSIDE, SERVER, SYN))
    (ms,) = gateway.sessions.entries()
    assert ms.rewrite is not None
    gateway.sessions.ip_masq_helped(ms)
    assert ms.rewrite is None


def test_who_unsubscribes_hears_no_more() -> None:
    gateway = Watched()
    gateway.sessions.watch.unsubscribe(gateway.copy)
    gateway.send(INSIDE, SERVER)
    assert gateway.copy.identities == {}


def test_only_what_is_overridden_is_called() -> None:
    """What nobody hears of costs nothing."""
    gateway = Gateway()
    watch = gateway.sessions.watch
    assert watch.made == watch.changed == watch.answered == watch.refused == watch.dropped == ()
