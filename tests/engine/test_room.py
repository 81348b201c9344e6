"""Room for new entries: which entry gives way, or gives up its port, when there is no more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import BEHAVIOURS, UDP, IpMasq, Settings
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.port_choice import PortChoice
from nfmasq.engine.port_claim import FEW_PORTS, PATIENCE
from nfmasq.engine.port_reuse import PortReuse
from nfmasq.engine.room import Room
from nfmasq.engine.table.entry import NO_REPLY, UNCONFIRMED
from nfmasq.engine.table.limits import InsideHosts
from nfmasq.engine.table.states import STATE_UDP
from nfmasq.engine.table.tables import Tables
from tests.gateway import (
    GATEWAY,
    INSIDE,
    NEIGHBOUR,
    NEW_ADDRESS,
    OTHER_SERVER,
    SERVER,
    Gateway,
    endpoints,
)
from tests.packets import ACK, SYN, Endpoint, dotted, number, source, tcp, udp

EI, AD, APD = BEHAVIOURS
MANY = 2 * FEW_PORTS


def test_when_the_table_is_full_what_nobody_answered_goes_first_and_the_oldest_of_it() -> None:
    gateway = Gateway(max_entries=10)
    assert gateway.connects(INSIDE, SERVER)
    gateway.flood(NEIGHBOUR[0], 9)
    assert gateway.connects(INSIDE, OTHER_SERVER)
    assert gateway.ended == {"evicted": 1}
    left = {ms.sport for ms in gateway.sessions.entries() if ms.saddr != ms.maddr}
    assert 1024 not in left
    assert 1025 in left
    assert gateway.out(tcp(INSIDE, SERVER, ACK)) is not None
    assert gateway.errors == {}


def test_a_full_table_of_answered_entries_takes_no_more_and_loses_none() -> None:
    gateway = Gateway(max_entries=5)
    for inside in endpoints(INSIDE[0], 5):
        assert gateway.connects(inside, SERVER)
    assert not any(gateway.flood(NEIGHBOUR[0], 20))
    assert gateway.ended == {}
    assert gateway.errors == {"no_room": 20}
    assert len(gateway.sessions.entries()) == 5


def test_a_syn_flood_of_one_host_leaves_the_others_working() -> None:
    gateway = Gateway(max_entries=1000)
    assert gateway.connects(NEIGHBOUR, SERVER)
    for round_number in range(20):
        gateway.flood(INSIDE[0], 4000)
        assert gateway.connects((NEIGHBOUR[0], 50_000 + round_number), SERVER)
    assert gateway.out(tcp(NEIGHBOUR, SERVER, ACK, b"go on")) is not None


def test_a_host_with_few_ports_gets_one_of_a_host_that_took_all_without_an_answer() -> None:
    gateway = Gateway(ports=range(61000, 61000 + MANY))
    assert all(gateway.flood(INSIDE[0], MANY))
    assert gateway.sessions.ports_free(6) == 0
    assert gateway.connects(NEIGHBOUR, SERVER)
    assert not any(gateway.flood(INSIDE[0], MANY + 5)[MANY:])


def test_a_host_gets_a_port_to_share_of_a_host_that_uses_all_of_them_with_the_same_server() -> None:
    gateway = Gateway(ports=range(61000, 61000 + MANY), mapping=APD)
    for server in (SERVER, OTHER_SERVER):
        sent = [gateway.out(tcp(inside, server, SYN)) for inside in endpoints(INSIDE[0], MANY)]
        assert None not in sent
    for server in (SERVER, OTHER_SERVER):
        tries = (gateway.connects(NEIGHBOUR, server) for _ in range(4))
        assert any(tries), "a program tries again, and each time others are looked at"
    assert gateway.ended == {"evicted": 2}


@pytest.mark.parametrize("oldest", [True, False])
def test_an_entry_that_takes_a_port_as_it_moves_goes_on_waiting_in_its_line(oldest: bool) -> None:
    gateway = Gateway(ports=range(61000, 61000 + MANY), when_ports_run_out="refuse")

    def begin_on_the_former_address() -> None:
        gateway.address = GATEWAY
        gateway.send(INSIDE, SERVER)

    if oldest:
        begin_on_the_former_address()
    gateway.address = NEW_ADDRESS
    for host in range(MANY):
        gateway.send((f"10.9.{host}.2", 1000), SERVER)
    if not oldest:
        begin_on_the_former_address()
    gateway.passes(PATIENCE + 1)
    gateway.address = NEW_ADDRESS
    gateway.send(INSIDE, SERVER)
    assert gateway.ended == {"evicted": 1}
    (moved,) = (ms for ms in gateway.sessions.entries() if ms.saddr == number(INSIDE[0]))
    assert moved.maddr == number(NEW_ADDRESS)

    gave_way = [gateway.sessions.room.gives_way(number(INSIDE[0])) for _ in range(MANY)]
    assert moved in gave_way
    assert None not in gave_way


def test_of_a_flood_from_many_addresses_the_oldest_give_up_their_ports() -> None:
    gateway = Gateway(ports=range(61000, 61000 + MANY))
    hosts = [f"10.0.1.{n + 1}" for n in range(MANY)]
    gateway.masq.hosts_are_there(map(number, hosts), gateway.now)
    for host in hosts:
        assert gateway.out(tcp((host, 1024), SERVER, SYN)) is not None
    assert not gateway.connects(NEIGHBOUR, SERVER)
    gateway.passes(11)
    assert gateway.connects(NEIGHBOUR, SERVER)


def test_no_host_gets_a_port_whose_session_was_answered() -> None:
    gateway = Gateway(ports=range(61000, 61000 + MANY))
    for inside in endpoints(INSIDE[0], MANY):
        assert gateway.connects(inside, SERVER)
    assert not gateway.connects(NEIGHBOUR, SERVER)
    assert gateway.errors == {"no_port": 1}


@given(steps=st.lists(st.sampled_from(["new", "answer", "expire", "full"]), max_size=60))
def test_no_answered_entry_is_ever_evicted(steps: list[str]) -> None:
    gateway = Gateway(max_entries=8)
    answered: dict[Endpoint, Endpoint] = {}
    unanswered: dict[Endpoint, Endpoint] = {}
    for nth, step in enumerate(steps):
        if step == "new":
            inside = (INSIDE[0], 1024 + nth)
            sent = gateway.out(udp(inside, SERVER))
            if sent is not None:
                unanswered[inside] = source(sent)
        elif step == "answer" and unanswered:
            inside, mapped = unanswered.popitem()
            if gateway.lets_in(SERVER, mapped):
                answered[inside] = mapped
        elif step == "expire":
            gateway.passes(301)
            answered.clear()
            unanswered.clear()
        elif step == "full":
            for n in range(16):
                gateway.out(udp((NEIGHBOUR[0], 30_000 + 16 * nth + n), SERVER))
        assert all(gateway.lets_in(SERVER, mapped) for mapped in answered.values())
        assert gateway.sessions.entry_count(UDP) <= 8


def test_datagrams_to_a_forwarded_port_take_no_room_until_their_sender_answers_an_answer() -> None:
    server = Server(number(INSIDE[0]), INSIDE[1])
    gateway = Gateway(
        max_entries=100, forwards=Forwards([Forward(UDP, range(8080, 8081), [server])])
    )
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    here = (GATEWAY, 8080)
    forged = endpoints("198.51.100.7", 200)
    for sender in (*forged, *(each for each in forged for _ in range(2))):
        assert gateway.lets_in(sender, here)
    for _ in range(2):
        assert gateway.lets_in(SERVER, here)
        gateway.send(INSIDE, SERVER)
    for sender in forged:
        assert gateway.lets_in(sender, here)
    assert gateway.out(udp(INSIDE, SERVER)) == udp(here, SERVER)
    assert SERVER in {
        (dotted(ms.daddr), ms.dport)
        for ms in gateway.sessions.entries()
        if not ms.flags & UNCONFIRMED
    }


def test_room_by_itself_picks_the_oldest_that_nobody_answered() -> None:
    """Without a masquerade: entries come and go, and it says which gives way."""
    hosts = InsideHosts()
    tables = Tables(lambda ms: None, lambda ms, holder: None)
    reuse = PortReuse()
    room = Room(tables, hosts, PortChoice(tables, hosts, reuse, Settings()), reuse)
    room.max_entries = 3
    entries = [
        IpMasq(UDP, 1, 61000 + n, 2, 1000 + n, 3, 53, NO_REPLY, [300.0] * 20, STATE_UDP)
        for n in range(3)
    ]
    for ms in entries:
        tables.ip_masq_hash(ms)
        room.entered(ms)
    entries[0].flags &= ~NO_REPLY
    room.answered(entries[0])
    entries[1].refcnt += 1
    assert room.entries == room.of_protocol(UDP) == 3
    assert room.gives_way(2) is entries[2]
    room.left(entries[2])
    assert room.entries == 2
    assert room.gives_way(2) is None
