"""When the masquerade ports run out: who makes room, who shares, and what stays as it was.

With the default 4,096 ports, and the hosts of an ordinary network.
"""

from __future__ import annotations

from collections import Counter
from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import BEHAVIOURS, TCP, UDP
from nfmasq.engine.table.endings import DELETED
from tests.gateway import GATEWAY, INSIDE, NEIGHBOUR, OTHER_SERVER, SERVER, Gateway, endpoints
from tests.packets import (
    ACK,
    FIN,
    RST,
    SYN,
    Endpoint,
    destination,
    dotted,
    number,
    query,
    reply,
    source,
    tcp,
    udp,
)

EI, AD, APD = BEHAVIOURS
ALL = 4096
FEW = 128
RESOLVER: Endpoint = ("198.51.100.53", 53)
MAPPINGS = pytest.mark.parametrize("mapping", BEHAVIOURS)
FEW_PORTS = range(61000, 61000 + FEW)


def fetches(gateway: Gateway, inside: Endpoint, server: Endpoint) -> bool:
    """Open a connection and close it from both sides; says whether it opens."""
    if not gateway.connects(inside, server):
        return False
    sent = gateway.out(tcp(inside, server, FIN | ACK))
    assert sent is not None
    assert gateway.into(tcp(server, source(sent), FIN | ACK)) is not None
    assert gateway.out(tcp(inside, server, ACK)) is not None
    return True


def is_refused_by_server(gateway: Gateway, inside: Endpoint, server: Endpoint) -> bool:
    """Send a SYN that the server answers with a reset; says whether the reset comes back."""
    sent = gateway.out(tcp(inside, server, SYN))
    if sent is None:
        return False
    answer = tcp(server, source(sent), RST | ACK)
    return gateway.into(answer) == tcp(server, inside, RST | ACK)


def asks(gateway: Gateway, inside: Endpoint, server: Endpoint) -> bool:
    """Send a datagram that is answered; says whether the answer comes back."""
    sent = gateway.out(udp(inside, server, b"?"))
    if sent is None:
        return False
    return gateway.into(udp(server, source(sent), b"!")) == udp(server, inside, b"!")


# -- an ordinary network -----------------------------------------------------------------


@MAPPINGS
def test_one_host_opens_more_short_connections_to_one_server_than_there_are_ports(
    mapping: str,
) -> None:
    gateway = Gateway(mapping=mapping)
    for at in range(3 * ALL):
        gateway.now += 0.001
        assert fetches(gateway, (INSIDE[0], 1024 + at), SERVER)
    assert gateway.connects(NEIGHBOUR, SERVER)
    assert gateway.errors == {}
    assert gateway.ended.keys() == {"closed"}


def test_a_scan_of_closed_ports_refuses_nobody() -> None:
    gateway = Gateway()
    for port in range(1, 6000):
        assert is_refused_by_server(gateway, (INSIDE[0], 1024 + port), (SERVER[0], port))
    assert gateway.connects(NEIGHBOUR, SERVER)
    assert gateway.errors == {}


def test_questions_of_dns_do_not_hold_their_ports() -> None:
    gateway = Gateway()
    for at in range(2 * ALL):
        assert asks(gateway, (INSIDE[0], 1024 + at), RESOLVER)
    assert asks(gateway, NEIGHBOUR, RESOLVER)
    assert gateway.errors == {}
    gateway.passes(31)
    assert gateway.sessions.entries() == []


def test_pings_that_were_answered_do_not_hold_their_identifiers() -> None:
    gateway = Gateway()
    for identifier in range(ALL + 100):
        sent = gateway.out(query((INSIDE[0], identifier), SERVER[0]))
        assert sent is not None
        outside = int.from_bytes(sent[24:26], "big")
        answer = gateway.into(reply(SERVER[0], (GATEWAY, outside)))
        assert answer == reply(SERVER[0], (INSIDE[0], identifier))
    assert gateway.errors == {}


@pytest.mark.parametrize("mapping", [EI, AD])
def test_a_host_that_leaves_all_its_connections_open_is_in_nobodys_way(mapping: str) -> None:
    gateway = Gateway(mapping=mapping)
    for inside in endpoints(INSIDE[0], ALL):
        assert gateway.connects(inside, SERVER)
    assert gateway.connects(NEIGHBOUR, OTHER_SERVER)
    assert asks(gateway, NEIGHBOUR, OTHER_SERVER), "UDP has ports of its own"
    assert not gateway.connects(NEIGHBOUR, SERVER), "all ports have a connection to this server"
    assert gateway.ended == {}
    assert gateway.errors == {"no_port": 1}


def test_datagrams_of_many_sockets_are_in_nobodys_way() -> None:
    gateway = Gateway()
    assert gateway.connects(INSIDE, SERVER), "the host is there"
    for inside in endpoints(INSIDE[0], ALL):
        assert asks(gateway, inside, SERVER)
    assert asks(gateway, NEIGHBOUR, OTHER_SERVER)
    assert gateway.ended == {}
    gateway.passes(121)
    assert asks(gateway, NEIGHBOUR, SERVER), "nothing has moved for two minutes"
    assert gateway.ended == {"evicted": 1}


def test_half_an_hour_of_a_network_of_three_hundred_hosts() -> None:
    """Each host has 20 connections open; together they open and close 50 more a second."""
    gateway = Gateway()
    hosts = [f"10.0.{at // 150}.{at % 150 + 1}" for at in range(300)]
    servers = [("198.51.100.7", port) for port in range(1, 101)]
    for host in hosts:
        for inside, server in zip(endpoints(host, 20), servers, strict=False):
            assert gateway.connects(inside, server)
    sports = dict.fromkeys(hosts, 2000)
    turns = islice(zip(cycle(hosts), cycle(servers), strict=False), 50 * 1800)
    for at, (host, server) in enumerate(turns):
        sports[host] += 1
        assert fetches(gateway, (host, sports[host]), server)
        if at % 50 == 49:
            gateway.passes(1)
    assert gateway.errors == {}
    states = Counter(ms.state_name for ms in gateway.sessions.entries())
    assert states["ESTABLISHED"] == 300 * 20
    taken = ALL - gateway.sessions.ports_free(TCP)
    assert taken <= states.total()
    for host in hosts:
        for inside, server in zip(endpoints(host, 20), servers, strict=False):
            sent = gateway.out(tcp(inside, server, ACK, b"still there"))
            assert sent is not None
            answer = gateway.into(tcp(server, source(sent), ACK, b"yes"))
            assert answer == tcp(server, inside, ACK, b"yes")


# -- what is over --------------------------------------------------------------------------


def test_of_what_is_over_the_oldest_goes_first() -> None:
    gateway = Gateway(ports=range(61000, 61004))
    for inside in endpoints(INSIDE[0], 4):
        gateway.now += 1
        assert fetches(gateway, inside, SERVER)
    assert gateway.connects(NEIGHBOUR, SERVER)
    assert {ms.sport for ms in gateway.sessions.entries()} == {1025, 1026, 1027, NEIGHBOUR[1]}


def test_a_connection_that_one_side_has_closed_keeps_its_port() -> None:
    gateway = Gateway(ports=range(61000, 61001), when_ports_run_out="refuse")
    assert gateway.connects(INSIDE, SERVER)
    assert gateway.out(tcp(INSIDE, SERVER, FIN | ACK)) is not None
    assert not gateway.connects(NEIGHBOUR, OTHER_SERVER)
    assert gateway.errors == {"no_port": 1}


def closed_by(gateway: Gateway, inside: Endpoint, server: Endpoint, first: str) -> int:
    """Open a connection and close it from both sides, one after the other; returns its mport."""
    assert gateway.connects(inside, server)
    (mport,) = (ms.mport for ms in gateway.sessions.entries() if ms.sport == inside[1])
    mapped = (GATEWAY, mport)
    for side in ("inside", "outside") if first == "inside" else ("outside", "inside"):
        if side == "inside":
            assert gateway.out(tcp(inside, server, FIN | ACK)) is not None
        else:
            assert gateway.into(tcp(server, mapped, FIN | ACK)) is not None
    return mport


@pytest.mark.parametrize("first", ["inside", "outside"])
def test_a_server_that_remembers_a_connection_gets_no_other_from_its_port(first: str) -> None:
    """Whoever closes first remembers the connection, and takes the next SYN for a late segment."""
    gateway = Gateway(ports=range(61000, 61002))
    to_server = closed_by(gateway, endpoints(INSIDE[0], 1)[0], SERVER, first)
    to_other = closed_by(gateway, (INSIDE[0], 2000), OTHER_SERVER, first)
    gateway.now += 1
    mapped = gateway.out(tcp(NEIGHBOUR, SERVER, SYN))
    assert mapped is not None
    assert source(mapped) == (GATEWAY, to_server if first == "inside" else to_other)


def test_a_server_remembers_a_connection_when_others_have_had_its_port() -> None:
    gateway = Gateway(ports=range(61000, 61002))
    closed_by(gateway, INSIDE, SERVER, "outside")  # by 61000
    assert gateway.connects((INSIDE[0], 2000), OTHER_SERVER)  # by 61001
    gateway.passes(1)
    assert is_refused_by_server(gateway, NEIGHBOUR, OTHER_SERVER)  # by 61000
    gateway.passes(30)
    for ms in gateway.sessions.entries():
        gateway.sessions.remove(ms, DELETED)
    sent = gateway.out(tcp((INSIDE[0], 3000), SERVER, SYN))
    assert sent is not None
    assert source(sent) == (GATEWAY, 61001)


@pytest.mark.parametrize("when", ["overlap", "refuse"])
def test_a_server_that_remembers_all_ports_is_reached_while_others_hold_them(when: str) -> None:
    gateway = Gateway(ports=FEW_PORTS, when_ports_run_out=when)
    for inside in endpoints(INSIDE[0], FEW):
        closed_by(gateway, inside, SERVER, "outside")
    gateway.passes(1)
    for n in range(2 * FEW):
        gateway.out(tcp((f"10.0.9.{n % 100 + 1}", 2000 + n), OTHER_SERVER, SYN))
    assert all(gateway.connects(inside, SERVER) for inside in endpoints(NEIGHBOUR[0], 20))


def test_where_there_is_no_other_port_the_server_gets_another_connection_from_it() -> None:
    gateway = Gateway(ports=range(61000, 61001))
    mport = closed_by(gateway, INSIDE, SERVER, "outside")
    gateway.now += 1
    sent = gateway.out(tcp(NEIGHBOUR, SERVER, SYN))
    assert sent is not None
    assert source(sent) == (GATEWAY, mport)


def test_a_host_that_wants_all_ports_takes_none_of_another_before_its_last_ack() -> None:
    gateway = Gateway(ports=FEW_PORTS, when_ports_run_out="refuse")
    hog = "10.0.0.9"
    assert gateway.connects((hog, 1000), SERVER)
    gateway.flood(hog, FEW - 2)
    mapped = (GATEWAY, closed_by(gateway, INSIDE, SERVER, "outside"))
    assert all(gateway.out(tcp((hog, 5000 + n), SERVER, SYN)) is None for n in range(10))
    assert gateway.into(tcp(SERVER, mapped, ACK)) == tcp(SERVER, INSIDE, ACK)


def test_a_connection_that_opens_again_from_its_port_keeps_it() -> None:
    gateway = Gateway(ports=range(61000, 61001), when_ports_run_out="refuse")
    assert fetches(gateway, INSIDE, SERVER)
    assert gateway.connects(INSIDE, SERVER)
    assert not gateway.connects(NEIGHBOUR, SERVER)
    assert gateway.ended == {}


def test_a_question_of_dns_that_waits_for_its_answer_keeps_its_port() -> None:
    gateway = Gateway(ports=range(61000, 61001), when_ports_run_out="refuse")
    assert asks(gateway, INSIDE, RESOLVER)
    mapped = gateway.send(INSIDE, RESOLVER)
    assert not asks(gateway, NEIGHBOUR, RESOLVER)
    assert gateway.lets_in(RESOLVER, mapped)
    assert asks(gateway, NEIGHBOUR, RESOLVER)


def test_what_is_over_makes_room_in_a_full_table() -> None:
    gateway = Gateway(max_entries=10)
    for inside in endpoints(INSIDE[0], 10):
        assert fetches(gateway, inside, SERVER)
    for inside in endpoints(NEIGHBOUR[0], 10):
        assert gateway.connects(inside, SERVER)
    assert gateway.ended == {"closed": 10}
    assert not gateway.connects(INSIDE, SERVER)


@pytest.mark.parametrize("limit", ["max_ports_per_host", "max_entries_per_host"])
def test_what_is_over_makes_room_for_a_host_at_its_limit(limit: str) -> None:
    gateway = Gateway(**{limit: 10})
    assert fetches(gateway, NEIGHBOUR, SERVER)
    for inside in endpoints(INSIDE[0], 25):
        assert fetches(gateway, inside, SERVER)
    assert gateway.ended == {"closed": 15}
    open_now = [gateway.connects(inside, OTHER_SERVER) for inside in endpoints(INSIDE[0], 15)]
    assert open_now == [True] * 10 + [False] * 5
    assert NEIGHBOUR[0] in {dotted(ms.saddr) for ms in gateway.sessions.entries()}


# -- whose ports go ------------------------------------------------------------------------


def test_of_idle_datagrams_a_session_of_the_host_with_most_ports_goes() -> None:
    gateway = Gateway(ports=FEW_PORTS)
    for inside in endpoints("10.0.0.9", 40):
        assert asks(gateway, inside, SERVER)
    for inside in endpoints(INSIDE[0], FEW - 40):
        assert asks(gateway, inside, SERVER)
    gateway.passes(121)
    assert asks(gateway, NEIGHBOUR, SERVER)
    held = Counter(ms.saddr for ms in gateway.sessions.entries())
    assert held[number(INSIDE[0])] == FEW - 40 - 1


def test_tcp_and_udp_ports_are_counted_apart() -> None:
    """A host with many UDP ports has no more TCP ports than another, and loses none for it."""
    gateway = Gateway(ports=FEW_PORTS, when_ports_run_out="refuse")
    for inside in endpoints(INSIDE[0], FEW):
        assert asks(gateway, inside, SERVER)
    hog = "10.0.0.9"
    assert all(gateway.flood(INSIDE[0], 10))
    assert all(gateway.flood(hog, FEW - 10))
    assert gateway.connects(NEIGHBOUR, SERVER)
    held = Counter(ms.saddr for ms in gateway.sessions.entries() if ms.protocol == TCP)
    assert held[number(INSIDE[0])] == 10
    assert held[number(hog)] == FEW - 10 - 1


# -- what is shared --------------------------------------------------------------------------


def crowded(**settings: object) -> Gateway:
    """Make a gateway of four ports, each with a connection of INSIDE to SERVER."""
    gateway = Gateway(ports=range(61000, 61004), **settings)
    for inside in endpoints(INSIDE[0], 4):
        assert gateway.connects(inside, SERVER)
    return gateway


def test_one_port_serves_two_hosts_with_other_destinations() -> None:
    gateway = crowded()
    sent = gateway.out(tcp(NEIGHBOUR, OTHER_SERVER, SYN))
    assert sent is not None
    assert source(sent)[1] in range(61000, 61004)
    shared = source(sent)
    (holder,) = (
        ms.sport
        for ms in gateway.sessions.entries()
        if ms.mport == shared[1] and ms.saddr == number(INSIDE[0])
    )
    for server, inside in ((SERVER, (INSIDE[0], holder)), (OTHER_SERVER, NEIGHBOUR)):
        answer = gateway.into(tcp(server, shared, ACK, b"for whom?"))
        assert answer is not None
        assert destination(answer) == inside
    assert gateway.sessions.counters.overlapping["tcp"] == 1


def test_where_refusal_is_asked_for_no_port_ever_serves_two_hosts() -> None:
    gateway = crowded(when_ports_run_out="refuse")
    assert gateway.out(tcp(NEIGHBOUR, OTHER_SERVER, SYN)) is None
    assert gateway.errors == {"no_port": 1}


def test_a_guest_keeps_its_port_toward_other_destinations_too() -> None:
    gateway = crowded()
    sent = [gateway.out(tcp(NEIGHBOUR, ("198.51.100.9", port), SYN)) for port in (80, 443, 8080)]
    assert len({source(packet) for packet in sent if packet is not None}) == 1
    assert None not in sent


@pytest.mark.parametrize("filtering", [EI, AD])
def test_what_nobody_asked_for_goes_to_the_endpoint_that_holds_the_port(filtering: str) -> None:
    gateway = Gateway(ports=range(61000, 61001), filtering=filtering)
    mapped = gateway.send(INSIDE, SERVER)
    assert gateway.lets_in(SERVER, mapped)
    assert gateway.send(NEIGHBOUR, OTHER_SERVER) == mapped
    stranger = (OTHER_SERVER[0], 9999)
    packet = udp(stranger, mapped)
    outcome = gateway.into(packet)
    if filtering == AD:
        assert outcome is packet, "the holder has no session with this address"
    else:
        assert outcome is not None
        assert destination(outcome) == INSIDE
    outcome = gateway.into(udp((SERVER[0], 9999), mapped))
    assert outcome is not None
    assert destination(outcome) == INSIDE


def test_the_holder_gets_another_port_toward_a_destination_of_its_guest() -> None:
    gateway = Gateway(ports=range(61000, 61002))
    mapped = gateway.send(INSIDE, SERVER)
    gateway.send((INSIDE[0], 1), SERVER)
    assert gateway.send(NEIGHBOUR, OTHER_SERVER) == mapped
    other = gateway.send(INSIDE, OTHER_SERVER)
    assert other[1] == 61001
    for inside, at in ((NEIGHBOUR, mapped), (INSIDE, other)):
        answer = gateway.into(udp(OTHER_SERVER, at))
        assert answer is not None
        assert destination(answer) == inside


HOSTS = st.sampled_from([INSIDE[0], NEIGHBOUR[0], "10.0.0.4"])
SPORTS = st.integers(1024, 1027)
SERVERS = st.sampled_from([SERVER, OTHER_SERVER, RESOLVER, ("198.51.100.9", 80)])


@given(
    steps=st.lists(st.tuples(HOSTS, SPORTS, SERVERS, st.booleans(), st.integers(0, 200))),
    mapping=st.sampled_from(BEHAVIOURS),
)
def test_every_answer_comes_to_whoever_asked(
    steps: list[tuple[str, int, Endpoint, bool, int]], mapping: str
) -> None:
    """Three ports for a dozen inside endpoints: whatever is shared, nothing is mixed up."""
    gateway = Gateway(ports=range(61000, 61003), mapping=mapping)
    for host, sport, server, is_answered, seconds in steps:
        gateway.passes(seconds)
        inside = (host, sport)
        sent = gateway.out(udp(inside, server, b"?"))
        if sent is not None and is_answered:
            answer = gateway.into(udp(server, source(sent), b"!"))
            assert answer == udp(server, inside, b"!")
        entries = gateway.sessions.entries()
        outside = {(ms.mport, ms.daddr, ms.dport) for ms in entries}
        assert len(outside) == len(entries)
        assert 3 - gateway.sessions.ports_free(UDP) == len({ms.mport for ms in entries})
