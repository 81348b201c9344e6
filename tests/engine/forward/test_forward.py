"""Forwarded ports: what outside clients reach inside, through the gateway's address."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from nfmasq.engine import TCP, UDP
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from tests.gateway import GATEWAY, NEW_ADDRESS, Gateway, entries_on
from tests.packets import (
    ACK,
    FIN,
    RST,
    SYN,
    Endpoint,
    destination,
    error,
    number,
    source,
    tcp,
    udp,
)

FIRST: Endpoint = ("10.0.0.2", 80)
SECOND: Endpoint = ("10.0.0.3", 80)
LISTENED: Endpoint = (GATEWAY, 8080)
PORT = range(8080, 8081)


def server(endpoint: Endpoint, weight: int = 1) -> Server:
    return Server(number(endpoint[0]), endpoint[1], weight)


def client(at: int) -> Endpoint:
    return (f"198.51.100.{at % 250 + 1}", 20_000 + at)


def gateway_with(*forwards: Forward, **settings: object) -> Gateway:
    gateway = Gateway(forwards=Forwards(forwards), **settings)
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    return gateway


def one_server(**settings: object) -> Gateway:
    """Make a gateway that forwards TCP and UDP 8080 to one server."""
    forwards = [Forward(number, range(8080, 8081), [server(FIRST)]) for number in (TCP, UDP)]
    return gateway_with(*forwards, **settings)


def reached(gateway: Gateway, outside: Endpoint, listened: Endpoint = LISTENED) -> Endpoint | None:
    """Send a client's SYN; returns the server that it reaches, or None."""
    sent = gateway.into(tcp(outside, listened, SYN))
    return None if sent is None else destination(sent)


def asked(gateway: Gateway, outside: Endpoint, listened: Endpoint = LISTENED) -> Endpoint | None:
    """Send a client's datagram; returns the server that it reaches, or None."""
    sent = gateway.into(udp(outside, listened))
    return None if sent is None else destination(sent)


def connect(gateway: Gateway, outside: Endpoint, inside: Endpoint) -> None:
    """Have a client open a connection, which is given to the server `inside`."""
    assert reached(gateway, outside) == inside
    assert gateway.out(tcp(inside, outside, SYN | ACK)) == tcp(LISTENED, outside, SYN | ACK)
    assert gateway.into(tcp(outside, LISTENED, ACK)) == tcp(outside, inside, ACK)


def reload(gateway: Gateway, *forwards: Forward) -> None:
    """Put other forwards in force, as a running nfmasq does."""
    gateway.configure(forwards=Forwards(forwards))
    for ms in gateway.sessions.entries():
        gateway.sessions.ip_masq_follow_forward(ms)


def test_a_client_reaches_the_server_which_sees_the_clients_own_address() -> None:
    gateway = one_server()
    syn = gateway.into(tcp(client(1), LISTENED, SYN))
    assert syn == tcp(client(1), FIRST, SYN)
    answer = gateway.out(tcp(FIRST, client(1), SYN | ACK))
    assert answer == tcp(LISTENED, client(1), SYN | ACK)
    assert gateway.into(tcp(client(1), LISTENED, ACK)) == tcp(client(1), FIRST, ACK)


def test_a_datagram_reaches_the_server_and_its_answer_comes_from_where_it_was_sent() -> None:
    gateway = one_server()
    assert gateway.into(udp(client(1), LISTENED, b"?")) == udp(client(1), FIRST, b"?")
    assert gateway.out(udp(FIRST, client(1), b"!")) == udp(LISTENED, client(1), b"!")


def test_a_segment_of_no_connection_makes_none() -> None:
    gateway = one_server()
    stray = tcp(client(1), LISTENED, ACK)
    assert gateway.into(stray) is stray


def test_ports_of_a_range_lead_to_those_of_the_servers_range() -> None:
    gateway = gateway_with(Forward(TCP, range(8000, 8010), [server(("10.0.0.2", 9000))]))
    for port in range(8000, 8010):
        assert reached(gateway, client(1), (GATEWAY, port)) == ("10.0.0.2", port + 1000)
    other = tcp(client(1), (GATEWAY, 8010), SYN)
    assert gateway.into(other) is other


def test_a_forward_on_one_address_goes_before_one_on_any() -> None:
    gateway = gateway_with(
        Forward(TCP, range(8080, 8081), [server(FIRST)]),
        Forward(TCP, range(8080, 8081), [server(SECOND)], listen=number(NEW_ADDRESS)),
    )
    assert reached(gateway, client(1), LISTENED) == FIRST
    assert reached(gateway, client(1), (NEW_ADDRESS, 8080)) == SECOND


def test_servers_share_a_port_and_each_session_stays_with_its_server() -> None:
    servers = [server(FIRST), server(SECOND)]
    gateway = gateway_with(Forward(TCP, range(8080, 8081), servers))
    chosen = {client(n): reached(gateway, client(n)) for n in range(100)}
    assert Counter(chosen.values()) == {FIRST: 50, SECOND: 50}
    for outside, inside in chosen.items():
        assert inside is not None
        assert gateway.out(tcp(inside, outside, SYN | ACK)) == tcp(LISTENED, outside, SYN | ACK)
        assert gateway.into(tcp(outside, LISTENED, ACK)) == tcp(outside, inside, ACK)


def test_a_syn_sent_again_goes_to_the_same_server() -> None:
    gateway = gateway_with(Forward(TCP, range(8080, 8081), [server(FIRST), server(SECOND)]))
    assert len({reached(gateway, client(1)) for _ in range(5)}) == 1


def test_a_dead_or_drained_server_gets_no_new_session_and_keeps_its_own() -> None:
    first, second = server(FIRST), server(SECOND)
    gateway = gateway_with(Forward(TCP, range(8080, 8081), [first, second]))
    assert {reached(gateway, client(n)) for n in range(2)} == {FIRST, SECOND}
    first.alive = False
    assert {reached(gateway, client(n)) for n in range(10, 20)} == {SECOND}
    first.alive, second.weight = True, 0
    assert {reached(gateway, client(n)) for n in range(20, 30)} == {FIRST}
    assert {reached(gateway, client(n)) for n in range(2)} == {FIRST, SECOND}


@pytest.mark.parametrize("fast", [True, False])
def test_a_client_that_uses_a_port_again_is_given_a_server_anew(fast: bool) -> None:
    servers = [server(FIRST), server(SECOND)]
    gateway = gateway_with(Forward(TCP, range(8080, 8081), servers), fast=fast)
    for expected in (FIRST, SECOND, FIRST):
        assert reached(gateway, client(1)) == expected
        assert gateway.out(tcp(expected, client(1), SYN | ACK)) is not None
        for _ in range(2):
            assert gateway.into(tcp(client(1), LISTENED, ACK)) == tcp(client(1), expected, ACK)
        assert reached(gateway, client(1)) == expected
        gateway.out(tcp(expected, client(1), FIN | ACK))
        gateway.into(tcp(client(1), LISTENED, FIN | ACK))
        assert gateway.out(tcp(expected, client(1), ACK)) == tcp(LISTENED, client(1), ACK)
    assert [one.total for one in servers] == [2, 1]
    assert gateway.sessions.entry_count(TCP) == 1


@pytest.mark.parametrize("fast", [True, False])
def test_a_connection_that_waits_for_a_dead_server_is_given_another(fast: bool) -> None:
    first, second = server(FIRST), server(SECOND)
    gateway = gateway_with(Forward(TCP, range(8080, 8081), [first, second]), fast=fast)
    for _ in range(3):
        assert reached(gateway, client(1)) == FIRST
    first.alive = False
    assert reached(gateway, client(1)) == SECOND
    assert (first.inactive, second.inactive) == (0, 1)


Change = Callable[[Gateway, Server], None]


def dies(_gateway: Gateway, gone: Server) -> None:
    gone.alive = False


def is_drained(_gateway: Gateway, gone: Server) -> None:
    gone.weight = 0


def is_removed(gateway: Gateway, gone: Server) -> None:
    """Leave the forward to the other one of FIRST and SECOND."""
    others = [server(e) for e in (FIRST, SECOND) if number(e[0]) != gone.address]
    reload(gateway, *(Forward(protocol, PORT, others) for protocol in (TCP, UDP)))


def nothing_is_forwarded(gateway: Gateway, _gone: Server) -> None:
    reload(gateway)


BOTH_WAYS = pytest.mark.parametrize("fast", [True, False])


@BOTH_WAYS
@pytest.mark.parametrize("change", [dies, is_drained, is_removed, nothing_is_forwarded])
def test_what_is_established_goes_on_whatever_becomes_of_the_server(
    change: Change, fast: bool
) -> None:
    first = server(FIRST)
    gateway = gateway_with(Forward(TCP, PORT, [first, server(SECOND)]), fast=fast)
    connect(gateway, client(1), FIRST)
    change(gateway, first)
    for flags in (ACK, ACK, FIN | ACK):
        assert gateway.into(tcp(client(1), LISTENED, flags)) == tcp(client(1), FIRST, flags)
        assert gateway.out(tcp(FIRST, client(1), flags)) == tcp(LISTENED, client(1), flags)


@BOTH_WAYS
@pytest.mark.parametrize("change", [dies, is_removed])
def test_a_client_that_begins_anew_after_its_server_is_gone_is_given_another(
    change: Change, fast: bool
) -> None:
    """The server went without a word, so its connection counts as established."""
    first, second = server(FIRST), server(SECOND)
    gateway = gateway_with(Forward(TCP, PORT, [first, second]), fast=fast)
    connect(gateway, client(1), FIRST)
    change(gateway, first)
    assert reached(gateway, client(1)) == SECOND
    assert (first.active, first.inactive) == (0, 0)
    assert gateway.ended == {"server": 1}
    assert gateway.out(tcp(SECOND, client(1), SYN | ACK)) == tcp(LISTENED, client(1), SYN | ACK)


@BOTH_WAYS
def test_a_syn_on_the_connection_of_a_living_server_changes_nothing(fast: bool) -> None:
    first, second = server(FIRST), server(SECOND)
    gateway = gateway_with(Forward(TCP, PORT, [first, second]), fast=fast)
    connect(gateway, client(1), FIRST)
    for weight in (1, 0):
        first.weight = weight
        assert reached(gateway, client(1)) == FIRST
        assert gateway.into(tcp(client(1), LISTENED, ACK)) == tcp(client(1), FIRST, ACK)
    assert gateway.ended == {}


@BOTH_WAYS
def test_a_syn_sent_again_after_half_an_end_finds_the_servers_death_out(fast: bool) -> None:
    """A SYN leads from FIN_WAIT to SYN_RECV; the same SYN once more changes no state."""
    first, second = server(FIRST), server(SECOND)
    gateway = gateway_with(Forward(TCP, PORT, [first, second]), fast=fast)
    connect(gateway, client(1), FIRST)
    gateway.out(tcp(FIRST, client(1), FIN | ACK))
    assert reached(gateway, client(1)) == FIRST
    first.alive = False
    assert reached(gateway, client(1)) == SECOND


@BOTH_WAYS
@pytest.mark.parametrize("change", [dies, is_drained, is_removed])
def test_a_datagram_of_a_client_whose_server_is_gone_goes_to_another(
    change: Change, fast: bool
) -> None:
    first, second = server(FIRST), server(SECOND)
    gateway = gateway_with(Forward(UDP, PORT, [first, second]), fast=fast)
    for _ in range(3):
        assert asked(gateway, client(1)) == FIRST
        assert gateway.out(udp(FIRST, client(1))) == udp(LISTENED, client(1))
    change(gateway, first)
    for _ in range(3):
        assert asked(gateway, client(1)) == SECOND
        assert gateway.out(udp(SECOND, client(1))) == udp(LISTENED, client(1))
    assert gateway.ended == {"server": 1}
    assert (first.active, first.inactive) == (0, 0)


@BOTH_WAYS
@pytest.mark.parametrize("change", [dies, is_drained])
def test_where_no_other_server_takes_new_sessions_each_keeps_its_own(
    change: Change, fast: bool
) -> None:
    first, second = server(FIRST), server(SECOND)
    gateway = gateway_with(Forward(UDP, PORT, [first, second]), fast=fast)
    assert [asked(gateway, client(n)) for n in range(2)] == [FIRST, SECOND]
    change(gateway, first)
    change(gateway, second)
    assert [asked(gateway, client(n)) for n in range(2)] == [FIRST, SECOND]
    assert asked(gateway, client(2)) is None
    second.alive, second.weight = True, 1
    assert [asked(gateway, client(n)) for n in range(3)] == [SECOND] * 3


@BOTH_WAYS
def test_a_datagram_to_a_port_that_is_forwarded_no_more_is_left_alone(fast: bool) -> None:
    gateway = one_server(fast=fast)
    for forwards in ([], [Forward(UDP, range(8081, 8082), [server(FIRST)])]):
        reload(gateway, Forward(UDP, PORT, [server(FIRST)]))
        assert asked(gateway, client(1)) == FIRST
        reload(gateway, *forwards)
        late = udp(client(1), LISTENED)
        assert gateway.into(late) is late
        assert gateway.sessions.entry_count(UDP) == 0


@BOTH_WAYS
def test_a_reload_that_says_the_same_of_a_server_in_another_way_ends_nothing(fast: bool) -> None:
    gateway = gateway_with(Forward(UDP, range(5000, 5010), [server(("10.0.0.2", 6000))]), fast=fast)
    there = (GATEWAY, 5004)
    assert asked(gateway, client(1), there) == ("10.0.0.2", 6004)
    listen = number(GATEWAY)
    reload(gateway, Forward(UDP, range(5002, 5008), [server(("10.0.0.2", 6002))], listen=listen))
    assert asked(gateway, client(1), there) == ("10.0.0.2", 6004)
    assert gateway.ended == {}
    reload(gateway, Forward(UDP, range(5000, 5010), [server(("10.0.0.2", 6001))]))
    assert asked(gateway, client(1), there) == ("10.0.0.2", 6005)
    assert gateway.ended == {"server": 1}


@pytest.mark.parametrize("others", [[SECOND], []], ids=["alone", "with the whole forward"])
@pytest.mark.parametrize("reloads", [1, 3])
def test_a_server_that_is_taken_out_and_comes_back_has_the_sessions_that_it_kept(
    others: list[Endpoint], reloads: int
) -> None:
    first = server(FIRST)
    gateway = gateway_with(Forward(TCP, PORT, [first]))
    for n in range(3):
        connect(gateway, client(n), FIRST)
    first.alive, first.weight = False, 7
    for _ in range(reloads):
        reload(gateway, *(Forward(TCP, PORT, [server(other)]) for other in others))
    both = Forward(TCP, PORT, [server(FIRST, 2), server(SECOND, 2)], scheduler="wlc")
    reload(gateway, both)
    back = both.servers[0]
    assert (back.active, back.inactive, back.total) == (3, 0, 3)
    assert (back.alive, back.weight, back.configured) == (True, 2, 2)
    assert reached(gateway, client(9)) == SECOND
    for n in range(3):
        gateway.out(tcp(FIRST, client(n), RST))
    assert (back.active, back.inactive) == (0, 3)


def test_a_server_that_comes_back_when_all_its_sessions_are_over_begins_anew() -> None:
    gateway = gateway_with(Forward(TCP, PORT, [server(FIRST)]))
    connect(gateway, client(1), FIRST)
    reload(gateway)
    gateway.passes(8000)
    reload(gateway)
    again = server(FIRST)
    reload(gateway, Forward(TCP, PORT, [again]))
    (back,) = gateway.sessions.forwards.all[0].servers
    assert back is again


def test_a_server_on_one_address_takes_over_from_a_server_on_any() -> None:
    gateway = gateway_with(Forward(UDP, PORT, [server(FIRST)]))
    assert asked(gateway, client(1)) == FIRST
    reload(
        gateway,
        Forward(UDP, PORT, [server(FIRST)]),
        Forward(UDP, PORT, [server(SECOND)], listen=number(GATEWAY)),
    )
    assert asked(gateway, client(1)) == SECOND


def test_without_a_server_that_takes_new_sessions_nothing_gets_in() -> None:
    drained = server(FIRST, weight=0)
    gateway = gateway_with(Forward(TCP, range(8080, 8081), [drained]))
    assert reached(gateway, client(1)) is None
    assert gateway.errors == {"no_server": 1}


def test_a_client_keeps_its_server_for_a_time_unless_the_server_takes_no_more() -> None:
    first, second = server(FIRST), server(SECOND)
    gateway = gateway_with(Forward(TCP, range(8080, 8081), [first, second], persistence=60))
    host = client(1)[0]
    kept = reached(gateway, (host, 1024))
    for n in range(5):
        gateway.passes(50)
        assert reached(gateway, (host, 1025 + n)) == kept
    for taken, other in ((first, SECOND), (second, FIRST)):
        if kept == (FIRST if taken is first else SECOND):
            taken.alive = False
            assert reached(gateway, (host, 3000)) == other


def test_sessions_are_counted_with_their_server_by_state() -> None:
    only = server(FIRST)
    gateway = gateway_with(Forward(TCP, range(8080, 8081), [only]))

    def counts() -> tuple[int, int]:
        return only.active, only.inactive

    gateway.into(tcp(client(1), LISTENED, SYN))
    assert counts() == (0, 1)
    gateway.out(tcp(FIRST, client(1), SYN | ACK))
    assert counts() == (1, 0)
    gateway.into(tcp(client(1), LISTENED, FIN | ACK))
    gateway.out(tcp(FIRST, client(1), FIN | ACK))
    assert counts() == (0, 1)
    gateway.passes(241)
    assert counts() == (0, 0)
    assert only.total == 1


@pytest.mark.parametrize("fast", [True, False])
def test_a_reset_connection_is_no_longer_active(fast: bool) -> None:
    only = server(FIRST)
    gateway = gateway_with(Forward(TCP, range(8080, 8081), [only]), fast=fast)
    gateway.into(tcp(client(1), LISTENED, SYN))
    gateway.out(tcp(FIRST, client(1), SYN | ACK))
    gateway.into(tcp(client(1), LISTENED, RST))
    assert (only.active, only.inactive) == (0, 1)


def test_one_client_port_to_two_ports_of_one_server_is_one_session_at_a_time() -> None:
    gateway = gateway_with(
        Forward(TCP, range(8080, 8081), [server(FIRST)]),
        Forward(TCP, range(8081, 8082), [server(FIRST)]),
    )
    assert reached(gateway, client(1)) == FIRST
    assert reached(gateway, client(1), (GATEWAY, 8081)) is None
    assert gateway.errors == {"no_port": 1}


def test_what_only_passes_by_is_not_forwarded() -> None:
    gateway = one_server()
    for elsewhere in ("192.0.2.80", "255.255.255.255", "224.0.0.251"):
        passing = udp(client(1), (elsewhere, 8080))
        assert gateway.into(passing) is passing


def test_a_server_answers_from_the_address_listened_on_whatever_the_gateways_own() -> None:
    listen = number(NEW_ADDRESS)
    gateway = gateway_with(Forward(TCP, range(8080, 8081), [server(FIRST)], listen=listen))
    fixed = (NEW_ADDRESS, 8080)
    assert reached(gateway, client(1), fixed) == FIRST
    for flags in (SYN | ACK, ACK, FIN | ACK):
        assert gateway.out(tcp(FIRST, client(1), flags)) == tcp(fixed, client(1), flags)
    elsewhere = tcp(client(2), LISTENED, SYN)
    assert gateway.into(elsewhere) is elsewhere


def test_errors_about_a_forwarded_session_find_their_way_in_both_directions() -> None:
    gateway = one_server()
    came = tcp(client(1), LISTENED, SYN)
    arrived = gateway.into(came)
    assert arrived is not None
    told_outside = gateway.out(error(FIRST[0], client(1)[0], arrived))
    assert told_outside == error(GATEWAY, client(1)[0], came)
    answered = tcp(FIRST, client(1), SYN | ACK)
    left = gateway.out(answered)
    assert left is not None
    told_inside = gateway.into(error("192.0.2.1", GATEWAY, left))
    assert told_inside == error("192.0.2.1", FIRST[0], answered)


def test_a_session_ends_with_its_masquerade_address_and_the_server_is_told() -> None:
    only = server(FIRST)
    gateway = gateway_with(Forward(TCP, range(8080, 8081), [only]))
    gateway.into(tcp(client(1), LISTENED, SYN))
    gateway.out(tcp(FIRST, client(1), SYN | ACK))
    gateway.into(tcp(client(1), LISTENED, ACK))
    (ms,) = entries_on(gateway, number(GATEWAY))
    assert gateway.masq.masq_address_gone(ms, gateway.now)
    assert (only.active, only.inactive) == (0, 0)
    assert gateway.out(tcp(FIRST, client(1), ACK)) is None
    probe, reset = gateway.masq.outbox
    assert source(probe) == source(reset) == client(1)
    assert destination(probe) == destination(reset) == FIRST
    assert reset[33] == RST


# -- floods ----------------------------------------------------------------------------


def flood_of_syns(gateway: Gateway, many: int) -> None:
    """Send SYNs from all over the world, which the server answers; no sender goes on."""
    for n in range(many):
        nobody = (f"100.64.{n // 250}.{n % 250 + 1}", 1024 + n)
        if gateway.into(tcp(nobody, LISTENED, SYN)) is not None:
            assert gateway.out(tcp(FIRST, nobody, SYN | ACK)) is not None


def test_a_flood_from_outside_leaves_half_of_the_table_to_the_inside() -> None:
    gateway = one_server(max_entries=20)
    flood_of_syns(gateway, 100)
    assert gateway.out(tcp(FIRST, ("100.64.0.1", 1024), SYN | ACK)) is None, "the first made room"
    assert gateway.sessions.entry_count(TCP) == 10
    for n in range(10):
        gateway.send(("10.0.0.9", 1024 + n), ("198.51.100.99", 53))
    assert gateway.sessions.entry_count(TCP) == 10


def test_a_flood_ends_no_connection_and_keeps_nobody_from_opening_one() -> None:
    gateway = one_server(max_entries=20)

    connect(gateway, client(1), FIRST)
    flood_of_syns(gateway, 100)
    connect(gateway, client(2), FIRST)
    flood_of_syns(gateway, 100)
    for outside in (client(1), client(2)):
        assert gateway.into(tcp(outside, LISTENED, ACK)) == tcp(outside, FIRST, ACK)


def test_connections_of_the_outside_are_no_more_than_half_of_the_table() -> None:
    gateway = one_server(max_entries=10)
    for n in range(5):
        assert reached(gateway, client(n)) == FIRST
        gateway.out(tcp(FIRST, client(n), SYN | ACK))
        gateway.into(tcp(client(n), LISTENED, ACK))
    assert reached(gateway, client(5)) is None
    assert gateway.errors == {"no_room": 1}


def test_an_inside_that_fills_its_half_of_the_table_closes_no_forwarded_port() -> None:
    gateway = one_server(max_entries=10)
    for n in range(9):
        gateway.send(("10.0.0.9", 1024 + n), ("198.51.100.99", 53))
    assert reached(gateway, client(1)) == FIRST


# -- the inside ------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["10.0.0.9", FIRST[0]], ids=["a neighbour", "the server"])
def test_inside_hosts_reach_a_server_by_the_address_that_the_outside_knows(inside: str) -> None:
    gateway = one_server()
    masq, maddr, now = gateway.masq, number(GATEWAY), gateway.now

    def by_the_gateway(packet: bytes) -> bytes | None:
        """Send a packet through the gateway, in two steps."""
        sent = masq.ip_fw_hairpin(packet, maddr, now)
        return None if sent is None else masq.ip_fw_hairpin_source(sent, now)

    arrived = by_the_gateway(tcp((inside, 1024), LISTENED, SYN))
    assert arrived is not None
    assert destination(arrived) == FIRST
    seen = source(arrived)
    assert seen == (GATEWAY, 61000)
    answer = by_the_gateway(tcp(FIRST, seen, SYN | ACK))
    assert answer == tcp(LISTENED, (inside, 1024), SYN | ACK)


def test_inside_clients_are_told_apart_by_their_own_addresses() -> None:
    servers = [server(FIRST), server(SECOND)]
    gateway = gateway_with(Forward(TCP, range(8080, 8081), servers, scheduler="sh"))
    reached = []
    for host in range(100, 200):
        syn = tcp((f"10.0.0.{host}", 1024), LISTENED, SYN)
        sent = gateway.masq.ip_fw_hairpin(syn, number(GATEWAY), gateway.now)
        assert sent is not None
        reached.append(destination(sent))
    assert 20 < reached.count(FIRST) < 80


def test_what_is_not_forwarded_stays_the_gateways_own() -> None:
    gateway = one_server()
    for elsewhere in ((GATEWAY, 8081), ("10.0.0.1", 8080)):
        own = tcp(("10.0.0.9", 1024), elsewhere, SYN)
        assert gateway.masq.ip_fw_hairpin(own, number(GATEWAY), gateway.now) is own
    assert gateway.sessions.entry_count(TCP) == 0
