"""Which server gets the next connection: what each scheduler promises."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine.forward.schedulers import SCHEDULERS
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.states import CLOSE, ESTABLISHED

servers_of_weight = st.lists(st.integers(1, 20), min_size=1, max_size=6).map(
    lambda weights: [Server(number, 80, weight) for number, weight in enumerate(weights)]
)


@given(servers=servers_of_weight, rounds=st.integers(1, 5))
def test_round_robin_gives_each_server_as_many(servers: list[Server], rounds: int) -> None:
    choose = SCHEDULERS["rr"]()
    chosen = Counter(choose(servers, 1) for _ in range(rounds * len(servers)))
    assert all(chosen[server] == rounds for server in servers)


@given(servers=servers_of_weight, rounds=st.integers(1, 3))
def test_weighted_round_robin_gives_by_weight_and_never_late(
    servers: list[Server], rounds: int
) -> None:
    choose = SCHEDULERS["wrr"]()
    total = sum(server.weight for server in servers)
    chosen: Counter[Server] = Counter()
    for number in range(1, rounds * total + 1):
        chosen[choose(servers, 1)] += 1
        for server in servers:
            assert abs(chosen[server] - number * server.weight / total) < len(servers)
    assert all(chosen[server] == rounds * server.weight for server in servers)


@given(servers=servers_of_weight, data=st.data())
def test_a_changed_weight_counts_from_the_next_connection_on(
    servers: list[Server], data: st.DataObject
) -> None:
    choose = SCHEDULERS["wrr"]()
    for _ in range(data.draw(st.integers(0, 50))):
        choose(servers, 1)
    for server in servers:
        server.weight = data.draw(st.integers(1, 20))
    total = sum(server.weight for server in servers)
    chosen = Counter(choose(servers, 1) for _ in range(20 * total))
    for server in servers:
        assert abs(chosen[server] - 20 * server.weight) <= 2 * 20


@given(servers=servers_of_weight, connections=st.lists(st.integers(0, 5), max_size=100))
def test_least_connection_keeps_the_servers_level(
    servers: list[Server], connections: list[int]
) -> None:
    choose = SCHEDULERS["lc"]()
    for _ in connections:
        choose(servers, 1).entered(ESTABLISHED)
    counts = [server.active for server in servers]
    assert max(counts) - min(counts) <= 1


@given(servers=servers_of_weight, many=st.integers(0, 200))
def test_weighted_least_connection_keeps_the_servers_in_proportion(
    servers: list[Server], many: int
) -> None:
    choose = SCHEDULERS["wlc"]()
    for _ in range(many):
        choose(servers, 1).entered(ESTABLISHED)
    total = sum(server.weight for server in servers)
    for server in servers:
        assert server.active <= many * server.weight / total + len(servers)


def test_connections_one_after_the_other_are_in_proportion_too() -> None:
    """Each connection is over before the next begins, and still counts, as inactive."""
    light, heavy = Server(1, 80, 1), Server(2, 80, 3)
    choose = SCHEDULERS["wlc"]()
    for _ in range(1000):
        choose([light, heavy], 1).entered(CLOSE)
    assert (light.inactive, heavy.inactive) == (250, 750)


def test_a_connection_that_closes_hardly_counts() -> None:
    busy, closing = Server(1, 80), Server(2, 80)
    busy.entered(ESTABLISHED)
    for _ in range(200):
        closing.entered(CLOSE)
    assert SCHEDULERS["lc"]()([busy, closing], 1) is closing


@given(servers=servers_of_weight, clients=st.sets(st.integers(0, 2**32 - 1), max_size=50))
def test_source_hash_keeps_a_client_on_its_server_and_moves_only_clients_of_a_server_that_goes(
    servers: list[Server], clients: set[int]
) -> None:
    choose = SCHEDULERS["sh"]()
    before = {client: choose(servers, client) for client in clients}
    assert before == {client: SCHEDULERS["sh"]()(servers, client) for client in clients}
    *left, gone = servers
    if left:
        for client in clients:
            after = choose(left, client)
            assert after is before[client] or before[client] is gone


def test_source_hash_shares_clients_by_weight() -> None:
    servers = [Server(1, 80, 1), Server(2, 80, 3)]
    choose = SCHEDULERS["sh"]()
    share = Counter(choose(servers, client) for client in range(4000))
    assert share[servers[1]] / 4000 == pytest.approx(0.75, abs=0.03)


@given(servers=servers_of_weight, steps=st.lists(st.integers(0, 5), max_size=60))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_servers_may_come_and_go_at_any_time(
    name: str, servers: list[Server], steps: list[int]
) -> None:
    choose = SCHEDULERS[name]()
    for step in steps:
        there = servers[step % len(servers) :]
        assert choose(there, step) in there
