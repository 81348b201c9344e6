"""Work has a bound: a table made to be slow is as quick as a small table.

Each scene builds what an outsider can build, with few and with very many entries, and then times
one piece of work. A structure that is walked would take a hundred to a thousand times as long with
many entries. The bounds are in docs/bounds.md.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from time import perf_counter

import pytest

from nfmasq.engine import BEHAVIOURS, TCP, UDP, Flags, IpMasq
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.port_choice import Ends
from nfmasq.engine.table.endings import DELETED
from tests.gateway import GATEWAY, NEW_ADDRESS, Gateway
from tests.packets import SYN, dotted, number, tcp, udp

EI, AD, APD = BEHAVIOURS
FEW, MANY = 1_000, 100_000
ROUNDS = 30
SLOWER = 8.0
"""How many times as long work may take with many entries: memory that is out of the processor's
caches is slower, and other programs run beside."""

INSIDE = "10.0.0.2", 4000
HOST, MADDR = number(INSIDE[0]), number(GATEWAY)
PEERS = number("172.16.0.0")
SERVED = 8080

Work = Callable[[], object]
Scene = Callable[[int], Work]
"""From how many entries there are to be, the work to time; each call does it once more."""


def peer(n: int, port: int = 53) -> tuple[str, int]:
    """Return an outside endpoint of an address of its own."""
    return dotted(PEERS + n), port


def gateway_for(entries: int, **settings: object) -> Gateway:
    return Gateway(max_entries=4 * entries + 1000, **settings)


def best(work: Work) -> float:
    """Return the seconds of the quickest of some rounds."""
    seconds = []
    for _ in range(ROUNDS):
        begun = perf_counter()
        work()
        seconds.append(perf_counter() - begun)
    return min(seconds)


@contextmanager
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def made(gateway: Gateway, protocol: int, ends: Ends, flags: int = 0) -> IpMasq:
    """Make an entry as a helper does, and give it back."""
    gateway.sessions.now = gateway.now
    ms = gateway.sessions.ip_masq_new(protocol, MADDR, 0, *ends, flags)
    assert ms is not None
    gateway.sessions.ip_masq_put(ms)
    return ms


# -- scenes -----------------------------------------------------------------------------


def a_stray_packet_to_a_port_with_many_expected_sessions(entries: int) -> Work:
    gateway = gateway_for(entries)
    flags = int(Flags.NO_DPORT | Flags.NO_REPLY)
    for n in range(entries):
        ms = made(gateway, TCP, (HOST, 6000, PEERS + n, 0), flags=flags)
    stranger = number("192.0.2.1")
    find = gateway.sessions.tables.ip_masq_in_get_unlocked

    def work() -> None:
        for port in range(20):
            assert find(TCP, stranger, port, MADDR, ms.mport) is None

    return work


def a_new_flow_of_a_host_with_many_expected_sessions(entries: int) -> Work:
    gateway = gateway_for(entries)
    flags = int(Flags.NO_DPORT | Flags.NO_REPLY)
    for n in range(entries):
        made(gateway, TCP, (HOST, 6000, PEERS + n, 0), flags=flags)
    ports = count(10_000)
    return lambda: [gateway.out(tcp((INSIDE[0], next(ports)), peer(1, 80), SYN)) for _ in range(20)]


def the_end_of_a_session_beside_a_namesake(entries: int) -> Work:
    gateway = gateway_for(entries, mapping=APD, ports=range(1024, 65536))
    gateway.out(udp(INSIDE, peer(0, 20)))
    waiting = made(gateway, UDP, (HOST, 4000, PEERS, 0), flags=int(Flags.NO_DPORT))
    gateway.into(udp(peer(0, 20), (GATEWAY, waiting.mport)))
    assert gateway.sessions.tables._out_namesakes
    sent = [made(gateway, UDP, (HOST, 4000, PEERS + n, 53)) for n in range(entries)]
    return lambda: [gateway.sessions.remove(sent.pop(), DELETED) for _ in range(20)]


def a_new_session_where_all_others_are_on_another_address(entries: int) -> Work:
    gateway = gateway_for(entries)
    for n in range(entries):
        gateway.out(udp(INSIDE, peer(n)))
    gateway.address = NEW_ADDRESS
    to = peer(entries)

    def work() -> None:
        for _ in range(20):
            assert gateway.out(udp(INSIDE, to)) is not None
            (ms,) = gateway.sessions.tables.s_table.chain(mapping_on_new_address)
            gateway.sessions.remove(ms, DELETED)

    inside = UDP << 48 | HOST << 16 | INSIDE[1]
    mapping_on_new_address = inside << 33 | number(NEW_ADDRESS) << 1
    return work


def a_session_of_a_server_whose_port_has_many_clients(entries: int) -> Work:
    servers = [Server(HOST, 4000), Server(HOST + 1, 4000)]
    forwards = Forwards([Forward(UDP, range(SERVED, SERVED + 1), servers)])
    gateway = gateway_for(2 * entries, forwards=forwards)
    gateway.masq.inbound.maddrs = {MADDR}
    for n in range(entries):
        gateway.into(udp(peer(n), (GATEWAY, SERVED)))
    assert servers[0].active == entries // 2
    to = peer(entries + 1, 99)

    def work() -> None:
        for _ in range(20):
            assert gateway.out(udp(INSIDE, to)) is not None
            ms = gateway.sessions.tables.ip_masq_out_get_unlocked(
                UDP, HOST, 4000, number(to[0]), 99
            )
            assert ms is not None
            gateway.sessions.ip_masq_put(ms)
            gateway.sessions.remove(ms, DELETED)

    return work


def a_packet_that_the_filtering_judges_where_the_newest_have_ended(entries: int) -> Work:
    gateway = gateway_for(entries, filtering=AD)
    outside = peer(0)[0]
    mapped = gateway.send(INSIDE, (outside, 1))
    gateway.into(udp((outside, 60_000), mapped))
    sessions = [made(gateway, UDP, (HOST, 4000, PEERS, 1 + n % 65_535)) for n in range(entries)]
    while sessions:
        gateway.sessions.remove(sessions.pop(), DELETED)
    find = gateway.sessions.tables.m_table.newest_with
    key = UDP << 48 | MADDR << 16 | mapped[1]
    return lambda: [find(key, PEERS) for _ in range(20)]


def an_entry_that_gives_way_in_a_full_table(entries: int) -> Work:
    gateway = Gateway(max_entries=entries, mapping=EI)
    for n in range(entries):
        gateway.out(udp(INSIDE, peer(n)))
    more = count(entries)
    return lambda: [gateway.out(udp(INSIDE, peer(next(more)))) for _ in range(20)]


def the_end_of_an_entry_in_a_full_slot_of_the_wheel(entries: int) -> Work:
    gateway = gateway_for(entries)
    for n in range(entries):
        gateway.out(udp(INSIDE, peer(n)))
    sessions = gateway.sessions.entries()
    return lambda: [gateway.sessions.remove(sessions.pop(), DELETED) for _ in range(20)]


def a_step_of_the_sweep(entries: int) -> Work:
    gateway = gateway_for(entries)
    for n in range(entries):
        gateway.out(udp(INSIDE, peer(n)))
    gateway.now += 1000
    return lambda: [gateway.masq.sweep(gateway.now, 4) for _ in range(5)]


def a_step_of_a_walk_through_all_entries(entries: int) -> Work:
    gateway = gateway_for(entries)
    for n in range(entries):
        gateway.out(udp(INSIDE, peer(n)))

    def work() -> None:
        walk = gateway.sessions.walk()
        for _ in range(100):
            next(walk)

    return work


def the_end_of_a_session_that_controls_many(entries: int) -> Work:
    gateway = gateway_for(entries)
    controllers = [made(gateway, TCP, (HOST, 4000 + n, PEERS, 21)) for n in range(ROUNDS)]
    for n in range(entries):
        ms = made(gateway, TCP, (HOST, 6000, PEERS + n, 20))
        assert gateway.sessions.ip_masq_control(ms, controllers[n % ROUNDS])
    return lambda: gateway.sessions.remove(controllers.pop(), DELETED)


def a_connection_that_controls_many_loses_its_address(entries: int) -> Work:
    gateway = gateway_for(entries)
    controllers = []
    for n in range(ROUNDS):
        assert gateway.connects((INSIDE[0], 4000 + n), peer(0, 22))
        controllers.append(gateway.sessions.entries()[-1])
    for n in range(entries):
        ms = made(gateway, TCP, (HOST, 6000, PEERS + n, 20))
        assert gateway.sessions.ip_masq_control(ms, controllers[n % ROUNDS])
    return lambda: gateway.masq.masq_address_gone(controllers.pop(), gateway.now)


def a_host_at_its_limit_makes_room_for_itself(entries: int) -> Work:
    gateway = gateway_for(entries, max_entries_per_host=entries)
    for n in range(entries):
        gateway.into(udp(peer(n), gateway.send(INSIDE, peer(n))))
    more = count(entries)
    return lambda: [gateway.out(udp(INSIDE, peer(next(more)))) for _ in range(20)]


def a_port_that_is_given_up_where_there_are_many(entries: int) -> Work:
    # The configuration gives ports as a list, not as a range.
    ports = [*range(1024, 1024 + min(entries, 60_000))]
    gateway = gateway_for(entries, mapping=EI, ports=ports)
    for port in ports[:-700]:
        assert gateway.connects((INSIDE[0], port), peer(0))
    for port in ports[-700:]:
        gateway.out(tcp(("10.0.1.1", port), peer(0), SYN))
    hosts = map(dotted, count(number("10.0.2.1")))
    return lambda: [gateway.out(tcp((next(hosts), 4000), peer(1), SYN)) for _ in range(20)]


SCENES: tuple[Scene, ...] = (
    a_stray_packet_to_a_port_with_many_expected_sessions,
    a_new_flow_of_a_host_with_many_expected_sessions,
    the_end_of_a_session_beside_a_namesake,
    a_new_session_where_all_others_are_on_another_address,
    a_session_of_a_server_whose_port_has_many_clients,
    a_packet_that_the_filtering_judges_where_the_newest_have_ended,
    an_entry_that_gives_way_in_a_full_table,
    the_end_of_an_entry_in_a_full_slot_of_the_wheel,
    a_step_of_the_sweep,
    a_step_of_a_walk_through_all_entries,
    the_end_of_a_session_that_controls_many,
    a_connection_that_controls_many_loses_its_address,
    a_host_at_its_limit_makes_room_for_itself,
    a_port_that_is_given_up_where_there_are_many,
)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_work_does_not_grow_with_the_table(scene: Scene) -> None:
    with no_collections():
        few, many = best(scene(FEW)), best(scene(MANY))
    assert many < SLOWER * few, f"{many * 1e6:.0f} µs, where it was {few * 1e6:.0f} µs"
