"""The limits of an inside host: how many entries, ports, and new entries a second it may have."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import BEHAVIOURS
from nfmasq.engine.table.limits import TokenBucket
from tests.gateway import INSIDE, NEIGHBOUR, OTHER_SERVER, SERVER, Gateway, endpoints
from tests.packets import SYN, Endpoint, source, tcp, udp

EI, AD, APD = BEHAVIOURS


def test_a_host_has_no_more_entries_than_its_limit_and_others_are_not_concerned() -> None:
    gateway = Gateway(max_entries_per_host=3)
    assert gateway.flood(INSIDE[0], 4) == [True, True, True, False]
    assert gateway.errors == {"host_entries": 1}
    assert gateway.flood(NEIGHBOUR[0], 3) == [True] * 3
    gateway.passes(241)
    assert gateway.flood(INSIDE[0], 4) == [True, True, True, False]


def test_a_host_takes_no_more_ports_than_its_limit_but_has_sessions_on_those_it_has() -> None:
    gateway = Gateway(max_ports_per_host=2)
    assert gateway.flood(INSIDE[0], 3) == [True, True, False]
    assert gateway.errors == {"host_ports": 1}
    assert gateway.out(tcp(endpoints(INSIDE[0], 1)[0], OTHER_SERVER, SYN)) is not None
    assert gateway.flood(NEIGHBOUR[0], 2) == [True] * 2


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
    assert gateway.flood(INSIDE[0], 7) == [True] * 5 + [False] * 2
    assert gateway.errors == {"host_rate": 2}
    assert gateway.flood(NEIGHBOUR[0], 5) == [True] * 5
    gateway.passes(0.5)
    more = [(INSIDE[0], 5000 + n) for n in range(3)]
    assert [gateway.out(udp(inside, SERVER)) is not None for inside in more] == [True, True, False]


def test_a_host_at_its_rate_goes_on_with_what_it_has() -> None:
    gateway = Gateway(max_new_per_host=1)
    for _ in range(20):
        gateway.send(INSIDE, SERVER)


def test_what_outsiders_make_leaves_half_of_a_hosts_entries_to_it() -> None:
    gateway = Gateway(filtering=EI, max_entries_per_host=8)
    mapped = gateway.send(INSIDE, SERVER)
    outsiders: list[Endpoint] = [("198.51.100.50", port) for port in range(1, 21)]
    for outsider in outsiders[:4] * 2:  # who goes on after an answer makes no room
        assert gateway.lets_in(outsider, mapped)
        gateway.send(INSIDE, outsider)
    assert not any(gateway.lets_in(outsider, mapped) for outsider in outsiders[4:])
    assert gateway.flood(INSIDE[0], 4) == [True] * 3 + [False]


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
