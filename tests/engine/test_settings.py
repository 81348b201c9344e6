"""Settings that change: sessions that are there go on, new sessions go by the new settings."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import TCP, UDP, Timeouts
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.forward.trigger import Trigger
from nfmasq.engine.table.mapping import BEHAVIOURS
from tests.gateway import GATEWAY, INSIDE, NEIGHBOUR, OTHER_SERVER, SERVER, Gateway
from tests.packets import ACK, SYN, Endpoint, destination, number, source, tcp, udp

LISTENED: Endpoint = (GATEWAY, 8080)
FIRST: Endpoint = ("10.0.0.2", 80)
SECOND: Endpoint = ("10.0.0.3", 80)


def client(at: int) -> Endpoint:
    return (f"198.51.100.{at % 250 + 1}", 20_000 + at)


def web(*servers: Endpoint, scheduler: str = "rr", persistence: float = 0) -> Forwards:
    """Forward TCP 8080 to these servers, as a configuration newly read does."""
    made = [Server(number(address), port) for address, port in servers]
    return Forwards([Forward(TCP, range(8080, 8081), made, None, scheduler, persistence)])


def gateway_with(forwards: Forwards | None = None, **settings: Any) -> Gateway:
    """Make a gateway that knows its address as a masquerade address, where ports are forwarded."""
    gateway = Gateway(forwards=forwards, **settings)
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    return gateway


def reached(gateway: Gateway, outside: Endpoint) -> Endpoint | None:
    syn = tcp(outside, LISTENED, SYN)
    sent = gateway.into(syn)
    return None if sent is None or sent is syn else destination(sent)


def servers(gateway: Gateway) -> list[Server]:
    return list(gateway.sessions.forwards.all[0].servers)


@pytest.mark.parametrize("fast", [True, False])
def test_a_session_goes_on_on_the_port_it_has(fast: bool) -> None:
    gateway = Gateway(ports=range(61000, 61010), fast=fast)
    mapped = gateway.send(INSIDE, SERVER)
    gateway.configure(ports=range(50000, 50010))
    assert gateway.send(INSIDE, SERVER) == mapped == (GATEWAY, 61000)
    assert gateway.lets_in(SERVER, mapped)
    assert gateway.send(NEIGHBOUR, SERVER) == (GATEWAY, 50000)


def test_a_port_that_a_session_holds_is_not_handed_out_in_the_new_ranges() -> None:
    gateway = Gateway(ports=range(61000, 61004))
    held = {gateway.send((INSIDE[0], 1000 + n), SERVER) for n in range(2)}
    gateway.configure(ports=range(61001, 61004))
    new = {gateway.send((NEIGHBOUR[0], 1000 + n), SERVER) for n in range(2)}
    assert held == {(GATEWAY, 61000), (GATEWAY, 61001)}
    assert new == {(GATEWAY, 61002), (GATEWAY, 61003)}
    assert gateway.sessions.ports_free(UDP) == 0
    gateway.passes(301)
    assert gateway.sessions.ports_free(UDP) == 3


def test_a_shorter_timeout_counts_from_now_and_a_longer_one_from_the_next_packet() -> None:
    gateway = Gateway(timeouts=Timeouts(udp=100))
    gateway.send(INSIDE, SERVER)

    def configured(seconds: float) -> None:
        gateway.configure(timeouts=Timeouts(udp=seconds))
        for ms in gateway.sessions.entries():
            gateway.sessions.ip_masq_retime(ms, gateway.now)

    configured(10)
    gateway.passes(9)
    assert gateway.sessions.entry_count(UDP) == 1
    configured(1000)
    gateway.passes(1.5)
    assert gateway.sessions.entry_count(UDP) == 0

    gateway.send(INSIDE, SERVER)
    configured(100)
    gateway.passes(99)
    gateway.send(INSIDE, SERVER)
    gateway.passes(99)
    assert gateway.sessions.entry_count(UDP) == 1


def test_a_state_entered_from_now_on_has_its_new_timeout() -> None:
    gateway = Gateway()
    sent = gateway.out(tcp(INSIDE, SERVER, SYN))
    assert sent is not None
    gateway.configure(timeouts=Timeouts(tcp_established=50))
    gateway.into(tcp(SERVER, source(sent), SYN | ACK))
    gateway.out(tcp(INSIDE, SERVER, ACK))
    gateway.passes(51)
    assert gateway.sessions.entry_count(TCP) == 0


def test_lower_limits_take_nothing_away_and_give_nothing_more() -> None:
    gateway = Gateway()
    for n in range(5):
        gateway.send((INSIDE[0], 1000 + n), SERVER)
    gateway.configure(max_entries_per_host=3)
    gateway.send((INSIDE[0], 1000), SERVER)
    assert gateway.out(udp((INSIDE[0], 2000), SERVER)) is None
    assert gateway.sessions.entry_count(UDP) == 5
    gateway.configure()
    gateway.send((INSIDE[0], 2000), SERVER)


def test_a_limited_rate_begins_for_hosts_that_are_there() -> None:
    gateway = Gateway()
    gateway.send((INSIDE[0], 1000), SERVER)
    gateway.configure(max_new_per_host=2)
    sent = [gateway.out(udp((INSIDE[0], 2000 + n), SERVER)) for n in range(4)]
    assert [packet is not None for packet in sent] == [True, True, False, False]
    gateway.configure(max_new_per_host=2)
    assert gateway.out(udp((INSIDE[0], 3000), SERVER)) is None


def test_filtering_changes_for_the_next_packet_of_no_session() -> None:
    gateway = Gateway()
    mapped = gateway.send(INSIDE, SERVER)
    assert not gateway.lets_in(OTHER_SERVER, mapped)
    gateway.configure(filtering="endpoint-independent")
    assert gateway.lets_in(OTHER_SERVER, mapped)


@pytest.mark.parametrize("fast", [True, False])
def test_packets_from_outside_keep_an_entry_only_while_the_settings_say_so(fast: bool) -> None:
    gateway = Gateway(timeouts=Timeouts(udp=10), fast=fast)
    mapped = gateway.send(INSIDE, SERVER)
    gateway.passes(8)
    assert gateway.lets_in(SERVER, mapped)
    gateway.passes(8)
    gateway.configure(timeouts=Timeouts(udp=10), inbound_refresh=False)
    assert gateway.lets_in(SERVER, mapped)
    gateway.passes(3)
    assert gateway.sessions.entry_count(UDP) == 0


def test_a_syn_that_nobody_asked_for_is_refused_or_left_as_configured_now() -> None:
    gateway = gateway_with(unsolicited="accept")
    syn = tcp(SERVER, (GATEWAY, 61000), SYN)
    assert gateway.into(syn) is syn
    gateway.configure(unsolicited="drop")
    assert gateway.into(syn) is None
    gateway.configure(unsolicited="accept")
    assert gateway.into(syn) is syn


@given(st.lists(st.sampled_from(BEHAVIOURS), min_size=2, max_size=4), st.data())
def test_whatever_the_mappings_before_each_answer_finds_who_asked(
    mappings: list[str], data: st.DataObject
) -> None:
    """A new session takes nothing from sessions that share its port by an earlier mapping."""
    gateway = Gateway(ports=(61000,), mapping=mappings[0])
    pairs = st.tuples(st.sampled_from([INSIDE, NEIGHBOUR]), st.sampled_from([SERVER, OTHER_SERVER]))
    mapped: dict[tuple[Endpoint, Endpoint], Endpoint] = {}
    for mapping in mappings:
        gateway.configure(ports=(61000,), mapping=mapping)
        for inside, outside in data.draw(st.lists(pairs, max_size=4)):
            sent = gateway.out(udp(inside, outside))
            if sent is not None:
                mapped[inside, outside] = source(sent)
    for (inside, outside), at in mapped.items():
        answer = gateway.into(udp(outside, at))
        assert answer is not None
        assert destination(answer) == inside


def test_settings_may_change_while_packets_pass() -> None:
    """The change holds the lock, and so do the packets; no packet is lost to the change."""
    gateway = Gateway(lock=threading.RLock())
    done = threading.Event()

    def change() -> None:
        for n in range(100):
            gateway.configure(ports=range(61000 + n % 2, 65000))
        done.set()

    changing = threading.Thread(target=change)
    changing.start()
    sent = 0
    while not done.is_set() and sent < 3000:
        gateway.send(("10.0.0.2", 1024 + sent), SERVER)
        sent += 1
    changing.join()
    taken = {ms.mport for ms in gateway.sessions.entries()}
    assert len(taken) == sent
    assert gateway.sessions.ports_free(UDP) == len(gateway.sessions.choice.ports.ports) - len(
        taken & set(gateway.sessions.choice.ports.ports)
    )


def test_servers_that_stay_keep_their_counts_and_their_turn() -> None:
    gateway = gateway_with(web(FIRST, SECOND))
    assert reached(gateway, client(1)) == FIRST
    first, second = servers(gateway)
    gateway.configure(forwards=web(FIRST, SECOND, ("10.0.0.4", 80)))
    assert servers(gateway)[:2] == [first, second]
    assert (first.total, first.inactive) == (1, 1)
    assert reached(gateway, client(2)) == SECOND


def test_a_server_that_goes_gets_no_new_session_and_its_old_ones_go_on() -> None:
    gateway = gateway_with(web(FIRST, SECOND, persistence=60))
    assert reached(gateway, client(1)) == FIRST
    gateway.configure(forwards=web(SECOND, persistence=60))
    assert gateway.out(tcp(FIRST, client(1), SYN | ACK)) == tcp(LISTENED, client(1), SYN | ACK)
    assert gateway.into(tcp(client(1), LISTENED, ACK)) == tcp(client(1), FIRST, ACK)
    assert reached(gateway, (client(1)[0], 1024)) == SECOND


def test_clients_keep_their_servers_over_a_change() -> None:
    gateway = gateway_with(web(FIRST, SECOND, persistence=60))
    kept = reached(gateway, client(1))
    gateway.configure(forwards=web(SECOND, FIRST, ("10.0.0.4", 80), persistence=60))
    assert {reached(gateway, (client(1)[0], 1024 + n)) for n in range(5)} == {kept}


def test_clients_are_shared_out_anew_when_they_are_no_longer_kept() -> None:
    gateway = gateway_with(web(FIRST, SECOND, persistence=60))
    reached(gateway, client(1))
    gateway.configure(forwards=web(FIRST, SECOND))
    assert {reached(gateway, (client(1)[0], 1024 + n)) for n in range(2)} == {FIRST, SECOND}


def test_another_scheduler_takes_over() -> None:
    gateway = gateway_with(web(FIRST, SECOND))
    gateway.configure(forwards=web(FIRST, SECOND, scheduler="sh"))
    assert len({reached(gateway, (client(1)[0], 1024 + n)) for n in range(4)}) == 1


def test_a_weight_set_by_hand_stays_until_the_configuration_has_another() -> None:
    def weighted(weight: int) -> Forwards:
        return Forwards([Forward(TCP, range(8080, 8081), [Server(number(FIRST[0]), 80, weight)])])

    gateway = gateway_with(weighted(3))
    (server,) = servers(gateway)
    server.weight = 0
    gateway.configure(forwards=weighted(3))
    assert servers(gateway) == [server]
    assert server.weight == 0
    gateway.configure(forwards=weighted(2))
    assert server.weight == 2


@pytest.mark.parametrize("filtering", BEHAVIOURS)
def test_a_port_that_is_forwarded_no_more_lets_nobody_new_in(filtering: str) -> None:
    gateway = gateway_with(web(FIRST), filtering=filtering)
    assert reached(gateway, client(1)) == FIRST
    gateway.configure(filtering=filtering)
    assert gateway.into(tcp(client(1), LISTENED, ACK)) == tcp(client(1), FIRST, ACK)
    assert reached(gateway, client(2)) is None
    assert reached(gateway, (client(1)[0], 1024)) is None


def test_a_port_newly_forwarded_leaves_the_session_that_is_on_it() -> None:
    gateway = gateway_with(ports=range(8080, 8082))
    assert gateway.send(INSIDE, SERVER) == LISTENED
    server = Server(number(SECOND[0]), SECOND[1])
    forwards = Forwards([Forward(UDP, range(8080, 8081), [server])])
    gateway.configure(ports=(8081,), forwards=forwards)
    to_session, to_server = (
        gateway.into(udp(SERVER, LISTENED)),
        gateway.into(udp(OTHER_SERVER, LISTENED)),
    )
    assert to_session is not None
    assert to_server is not None
    assert destination(to_session) == INSIDE
    assert destination(to_server) == SECOND
    assert gateway.send(NEIGHBOUR, SERVER) == (GATEWAY, 8081)


def test_what_a_session_opened_stays_open_for_its_time() -> None:
    def game() -> Forwards:
        return Forwards(triggers=[Trigger((UDP, [range(443, 444)]), TCP, range(8080, 8081), 60)])

    gateway = gateway_with(game())
    gateway.send(INSIDE, SERVER)
    gateway.configure(forwards=game())
    gateway.passes(30)
    assert reached(gateway, client(1)) == (INSIDE[0], 8080)


def test_a_forward_and_a_server_are_called_as_people_write_them() -> None:
    server = Server(number("10.0.0.2"), 9000)
    forwards = [
        Forward(TCP, range(8080, 8081), [server]),
        Forward(UDP, range(5000, 5010), [server], listen=number("198.51.100.2")),
    ]
    assert [str(forward) for forward in forwards] == ["tcp:8080", "udp:198.51.100.2:5000-5009"]
    assert str(server) == "10.0.0.2:9000"
