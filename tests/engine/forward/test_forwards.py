"""What servers send of themselves: it leaves by the port by which the outside knows them."""

from __future__ import annotations

from typing import Any

import pytest

from nfmasq.engine import TCP, UDP, Flags
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.forward.trigger import Trigger
from tests.gateway import GATEWAY, NEW_ADDRESS, Gateway
from tests.packets import ACK, RST, SYN, Endpoint, destination, number, source, tcp, udp

PBX: Endpoint = ("10.0.0.5", 5060)
OTHER_PBX: Endpoint = ("10.0.0.6", 5060)
TRUNK: Endpoint = (GATEWAY, 5061)
PEER: Endpoint = ("198.51.100.7", 5060)
OTHER_PEER: Endpoint = ("198.51.100.8", 5060)
GAMER: Endpoint = ("10.0.0.9", 27000)
NORMAL: Endpoint = (GATEWAY, 61000)

BOTH_WAYS = pytest.mark.parametrize("fast", [True, False])
TCP_AND_UDP = pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])


def forward(
    port: int, *servers: Endpoint, protocol: int = UDP, ports: int = 1, listen: str = ""
) -> Forward:
    """Make a forward of a port, or of so many ports from it on."""
    made = [Server(number(address), first) for address, first in servers]
    return Forward(protocol, range(port, port + ports), made, number(listen) if listen else None)


def gateway_with(*forwards: Forward, triggers: list[Trigger] | None = None, **more: Any) -> Gateway:
    gateway = Gateway(forwards=Forwards(forwards, triggers or ()), **more)
    gateway.masq.inbound.maddrs = {number(GATEWAY), number(NEW_ADDRESS)}
    return gateway


def reload(gateway: Gateway, *forwards: Forward) -> None:
    """Put other forwards in force, as a running nfmasq does."""
    gateway.configure(forwards=Forwards(forwards))
    for ms in gateway.sessions.entries():
        gateway.sessions.ip_masq_follow_forward(ms)


def sent_by(gateway: Gateway, inside: Endpoint, outside: Endpoint, protocol: int = UDP) -> Endpoint:
    """Send the first packet of a session; returns the endpoint that it seems to come from."""
    first = udp(inside, outside) if protocol == UDP else tcp(inside, outside, SYN)
    sent = gateway.out(first)
    assert sent is not None
    return source(sent)


def reached(gateway: Gateway, outside: Endpoint, listened: Endpoint = TRUNK) -> Endpoint | None:
    """Send a datagram from outside; returns the endpoint that it reaches."""
    sent = gateway.into(udp(outside, listened))
    return None if sent is None else destination(sent)


@BOTH_WAYS
@TCP_AND_UDP
def test_a_server_that_speaks_first_leaves_by_its_forwarded_port(protocol: int, fast: bool) -> None:
    gateway = gateway_with(forward(5061, PBX, protocol=protocol), fast=fast)
    assert sent_by(gateway, PBX, PEER, protocol) == TRUNK
    answer = udp(PEER, TRUNK) if protocol == UDP else tcp(PEER, TRUNK, SYN | ACK)
    arrived = gateway.into(answer)
    assert arrived is not None
    assert destination(arrived) == PBX
    assert gateway.sessions.entry_count(protocol) == 1
    assert gateway.errors == {}


@BOTH_WAYS
def test_whoever_speaks_first_the_peer_and_the_server_are_in_one_session(fast: bool) -> None:
    for first in (True, False):
        gateway = gateway_with(forward(5061, PBX), fast=fast)
        if first:
            assert sent_by(gateway, PBX, PEER) == TRUNK
        for _ in range(3):
            assert reached(gateway, PEER) == PBX
            assert sent_by(gateway, PBX, PEER) == TRUNK
        assert gateway.sessions.entry_count(UDP) == 1


@pytest.mark.parametrize("selection", ["sequential", "preserve", "random"])
@pytest.mark.parametrize(
    "mapping", ["endpoint-independent", "address-dependent", "address-and-port-dependent"]
)
def test_a_server_leaves_by_its_port_whatever_mapping_and_selection(
    mapping: str, selection: str
) -> None:
    gateway = gateway_with(forward(5061, PBX), mapping=mapping, port_selection=selection)
    assert {sent_by(gateway, PBX, peer) for peer in (PEER, OTHER_PEER, (PEER[0], 9))} == {TRUNK}
    assert sent_by(gateway, (PBX[0], 5062), PEER) != TRUNK
    assert sent_by(gateway, OTHER_PBX, PEER) != TRUNK


def test_ports_of_a_range_are_left_by_one_for_one() -> None:
    gateway = gateway_with(forward(8000, ("10.0.0.5", 9000), ports=10))
    for port in range(10):
        assert sent_by(gateway, ("10.0.0.5", 9000 + port), PEER) == (GATEWAY, 8000 + port)
    for beside in (8999, 9010):
        assert sent_by(gateway, ("10.0.0.5", beside), PEER)[1] >= 61000


def test_servers_that_share_a_port_leave_by_other_ports() -> None:
    """Both may speak to one peer, and what the peer sends to the forwarded port is for either."""
    gateway = gateway_with(forward(5061, PBX, OTHER_PBX))
    assert reached(gateway, OTHER_PEER) == PBX
    assert sent_by(gateway, PBX, OTHER_PEER) == TRUNK, "its answer"
    assert sent_by(gateway, PBX, PEER) == (GATEWAY, 61000)
    assert sent_by(gateway, PBX, (PEER[0], 9)) == (GATEWAY, 61000)
    assert sent_by(gateway, OTHER_PBX, PEER) == (GATEWAY, 61001)


@BOTH_WAYS
def test_a_peer_of_a_server_that_shares_a_port_is_let_in_by_it(fast: bool) -> None:
    gateway = gateway_with(forward(5061, PBX, OTHER_PBX), fast=fast)
    assert sent_by(gateway, PBX, PEER) == NORMAL
    assert reached(gateway, PEER, NORMAL) == PBX
    assert reached(gateway, PEER) == PBX
    assert sent_by(gateway, PBX, PEER) == TRUNK


def test_a_forward_on_one_address_is_left_by_on_this_address_only() -> None:
    gateway = gateway_with(forward(5061, PBX, listen=NEW_ADDRESS))
    assert sent_by(gateway, PBX, PEER) == NORMAL
    gateway.address = NEW_ADDRESS
    assert sent_by(gateway, PBX, OTHER_PEER) == (NEW_ADDRESS, 5061)


def test_a_port_that_is_anothers_on_one_address_is_not_left_by_there() -> None:
    gateway = gateway_with(forward(5061, PBX), forward(5061, OTHER_PBX, listen=NEW_ADDRESS))
    assert sent_by(gateway, PBX, PEER) == TRUNK
    gateway.address = NEW_ADDRESS
    assert sent_by(gateway, PBX, OTHER_PEER)[1] >= 61000
    assert sent_by(gateway, OTHER_PBX, OTHER_PEER) == (NEW_ADDRESS, 5061)


def test_of_two_forwards_to_one_endpoint_the_first_is_left_by() -> None:
    gateway = gateway_with(forward(5070, PBX), forward(5061, PBX))
    assert reached(gateway, OTHER_PEER) == PBX
    assert sent_by(gateway, PBX, PEER) == (GATEWAY, 5070)


def test_a_forwarded_port_counts_for_its_host_and_is_had_beyond_the_limit() -> None:
    gateway = gateway_with(forward(5061, PBX), max_ports_per_host=1)
    assert sent_by(gateway, (PBX[0], 1024), PEER) == NORMAL
    assert sent_by(gateway, PBX, PEER) == TRUNK
    assert gateway.sessions.hosts.ports_of(number(PBX[0])) == 2


def test_a_servers_own_session_is_counted_with_it() -> None:
    listening = forward(5061, PBX)
    gateway = gateway_with(listening)
    sent_by(gateway, PBX, PEER)
    (server,) = listening.servers
    assert (server.active, server.total) == (1, 0)
    gateway.passes(1000)
    assert server.active == 0


def test_an_unanswered_session_moves_with_the_address_to_where_it_is_forwarded() -> None:
    for listen, there in (("", 5061), (NEW_ADDRESS, 5061), (GATEWAY, 61000)):
        gateway = gateway_with(forward(5061, PBX, listen=listen))
        sent_by(gateway, PBX, PEER)
        gateway.address = NEW_ADDRESS
        assert sent_by(gateway, PBX, PEER) == (NEW_ADDRESS, there)
        (server,) = gateway.sessions.forwards.all[0].servers
        assert server.active == (there == 5061)


# -- forwards that come and go --------------------------------------------------------------


def test_an_unanswered_session_older_than_the_forward_leaves_by_it_from_then_on() -> None:
    gateway = gateway_with()
    assert sent_by(gateway, PBX, PEER) == NORMAL
    reload(gateway, forward(5061, PBX))
    assert sent_by(gateway, PBX, PEER) == TRUNK
    assert reached(gateway, PEER) == PBX
    assert gateway.ended == {}


@BOTH_WAYS
def test_an_answered_session_older_than_the_forward_stays_until_its_peer_comes_by_it(
    fast: bool,
) -> None:
    gateway = gateway_with(fast=fast)
    assert sent_by(gateway, PBX, PEER) == NORMAL
    assert reached(gateway, PEER, NORMAL) == PBX
    reload(gateway, forward(5061, PBX))
    assert sent_by(gateway, PBX, PEER) == NORMAL
    assert reached(gateway, PEER, NORMAL) == PBX
    assert reached(gateway, PEER) == PBX
    assert sent_by(gateway, PBX, PEER) == TRUNK
    assert gateway.errors == {}
    assert gateway.ended == {"replaced": 1}


def test_a_connection_older_than_the_forward_is_not_moved_by_the_outside() -> None:
    gateway = gateway_with()
    assert gateway.connects(PBX, PEER)
    reload(gateway, forward(5061, PBX, protocol=TCP))
    assert gateway.into(tcp(PEER, TRUNK, SYN)) is None
    assert gateway.errors == {"no_port": 1}
    assert gateway.into(tcp(PEER, NORMAL, ACK)) == tcp(PEER, PBX, ACK)


def test_a_connection_that_nobody_answered_or_that_is_over_gives_way_to_the_forward() -> None:
    for is_over in (False, True):
        gateway = gateway_with()
        assert sent_by(gateway, PBX, PEER, TCP) == NORMAL
        if is_over:
            gateway.into(tcp(PEER, NORMAL, SYN | ACK))
            gateway.out(tcp(PBX, PEER, ACK))
            gateway.into(tcp(PEER, NORMAL, RST))
        gateway.configure(forwards=Forwards([forward(5061, PBX, protocol=TCP)]))
        assert gateway.into(tcp(PEER, TRUNK, SYN)) == tcp(PEER, PBX, SYN)
        assert gateway.ended == {"replaced": 1}


def test_a_session_stays_where_it_is_while_another_has_the_forwarded_port() -> None:
    """The other host got the port before it was forwarded, and speaks with the same peer."""
    gateway = gateway_with()
    assert sent_by(gateway, OTHER_PBX, PEER) == NORMAL
    before = sent_by(gateway, PBX, PEER)
    reload(gateway, forward(61000, PBX))
    assert sent_by(gateway, PBX, PEER) == before
    assert sent_by(gateway, OTHER_PBX, PEER) == NORMAL


def test_a_session_through_another_port_of_its_server_is_not_moved_by_the_outside() -> None:
    gateway = gateway_with(forward(5061, PBX), forward(5070, PBX))
    assert reached(gateway, PEER) == PBX
    assert reached(gateway, PEER, (GATEWAY, 5070)) is None
    assert gateway.errors == {"no_port": 1}


def test_a_session_that_a_helper_expects_is_not_moved_by_the_outside() -> None:
    """It is told outside by which port it is to come."""
    gateway = gateway_with(forward(5061, PBX, protocol=UDP))
    waiting = number(GATEWAY), 61005, number(PBX[0]), PBX[1], number(PEER[0]), 0
    ms = gateway.sessions.ip_masq_new(UDP, *waiting, int(Flags.NO_DPORT | Flags.NO_REPLY))
    assert ms is not None
    gateway.sessions.ip_masq_put(ms)
    assert reached(gateway, PEER) is None
    assert reached(gateway, PEER, (GATEWAY, 61005)) == PBX


def test_a_helper_that_expects_a_servers_endpoint_is_given_the_forwarded_port() -> None:
    gateway = gateway_with(forward(5061, PBX))
    waiting = number(GATEWAY), 0, number(PBX[0]), PBX[1], number(PEER[0]), 0
    ms = gateway.sessions.ip_masq_new(UDP, *waiting, int(Flags.NO_DPORT | Flags.NO_REPLY))
    assert ms is not None
    gateway.sessions.ip_masq_put(ms)
    assert ms.mport == TRUNK[1]
    assert [reached(gateway, peer) for peer in (PEER, OTHER_PEER, (PEER[0], 9))] == [PBX] * 3


def test_a_client_follows_its_server_to_another_port() -> None:
    gateway = gateway_with(forward(5061, PBX))
    assert reached(gateway, PEER) == PBX
    reload(gateway, forward(5070, PBX))
    assert reached(gateway, PEER, (GATEWAY, 5070)) == PBX
    assert gateway.ended == {"server": 1}


@BOTH_WAYS
def test_the_next_server_of_a_port_may_speak_first(fast: bool) -> None:
    for first in (PBX, PEER):
        gateway = gateway_with(forward(5061, PBX), fast=fast)
        if first == PBX:
            assert sent_by(gateway, PBX, PEER) == TRUNK
        assert reached(gateway, PEER) == PBX
        reload(gateway, forward(5061, OTHER_PBX))
        assert sent_by(gateway, OTHER_PBX, PEER) == TRUNK
        assert reached(gateway, PEER) == OTHER_PBX
        assert sent_by(gateway, PBX, PEER) == NORMAL


def test_a_server_whose_port_is_forwarded_no_more_leaves_like_any_host() -> None:
    gateway = gateway_with(forward(5061, PBX))
    assert sent_by(gateway, PBX, PEER) == TRUNK
    assert reached(gateway, OTHER_PEER) == PBX
    reload(gateway)
    assert sent_by(gateway, PBX, PEER) == NORMAL
    assert sent_by(gateway, PBX, (PEER[0], 9)) == NORMAL
    assert reached(gateway, PEER, NORMAL) == PBX
    late = udp(OTHER_PEER, TRUNK)
    assert gateway.into(late) is late


# -- triggers ----------------------------------------------------------------------------


def game(**more: Any) -> Gateway:
    """Make a gateway where UDP to ports 27000 to 27009 opens the same ports."""
    ports = range(27000, 27010)
    return gateway_with(triggers=[Trigger((UDP, [ports]), UDP, ports, 60)], **more)


@BOTH_WAYS
def test_the_host_that_opened_ports_leaves_by_them(fast: bool) -> None:
    gateway = game(fast=fast)
    assert sent_by(gateway, (GAMER[0], 40000), (PEER[0], 27000)) == NORMAL
    assert sent_by(gateway, (GAMER[0], 27003), PEER) == (GATEWAY, 27003)
    assert reached(gateway, PEER, (GATEWAY, 27003)) == (GAMER[0], 27003)
    assert sent_by(gateway, ("10.0.0.10", 27004), PEER)[1] > 61000


@BOTH_WAYS
def test_the_very_session_that_opens_ports_leaves_by_them(fast: bool) -> None:
    gateway = game(fast=fast)
    assert sent_by(gateway, GAMER, (PEER[0], 27000)) == (GATEWAY, 27000)
    assert reached(gateway, (PEER[0], 27000), (GATEWAY, 27000)) == GAMER


def test_the_host_leaves_by_its_ports_after_a_reload() -> None:
    gateway = game()
    sent_by(gateway, (GAMER[0], 40000), (PEER[0], 27000))
    again = game().sessions.forwards.triggers
    gateway.configure(forwards=Forwards(triggers=again))
    assert sent_by(gateway, GAMER, PEER) == (GATEWAY, 27000)


def test_the_next_host_that_opens_the_ports_leaves_by_them_and_the_last_no_more() -> None:
    gateway = game()
    sent_by(gateway, GAMER, (PEER[0], 27000))
    gateway.passes(1000)
    other = ("10.0.0.10", 27000)
    assert sent_by(gateway, other, (PEER[0], 27000)) == (GATEWAY, 27000)
    assert sent_by(gateway, GAMER, OTHER_PEER)[1] >= 61000


# -- beside others ------------------------------------------------------------------------


@BOTH_WAYS
def test_only_servers_are_kept_from_answering_what_nobody_has_asked(fast: bool) -> None:
    """Another program on the gateway may lead connections to an inside host (DNAT)."""
    gateway = gateway_with(forward(80, ("10.0.0.5", 80), ("10.0.0.6", 80), protocol=TCP), fast=fast)
    for server in (("10.0.0.5", 80), ("10.0.0.6", 80)):
        assert gateway.out(tcp(server, PEER, SYN | ACK)) is None
    assert gateway.errors == {"unknown": 2}
    for other in (("10.0.0.7", 80), ("10.0.0.5", 81)):
        assert gateway.out(tcp(other, PEER, SYN | ACK)) is not None
        assert gateway.out(tcp(other, PEER, ACK)) is not None
