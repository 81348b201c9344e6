"""Which flows go into a flow cache, when they leave it, and what is known of them meanwhile.

The cache is a dictionary here (`carrier.py`). Whatever it carries, a masquerade with it and a
masquerade without it have the same packets, entries, counters and timers.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import TCP, UDP, IpMasq, Settings, Timeouts, Watcher
from nfmasq.engine.cached import CachedFlows
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.port_claim import PROTECTED
from nfmasq.engine.sessions import Sessions
from nfmasq.engine.table.endings import DELETED
from nfmasq.engine.table.entry import CACHED, CACHED_IN, CACHED_OUT, NO_REPLY, OPEN_ENDED, OWN
from nfmasq.engine.table.states import ESTABLISHED, STATE_UDP
from nfmasq.engine.table.tables import TABLE_REFERENCES
from nfmasq.engine.table.timers import TICK
from nfmasq.engine.watch import Identity
from nfmasq.engine.wire.protocols import protocol_name
from tests.engine.carrier import Dictionary, key_of
from tests.engine.two_ways import Puppet, Step, TwoWays, Way
from tests.engine.walks import FLAGS, TIMES, World, walk_for
from tests.gateway import (
    GATEWAY,
    INSIDE,
    NEIGHBOUR,
    NEW_ADDRESS,
    SERVER,
    THREE_PORTS,
    Gateway,
    endpoints,
)
from tests.packets import ACK, FIN, RST, SYN, Endpoint, ip, number, query, source, tcp, udp

LASTING = Settings().flow_cache_after
"""How many packets of a direction come here before it is entered."""

SECONDS = float(os.environ.get("NFMASQ_FUZZ_SECONDS") or (30 if os.environ.get("CI") else 10))


class LeavesBefore(Watcher):
    """Asserts that a flow has left the cache when something has happened to its entry."""

    def changed(self, ms: IpMasq, before: int) -> None:
        assert not ms.flags & CACHED

    def moved(self, ms: IpMasq, before: Identity) -> None:
        assert not ms.flags & CACHED

    def helped(self, ms: IpMasq) -> None:
        assert not ms.flags & CACHED

    def ended(self, ms: IpMasq, reason: str) -> None:
        assert not ms.flags & CACHED


class CachedWay(Way):
    """A masquerade with a flow cache: packets go by the cache where it knows their flow.

    The interface that a packet leaves by is its masquerade address. Flows that are due are entered
    after every third step, and now and then the cache is used no more, and then used again.
    """

    def __init__(self) -> None:
        super().__init__(fast=True)
        self.cache = Dictionary()
        self.masq.use_cache(self.cache)
        self.masq.sessions.watch.subscribe(LeavesBefore())
        self._steps = 0

    def take(self, step: Step) -> object:
        comes_of_it = super().take(step)
        self._steps += 1
        if not self._steps % 3:
            self.masq.enter_lasting()
        if not self._steps % 100:
            self.lose_all()
        return comes_of_it

    def lose_all(self) -> None:
        """Use the cache no more, and then use it again."""
        self.masq.use_cache(None)
        assert nothing_is_left(self.masq.sessions, self.cache)
        self.masq.use_cache(self.cache)

    def out(self, packet: bytes, maddr: int, unsummed: bool) -> bytes | None:
        sent = None if unsummed else self.cache.carry(packet, True, maddr, self.now)
        if sent is not None:
            self.masq.sessions.counters.outbound[protocol_name(packet)].count(sent)
            return self.masq.identification.renewed(sent)
        sent = super().out(packet, maddr, unsummed)
        if sent is not None:
            self.cache.passed_elsewhere(packet, True)
        self.masq.sessions.cached.lasts(maddr)
        return sent

    def into(self, packet: bytes, unsummed: bool) -> bytes | None:
        sent = None if unsummed else self.cache.carry(packet, False, 0, self.now)
        if sent is not None:
            self.masq.sessions.counters.inbound[protocol_name(packet)].count(sent)
            return sent
        sent = super().into(packet, unsummed)
        if sent is not None and sent is not packet:
            self.cache.passed_elsewhere(packet, False)
        self.masq.sessions.cached.lasts(0)
        return sent


class WithAndWithout(TwoWays):
    """A masquerade with a flow cache (`fast`), and a masquerade without (`plain`).

    Whatever is due is swept before each step, in the tick in which it is due: how many entries are
    looked at for that, and how late, may differ. For the same reason all timers end in the middle
    of a tick.
    """

    fast: CachedWay

    def __init__(self) -> None:
        super().__init__(CachedWay(), Way(fast=True))
        self.plain.masq.configure(Settings())  # its fast path knows of the other identification
        for way in (self.fast, self.plain):
            way.now += TICK / 2

    def take(self, step: Step) -> object:
        step = step._replace(seconds=round(step.seconds / TICK) * TICK)
        self._sweep_until(self.plain.now + step.seconds)
        if step.what == "sweep":
            step = step._replace(what="state", args=())
        comes_of_it = super().take(step)
        holds_what_it_may(self.fast.masq.sessions, self.fast.cache)
        return comes_of_it

    def _sweep_until(self, now: float) -> None:
        ways, last = (self.fast, self.plain), int(now / TICK) * TICK
        swept = int(self.plain.now / TICK) * TICK
        while swept < last:
            timers = [ms.timer for way in ways for ms in way.entries() if ms.timer is not None]
            ticks = [(int(timer / TICK) + 1) * TICK for timer in timers]
            swept = min([last, *(tick for tick in ticks if tick > swept)])
            for way in ways:
                assert not way.masq.sweep(swept, 1000)


class SteadyWorld(World):
    """A world in which flows last longer than in others.

    No entry controls another: where both are due in the same tick, their order is chance, and one
    may live on for its timeout.
    """

    flags = (*[ACK] * 20, *FLAGS)
    lines = (b"", b"", b"QU", b"NOOP\r\n", b"PASV\r\n", b"keep 40", b"keep 0", b"nothing")
    times = (0,) * 20 + TIMES


def nothing_is_left(sessions: Sessions, cache: Dictionary) -> bool:
    """Say whether a cache is empty, and no entry takes its flow for one that is carried."""
    entries = sessions.entries()
    at_rest = all(ms.refcnt == TABLE_REFERENCES and not ms.flags & CACHED for ms in entries)
    return at_rest and sessions.cached.flows == 0 and not cache.flows


def holds_what_it_may(sessions: Sessions, cache: Dictionary) -> None:
    """Assert that a cache carries the flows of entries that need a rewrite alone, and no others."""
    cached = [ms for ms in sessions.entries() if ms.flags & CACHED]
    assert sessions.cached.flows == len(cached)
    keys = []
    for ms in cached:
        assert not ms.flags & (NO_REPLY | OPEN_ENDED | OWN)
        assert ms.state == (ESTABLISHED if ms.protocol == TCP else STATE_UDP)
        assert (ms.app, ms.out_seq, ms.in_seq) == (None, None, None)
        assert ms.protocol == TCP or (ms.protocol == UDP and ms.server is None)
        assert ms.refcnt == TABLE_REFERENCES + 1
        for outward, half, index in (
            (True, CACHED_OUT, sessions.tables.out_index),
            (False, CACHED_IN, sessions.tables.in_index),
        ):
            if ms.flags & half:
                keys.append(key_of(ms, outward))
                assert index[ms.protocol][keys[-1][2]] is ms
    assert sorted(cache.flows) == sorted(keys)


def test_whatever_a_cache_carries_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flows are entered with each packet here, since hardly a flow of a walk lasts."""
    each = property(lambda _: 1, lambda *_: None)
    monkeypatch.setattr(CachedFlows, "after", each, raising=False)
    walk_for(SECONDS, WithAndWithout, SteadyWorld)


# -- one flow ------------------------------------------------------------------------

WAN = 7
"""The interface that packets leave by."""


class CachingGateway(Gateway):
    """A gateway with a flow cache, by which packets go as soon as it knows their flow."""

    def __init__(self, cache: Dictionary | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.cache = cache or Dictionary()
        self.masq.use_cache(self.cache)
        self.came_here = 0

    def out(self, packet: bytes) -> bytes | None:
        carried = self.cache.carry(packet, True, WAN, self.now)
        return self._entered(super().out(packet), WAN) if carried is None else carried

    def into(self, packet: bytes) -> bytes | None:
        carried = self.cache.carry(packet, False, 0, self.now)
        return self._entered(super().into(packet), 0) if carried is None else carried

    def _entered(self, sent: bytes | None, interface: int) -> bytes | None:
        self.came_here += 1
        self.sessions.cached.lasts(interface)
        self.masq.enter_lasting()
        return sent

    @property
    def entry(self) -> IpMasq:
        """The only entry."""
        (ms,) = self.sessions.entries()
        return ms


def asks_and_is_answered(gateway: Gateway, times: int, outside: Endpoint = SERVER) -> Endpoint:
    """Send datagrams and have each answered; returns where they seem to come from."""
    for _ in range(times):
        mapped = gateway.send(INSIDE, outside)
        assert gateway.lets_in(outside, mapped)
    return mapped


def connection(gateway: Gateway, packets: int = LASTING) -> Endpoint:
    """Open a connection and send segments both ways; returns where they seem to come from."""
    assert gateway.connects(INSIDE, SERVER)
    for _ in range(packets):
        sent = gateway.out(tcp(INSIDE, SERVER, ACK))
        assert sent is not None
        mapped = source(sent)
        assert gateway.into(tcp(SERVER, mapped, ACK)) == tcp(SERVER, INSIDE, ACK)
    return mapped


def test_a_direction_is_entered_when_it_has_shown_that_it_lasts() -> None:
    gateway = CachingGateway()
    mapped = gateway.send(INSIDE, SERVER)
    assert gateway.lets_in(SERVER, mapped)
    for _ in range(LASTING - 2):
        gateway.send(INSIDE, SERVER)
    assert not gateway.entry.flags & CACHED
    gateway.send(INSIDE, SERVER)
    assert gateway.entry.flags & CACHED == CACHED_OUT
    assert gateway.entry.refcnt == TABLE_REFERENCES + 1
    for _ in range(LASTING - 1):
        assert gateway.lets_in(SERVER, mapped)
    assert gateway.entry.flags & CACHED == CACHED
    assert gateway.entry.refcnt == TABLE_REFERENCES + 1
    assert gateway.came_here == 2 * LASTING
    assert (gateway.sessions.cached.flows, gateway.sessions.cached.entered) == (1, 1)


def test_what_is_carried_is_counted_to_the_byte() -> None:
    gateway, packets = CachingGateway(), 3 * LASTING
    asks_and_is_answered(gateway, packets)
    assert gateway.came_here == 2 * LASTING
    usage, _ = gateway.sessions.account_of(gateway.entry)
    length = len(udp(INSIDE, SERVER, b"question")), len(udp(SERVER, INSIDE, b"answer"))
    assert (usage.packets_out, usage.packets_in) == (packets, packets)
    assert (usage.bytes_out, usage.bytes_in) == (packets * length[0], packets * length[1])
    ms = gateway.entry
    gateway.sessions.remove(ms, DELETED)
    assert (ms.packets_out, ms.bytes_out) == (packets, packets * length[0])
    assert (ms.packets_in, ms.bytes_in) == (packets, packets * length[1])
    assert ms.refcnt == 0


@pytest.mark.parametrize("flags", [SYN, SYN | ACK, FIN | ACK, RST, RST | ACK, 0, FIN])
@pytest.mark.parametrize("outward", [True, False], ids=["out", "in"])
def test_a_segment_that_may_change_the_state_comes_here(flags: int, outward: bool) -> None:
    gateway, twin = CachingGateway(), Gateway()
    mapped = connection(gateway)
    assert connection(twin) == mapped
    assert gateway.entry.flags & CACHED == CACHED
    before = gateway.came_here
    for each in (gateway, twin):
        if outward:
            each.out(tcp(INSIDE, SERVER, flags))
        else:
            each.into(tcp(SERVER, mapped, flags))
    assert gateway.came_here == before + 1
    (plainly,) = twin.sessions.entries()
    assert gateway.entry.state == plainly.state
    assert (gateway.entry.flags & CACHED > 0) == (plainly.state == ESTABLISHED)


def test_what_moves_to_another_address_leaves() -> None:
    gateway = CachingGateway()
    asks_and_is_answered(gateway, LASTING)
    before = gateway.entry
    assert before.flags & CACHED
    assert gateway.sessions.ip_masq_move(before, number(NEW_ADDRESS))
    assert nothing_is_left(gateway.sessions, gateway.cache)


@pytest.mark.parametrize("what", ["dns", "helper", "server", "unanswered", "by address", "ping"])
def test_a_flow_that_needs_more_than_a_rewrite_is_not_entered(what: str) -> None:
    server = Forward(UDP, range(8080, 8081), [Server(number(INSIDE[0]), INSIDE[1])])
    gateway = CachingGateway(
        apps={(UDP, 69): Puppet(UDP)},
        forwards=Forwards([server]),
        other_protocols="by-address",
    )
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    outside = {"dns": (SERVER[0], 53), "helper": (SERVER[0], 69)}.get(what, SERVER)
    for _ in range(3 * LASTING):
        if what in ("dns", "helper"):
            asks_and_is_answered(gateway, 1, outside)
        elif what == "server":
            assert gateway.lets_in(SERVER, (GATEWAY, 8080))
            gateway.send(INSIDE, SERVER)
        elif what == "unanswered":
            gateway.send(INSIDE, SERVER)
        elif what == "by address":
            sent = gateway.out(ip(INSIDE[0], SERVER[0], 50, bytes(20)))
            assert sent is not None
        else:
            assert gateway.out(query(INSIDE, SERVER[0])) is not None
    assert gateway.came_here >= 3 * LASTING
    assert nothing_is_left(gateway.sessions, gateway.cache)


def test_a_connection_to_a_forwarded_port_is_entered() -> None:
    """Its packets can begin another session only with a SYN, which is not carried."""
    server = Forward(TCP, range(8080, 8081), [Server(number(INSIDE[0]), 80)])
    gateway = CachingGateway(forwards=Forwards([server]))
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    here, inside = (GATEWAY, 8080), (INSIDE[0], 80)
    assert gateway.into(tcp(SERVER, here, SYN)) == tcp(SERVER, inside, SYN)
    assert gateway.out(tcp(inside, SERVER, SYN | ACK)) == tcp(here, SERVER, SYN | ACK)
    for _ in range(LASTING):
        assert gateway.into(tcp(SERVER, here, ACK)) == tcp(SERVER, inside, ACK)
    assert gateway.entry.flags & CACHED == CACHED_IN
    came_here = gateway.came_here
    assert gateway.into(tcp(SERVER, here, ACK)) == tcp(SERVER, inside, ACK)
    assert gateway.came_here == came_here
    assert gateway.into(tcp(SERVER, here, SYN)) == tcp(SERVER, inside, SYN)
    assert gateway.came_here == came_here + 1


def test_a_flow_that_the_cache_does_not_take_is_tried_again() -> None:
    gateway = CachingGateway(Dictionary(size=0))
    asks_and_is_answered(gateway, 3 * LASTING)
    assert gateway.sessions.cached.not_taken == 6
    assert nothing_is_left(gateway.sessions, gateway.cache)
    gateway.cache.size = 2
    asks_and_is_answered(gateway, LASTING)
    assert gateway.entry.flags & CACHED == CACHED


def test_a_flow_that_is_due_is_not_entered_when_its_entry_has_ended_meanwhile() -> None:
    gateway = Gateway()
    cache = Dictionary()
    gateway.masq.use_cache(cache)
    asks_and_is_answered(gateway, LASTING)
    gateway.sessions.cached.lasts(WAN)
    assert len(gateway.sessions.cached.due) == 2
    (ms,) = gateway.sessions.entries()
    gateway.sessions.remove(ms, DELETED)
    gateway.masq.enter_lasting()
    assert not gateway.sessions.cached.due
    assert nothing_is_left(gateway.sessions, cache)
    assert ms.refcnt == 0


def test_a_flow_of_the_gateway_itself_is_not_entered() -> None:
    """Its packets do not pass where a cache would see them."""
    gateway = CachingGateway()
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    here = (GATEWAY, 61000)
    assert gateway.masq.ip_fw_own(udp(here, SERVER), gateway.now) is not None
    gateway.into(udp(SERVER, here))
    assert gateway.entry.flags & (OWN | NO_REPLY) == OWN
    gateway.sessions.cached.due.append((gateway.entry, True, WAN))
    gateway.masq.enter_lasting()
    assert nothing_is_left(gateway.sessions, gateway.cache)


def test_without_a_cache_no_packet_is_noted() -> None:
    gateway = Gateway()
    asks_and_is_answered(gateway, 3 * LASTING)
    assert gateway.sessions.cached.lasting == []
    gateway.sessions.cached.lasts(WAN)
    assert not gateway.sessions.cached.due


# -- timers --------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 1100), st.sampled_from(("out", "in"))), max_size=12),
    st.booleans(),
)
def test_a_flow_expires_when_it_is_silent_for_its_timeout_and_not_before(
    uses: list[tuple[int, str]], refreshes: bool
) -> None:
    """`uses` are what passes, and after how many quarters of a second; 1,200 are the timeout."""
    gateway = CachingGateway(inbound_refresh=refreshes)
    mapped = asks_and_is_answered(gateway, LASTING)
    silent_from, here = gateway.now, gateway.came_here
    for quarters, way in uses:
        if gateway.now + quarters / 4 >= silent_from + 300:
            break
        gateway.passes(quarters / 4)
        if way == "out":
            gateway.send(INSIDE, SERVER)
        else:
            assert gateway.lets_in(SERVER, mapped)
        if way == "out" or refreshes:
            silent_from = gateway.now
    assert gateway.came_here == here
    _, timer = gateway.sessions.account_of(gateway.entry)
    assert timer == silent_from + 300
    gateway.passes(timer - gateway.now - TICK)
    assert gateway.sessions.entry_count(UDP) == 1
    gateway.passes(2 * TICK)
    assert gateway.sessions.entry_count(UDP) == 0
    assert not gateway.cache.flows


def test_a_flow_that_leaves_keeps_its_time() -> None:
    gateway = CachingGateway()
    asks_and_is_answered(gateway, LASTING)
    gateway.passes(200)
    gateway.send(INSIDE, SERVER)
    gateway.passes(50)
    gateway.masq.use_cache(None)
    assert gateway.entry.timer == gateway.now - 50 + 300


def test_a_flow_without_a_packet_in_the_cache_has_the_time_that_it_had() -> None:
    """Soon after the start of a machine its clock shows less than many a timeout."""
    gateway = CachingGateway()
    gateway.now = 100.0
    asks_and_is_answered(gateway, LASTING)
    assert gateway.entry.flags & CACHED
    gateway.configure(timeouts=Timeouts(udp=3600))
    gateway.sessions.ip_masq_retime(gateway.entry, gateway.now)
    assert gateway.sessions.account_of(gateway.entry)[1] == 400
    gateway.passes(301)
    assert gateway.sessions.entries() == []


def test_packets_that_came_before_the_refreshing_changed_count_as_before() -> None:
    for before in (True, False):
        gateway = CachingGateway(inbound_refresh=before)
        mapped = asks_and_is_answered(gateway, LASTING)
        gateway.passes(200)
        assert gateway.lets_in(SERVER, mapped)
        gateway.configure(inbound_refresh=not before)
        gateway.passes(200)
        assert gateway.sessions.entry_count(UDP) == before


def test_an_entry_lives_as_long_as_a_flow_in_the_cache_that_it_controls() -> None:
    gateway = CachingGateway()
    asks_and_is_answered(gateway, LASTING)
    controlled = gateway.entry
    gateway.send(NEIGHBOUR, SERVER)
    (control,) = (ms for ms in gateway.sessions.entries() if ms is not controlled)
    assert gateway.sessions.ip_masq_control(controlled, control)
    for _ in range(5):
        gateway.passes(200)
        gateway.send(INSIDE, SERVER)
    assert gateway.sessions.entries() == [controlled, control]
    gateway.passes(1000)
    assert gateway.sessions.entries() == []


# -- ports ---------------------------------------------------------------------------


def test_a_flow_that_is_in_use_in_the_cache_keeps_its_port() -> None:
    gateway = CachingGateway(ports=THREE_PORTS, when_ports_run_out="refuse")
    clients = endpoints(INSIDE[0], 3)
    mapped = [gateway.send(client, SERVER) for client in clients]
    for client, outside in zip(clients, mapped, strict=True):
        assert gateway.lets_in(SERVER, outside)
        for _ in range(LASTING):
            gateway.send(client, SERVER)
    assert gateway.sessions.cached.flows == 3
    gateway.passes(PROTECTED - 1)
    here = gateway.came_here
    gateway.send(clients[0], SERVER)
    gateway.send(clients[2], SERVER)
    assert gateway.came_here == here
    gateway.passes(2)
    assert gateway.send(NEIGHBOUR, SERVER) == mapped[1]
    assert gateway.out(udp((NEIGHBOUR[0], 7), SERVER)) is None
    gateway.passes(PROTECTED)
    assert gateway.out(udp((NEIGHBOUR[0], 7), SERVER)) is not None


# -- what the gate does not do yet ---------------------------------------------------


def test_another_timeout_counts_for_what_is_carried_as_for_what_is_not() -> None:
    """A longer timeout counts from the next packet on, a shorter timeout from now on."""
    for seconds in (200, 400):
        gateway, twin = CachingGateway(), Gateway()
        for each in (gateway, twin):
            asks_and_is_answered(each, LASTING)
            each.passes(100)
            each.send(INSIDE, SERVER)
            each.passes(50)
            each.configure(timeouts=Timeouts(udp=seconds))
            (ms,) = each.sessions.entries()
            each.sessions.ip_masq_retime(ms, each.now)
        assert gateway.sessions.account_of(gateway.entry)[1] == ms.timer


def test_an_entry_that_another_hides_leaves() -> None:
    """Packets find the newest of the entries with the same five values."""
    gateway = CachingGateway()
    asks_and_is_answered(gateway, LASTING)
    ms = gateway.entry
    ends = ms.saddr, ms.sport, ms.daddr, ms.dport
    other = gateway.sessions.ip_masq_new(UDP, ms.maddr, ms.mport + 1, *ends, 0)
    assert other is not None
    assert not ms.flags & CACHED_OUT
