"""What happens when one inside host wants more than there is, or more than it may have."""

from __future__ import annotations

from unittest.mock import Mock, patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import BEHAVIOURS, UDP, IpMasq, Timeouts
from nfmasq.engine.room import FEW_PORTS
from nfmasq.engine.table.entry import HASHED, NO_REPLY
from nfmasq.engine.table.limits import TokenBucket
from nfmasq.engine.table.unanswered import Unanswered
from tests.gateway import INSIDE, NEIGHBOUR, OTHER_SERVER, SERVER, Gateway
from tests.packets import (
    ACK,
    ECHO,
    SYN,
    Endpoint,
    checksums_are_right,
    destination_address,
    error,
    query,
    source,
    tcp,
    udp,
)

EI, AD, APD = BEHAVIOURS
PROHIBITED = b"\x03\x0d"
MANY = 2 * FEW_PORTS


def flows(host: str, many: int) -> list[Endpoint]:
    """So many endpoints of an inside host."""
    return [(host, 1024 + port) for port in range(many)]


def flood(gateway: Gateway, host: str, many: int) -> list[bool]:
    """So many SYNs of a host from different ports; which of them got out."""
    return [gateway.out(tcp(flow, SERVER, SYN)) is not None for flow in flows(host, many)]


def connect(gateway: Gateway, inside: Endpoint, server: Endpoint) -> bool:
    """Whether a connection can be opened: the SYN goes out, and its answer comes in."""
    sent = gateway.out(tcp(inside, server, SYN))
    if sent is None:
        return False
    answer = tcp(server, source(sent), SYN | ACK)
    return gateway.into(answer) == tcp(server, inside, SYN | ACK)


def entry() -> IpMasq:
    """An entry that stands in the tables and that nothing came back for."""
    return IpMasq(UDP, 1, 61000, 2, 1024, 3, 53, HASHED | NO_REPLY, Timeouts().table())


# -- limits of a host -----------------------------------------------------------------


def test_a_host_has_no_more_entries_than_its_limit_and_others_are_not_concerned() -> None:
    gateway = Gateway(max_entries_per_host=3)
    assert flood(gateway, INSIDE[0], 4) == [True, True, True, False]
    assert gateway.errors == {"host_entries": 1}
    assert flood(gateway, NEIGHBOUR[0], 3) == [True] * 3
    gateway.passes(241)
    assert flood(gateway, INSIDE[0], 4) == [True, True, True, False]


def test_a_host_takes_no_more_ports_than_its_limit_but_has_sessions_on_those_it_has() -> None:
    gateway = Gateway(max_ports_per_host=2)
    assert flood(gateway, INSIDE[0], 3) == [True, True, False]
    assert gateway.errors == {"host_ports": 1}
    assert gateway.out(tcp(flows(INSIDE[0], 1)[0], OTHER_SERVER, SYN)) is not None
    assert flood(gateway, NEIGHBOUR[0], 2) == [True] * 2


def test_where_sessions_share_ports_a_host_at_its_limit_shares() -> None:
    gateway = Gateway(max_ports_per_host=2, mapping=APD, ports=range(61000, 61010))
    servers: list[Endpoint] = [("198.51.100.7", port) for port in range(1, 21)]
    sent = [gateway.out(tcp(INSIDE, server, SYN)) for server in servers]
    assert len({source(packet) for packet in sent if packet}) == 2
    assert None not in sent
    assert gateway.sessions.ports_free(6) == 8


def test_a_host_still_has_the_port_that_it_took_when_only_others_use_it() -> None:
    gateway = Gateway(max_ports_per_host=2, mapping=APD, ports=range(61000, 61002))
    gateway.send(INSIDE, SERVER)
    gateway.send(INSIDE, SERVER)
    first = gateway.send(INSIDE, OTHER_SERVER)
    shared = gateway.send(NEIGHBOUR, SERVER)
    assert shared[1] in range(61000, 61002)
    assert first[1] in range(61000, 61002)
    hosts = gateway.sessions.hosts
    (held,) = {ms.saddr for ms in gateway.sessions.entries() if ms.mport != shared[1]}
    assert hosts.ports_of(held) == 2
    for _ in range(3):
        gateway.passes(200)
        gateway.send(NEIGHBOUR, SERVER)
    assert held not in {ms.saddr for ms in gateway.sessions.entries()}
    assert hosts.ports_of(held) == 1
    gateway.passes(301)
    assert not gateway.sessions.entries()
    assert hosts.ports_of(held) == 0


def test_a_host_makes_no_more_entries_a_second_than_its_limit() -> None:
    gateway = Gateway(max_new_per_host=5)
    assert flood(gateway, INSIDE[0], 7) == [True] * 5 + [False] * 2
    assert gateway.errors == {"host_rate": 2}
    assert flood(gateway, NEIGHBOUR[0], 5) == [True] * 5
    gateway.passes(0.5)
    more = [(INSIDE[0], 5000 + n) for n in range(3)]
    assert [gateway.out(udp(flow, SERVER)) is not None for flow in more] == [True, True, False]


def test_a_host_at_its_rate_goes_on_with_what_it_has() -> None:
    gateway = Gateway(max_new_per_host=1)
    for _ in range(20):
        gateway.send(INSIDE, SERVER)


def test_what_outsiders_make_leaves_half_of_a_hosts_entries_to_it() -> None:
    gateway = Gateway(filtering=EI, max_entries_per_host=8)
    mapped = gateway.send(INSIDE, SERVER)
    outsiders: list[Endpoint] = [("198.51.100.50", port) for port in range(1, 21)]
    for _ in range(2):  # the second packets of the first four: nobody makes room for another
        assert [gateway.lets_in(outsider, mapped) for outsider in outsiders[:4]] == [True] * 4
    assert not any(gateway.lets_in(outsider, mapped) for outsider in outsiders[4:])
    assert flood(gateway, INSIDE[0], 4) == [True] * 3 + [False]


@given(
    rate=st.integers(1, 100),
    times=st.lists(st.floats(0, 10), min_size=1, max_size=200).map(sorted),
)
def test_a_token_bucket_lets_no_more_through_than_its_burst_and_its_rate(
    rate: int, times: list[float]
) -> None:
    bucket = TokenBucket(rate, rate)
    allowed = [now for now in times if bucket.take(now)]
    for at, begin in enumerate(allowed):
        for count, end in enumerate(allowed[at:], 1):
            assert count <= rate + (end - begin) * rate + 1e-6
    assert allowed[0] == times[0]


# -- when there is no more ------------------------------------------------------------


def test_when_the_table_is_full_what_nobody_answered_goes_first_and_the_oldest_of_it() -> None:
    gateway = Gateway(max_entries=10)
    assert connect(gateway, INSIDE, SERVER)
    flood(gateway, NEIGHBOUR[0], 9)
    assert connect(gateway, INSIDE, OTHER_SERVER)
    assert gateway.ended == {"evicted": 1}
    left = {ms.sport for ms in gateway.sessions.entries() if ms.saddr != ms.maddr}
    assert 1024 not in left
    assert 1025 in left
    assert gateway.out(tcp(INSIDE, SERVER, ACK)) is not None
    assert gateway.errors == {}


def test_a_full_table_of_answered_entries_takes_no_more_and_loses_none() -> None:
    gateway = Gateway(max_entries=5)
    for flow in flows(INSIDE[0], 5):
        assert connect(gateway, flow, SERVER)
    assert not any(flood(gateway, NEIGHBOUR[0], 20))
    assert gateway.ended == {}
    assert gateway.errors == {"no_room": 20}
    assert len(gateway.sessions.entries()) == 5


def test_a_syn_flood_of_one_host_leaves_the_others_working() -> None:
    gateway = Gateway(max_entries=1000)
    assert connect(gateway, NEIGHBOUR, SERVER)
    for round_number in range(20):
        flood(gateway, INSIDE[0], 4000)
        assert connect(gateway, (NEIGHBOUR[0], 50_000 + round_number), SERVER)
    assert gateway.out(tcp(NEIGHBOUR, SERVER, ACK, b"go on")) is not None


def test_a_host_with_few_ports_gets_one_of_a_host_that_took_all_without_an_answer() -> None:
    gateway = Gateway(ports=range(61000, 61000 + MANY))
    assert all(flood(gateway, INSIDE[0], MANY))
    assert gateway.sessions.ports_free(6) == 0
    assert connect(gateway, NEIGHBOUR, SERVER)
    assert not any(flood(gateway, INSIDE[0], MANY + 5)[MANY:])


def test_so_it_does_where_ports_are_shared_and_all_have_a_session_with_the_same_server() -> None:
    gateway = Gateway(ports=range(61000, 61000 + MANY), mapping=APD)
    for server in (SERVER, OTHER_SERVER):
        sent = [gateway.out(tcp(flow, server, SYN)) for flow in flows(INSIDE[0], MANY)]
        assert None not in sent
    for server in (SERVER, OTHER_SERVER):
        tries = (connect(gateway, NEIGHBOUR, server) for _ in range(4))
        assert any(tries), "a program tries again, and each time others are looked at"
    assert gateway.ended == {"evicted": 2}


def test_a_flood_to_one_server_costs_one_search_a_second_for_a_port_to_share() -> None:
    gateway = Gateway(ports=range(61000, 61000 + MANY), mapping=APD)
    flood(gateway, INSIDE[0], MANY)
    looked_at = Mock(wraps=gateway.sessions.choice.ports.get_next_mport)
    with patch.object(gateway.sessions.choice.ports, "get_next_mport", looked_at):
        assert not any(flood(gateway, INSIDE[0], 5 * MANY)[MANY:])
    assert looked_at.call_count <= MANY


def test_of_a_flood_from_many_addresses_the_oldest_give_up_their_ports() -> None:
    gateway = Gateway(ports=range(61000, 61000 + MANY))
    for n in range(MANY):
        assert gateway.out(tcp((f"10.0.1.{n + 1}", 1024), SERVER, SYN)) is not None
    assert not connect(gateway, NEIGHBOUR, SERVER)
    gateway.passes(11)
    assert connect(gateway, NEIGHBOUR, SERVER)


def test_no_host_gets_a_port_whose_session_was_answered() -> None:
    gateway = Gateway(ports=range(61000, 61000 + MANY))
    for flow in flows(INSIDE[0], MANY):
        assert connect(gateway, flow, SERVER)
    assert not connect(gateway, NEIGHBOUR, SERVER)
    assert gateway.errors == {"no_port": 1}


@given(steps=st.lists(st.sampled_from(["new", "answer", "expire", "full"]), max_size=60))
def test_no_answered_entry_is_ever_evicted(steps: list[str]) -> None:
    gateway = Gateway(max_entries=8)
    answered: dict[Endpoint, Endpoint] = {}
    unanswered: dict[Endpoint, Endpoint] = {}
    for number, step in enumerate(steps):
        if step == "new":
            inside = (INSIDE[0], 1024 + number)
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
                gateway.out(udp((NEIGHBOUR[0], 30_000 + 16 * number + n), SERVER))
        assert all(gateway.lets_in(SERVER, mapped) for mapped in answered.values())
        assert gateway.sessions.entry_count(UDP) <= 8


@given(answers=st.lists(st.booleans(), min_size=1, max_size=300))
def test_the_queue_of_the_unanswered_is_never_much_longer_than_the_table(
    answers: list[bool],
) -> None:
    queue = Unanswered()
    table: list[IpMasq] = []
    for answered in [False, *answers]:
        table.append(entry())
        queue.join(table[-1], len(table))
        if answered:
            table.pop().flags = 0
        assert len(queue) <= 2 * len(table) + 2


# -- what a refused host is told --------------------------------------------------------


@pytest.mark.parametrize(
    "packet",
    [tcp(NEIGHBOUR, SERVER, SYN), udp(NEIGHBOUR, SERVER), query(NEIGHBOUR, SERVER[0], ECHO)],
    ids=["tcp", "udp", "icmp"],
)
def test_a_host_whose_session_cannot_be_had_is_told_that_it_is_prohibited(packet: bytes) -> None:
    gateway = Gateway(max_entries=1)
    assert gateway.lets_in(SERVER, gateway.send(INSIDE, SERVER))
    assert gateway.out(packet) is None
    (told,) = gateway.masq.outbox
    assert destination_address(told) == NEIGHBOUR[0]
    assert told[12:16] == bytes(4)
    assert told[20:22] == PROHIBITED
    assert told[28:] == packet
    assert checksums_are_right(told)


def test_refused_packets_are_told_of_at_a_bounded_rate() -> None:
    gateway = Gateway(max_new_per_host=1)
    for _ in range(10):
        flood(gateway, INSIDE[0], 200)
        gateway.passes(0.1)
    assert 100 <= len(gateway.masq.outbox) <= 200


def test_nobody_is_told_of_a_refused_error_or_one_to_a_group() -> None:
    gateway = Gateway(max_entries=1)
    assert gateway.lets_in(SERVER, gateway.send(INSIDE, SERVER))
    gateway.out(udp(NEIGHBOUR, ("224.0.0.251", 5353)))
    gateway.out(udp(NEIGHBOUR, ("255.255.255.255", 67)))
    gateway.out(error(NEIGHBOUR[0], SERVER[0], udp(SERVER, NEIGHBOUR)))
    assert not gateway.masq.outbox
