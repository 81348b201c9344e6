"""Inside sources that are forged: who is not there takes nothing from who is.

A forger sends in the name of hosts that do not exist, and sees no answer. Whatever it sends, each
host that is there gets its sessions, also a host that was not there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import TCP
from nfmasq.engine.port_claim import PATIENCE
from nfmasq.engine.table import limits
from nfmasq.engine.table.entry import HALF_OPEN
from nfmasq.engine.table.limits import GENUINE_FOR, InsideHosts
from tests.gateway import INSIDE, NEIGHBOUR, SERVER, Gateway, endpoints
from tests.packets import ACK, FIN, RST, SYN, Endpoint, number, source, tcp, udp

ALL = 4096
HOSTS = 230
NUMBER = 1000
"""The server's number, as in `tests.packets.tcp`."""

WRONG = 4711

Attack = Callable[[Gateway, Endpoint], None]


def answered(gateway: Gateway, forged: Endpoint) -> None:
    """Send a SYN in the name of a host, which the server answers."""
    sent = gateway.out(tcp(forged, SERVER, SYN))
    if sent is not None:
        gateway.into(tcp(SERVER, source(sent), SYN | ACK))


def unanswered(gateway: Gateway, forged: Endpoint) -> None:
    gateway.out(tcp(forged, SERVER, SYN))


def guessed(gateway: Gateway, forged: Endpoint) -> None:
    answered(gateway, forged)
    gateway.out(tcp(forged, SERVER, ACK, b"data", ack=WRONG))


def sent_again(gateway: Gateway, forged: Endpoint) -> None:
    answered(gateway, forged)
    gateway.out(tcp(forged, SERVER, SYN, ack=WRONG))
    gateway.out(tcp(forged, SERVER, SYN | ACK, ack=WRONG))


def reset_and_begun_again(gateway: Gateway, forged: Endpoint) -> None:
    answered(gateway, forged)
    gateway.out(tcp(forged, SERVER, RST))
    answered(gateway, forged)


def closed_and_begun_again(gateway: Gateway, forged: Endpoint) -> None:
    answered(gateway, forged)
    gateway.out(tcp(forged, SERVER, FIN | ACK, ack=WRONG))
    answered(gateway, forged)


def datagram(gateway: Gateway, forged: Endpoint) -> None:
    gateway.out(udp(forged, SERVER))


def datagram_answered(gateway: Gateway, forged: Endpoint) -> None:
    sent = gateway.out(udp(forged, SERVER))
    if sent is not None:
        gateway.into(udp(SERVER, source(sent)))


CONNECTIONS = (
    answered, unanswered, guessed, sent_again, reset_and_begun_again, closed_and_begun_again
)  # fmt: skip
DATAGRAMS = datagram, datagram_answered


def forged_endpoints() -> Iterator[Endpoint]:
    for n in count():
        yield f"10.0.9.{n % HOSTS + 1}", 1024 + n // HOSTS


def flood(gateway: Gateway, attack: Attack, forged: Iterator[Endpoint], many: int) -> None:
    """Have many forged sessions come within a few seconds."""
    for _ in range(many):
        gateway.now += 0.0002
        attack(gateway, next(forged))


def opens_amid(
    gateway: Gateway, attack: Attack, forged: Iterator[Endpoint], inside: Endpoint
) -> bool:
    """Say whether a connection opens while forged sessions come between any two of its packets."""
    sent = gateway.out(tcp(inside, SERVER, SYN))
    if sent is None:
        return False
    flood(gateway, attack, forged, 100)
    if gateway.into(tcp(SERVER, source(sent), SYN | ACK)) != tcp(SERVER, inside, SYN | ACK):
        return False
    flood(gateway, attack, forged, 100)
    return gateway.out(tcp(inside, SERVER, ACK)) is not None


def asks(gateway: Gateway, inside: Endpoint) -> bool:
    sent = gateway.out(udp(inside, SERVER))
    return sent is not None and gateway.lets_in(SERVER, source(sent))


@pytest.mark.parametrize("attack", CONNECTIONS)
def test_a_host_that_is_new_opens_all_its_connections_while_forged_sessions_hold_all_ports(
    attack: Attack,
) -> None:
    gateway, forged = Gateway(), forged_endpoints()
    flood(gateway, attack, forged, ALL + 500)
    for port in range(20):
        assert opens_amid(gateway, attack, forged, (NEIGHBOUR[0], 2000 + port))
    assert gateway.sessions.hosts.is_genuine(number(NEIGHBOUR[0]))
    flood(gateway, attack, forged, ALL)
    for port in range(20):
        inside = NEIGHBOUR[0], 2000 + port
        assert gateway.out(tcp(inside, SERVER, ACK, b"go on")) is not None


def test_a_host_with_many_connections_opens_others_while_forged_sessions_want_ports() -> None:
    gateway, forged = Gateway(), forged_endpoints()
    for inside in endpoints(NEIGHBOUR[0], 200):
        assert gateway.connects(inside, SERVER)
    flood(gateway, answered, forged, ALL + 500)
    for port in range(20):
        assert opens_amid(gateway, answered, forged, (NEIGHBOUR[0], 20_000 + port))


@pytest.mark.parametrize("attack", DATAGRAMS)
@pytest.mark.parametrize("is_known", [True, False])
def test_datagrams_of_a_host_that_is_there_pass_while_forged_sessions_hold_all_ports(
    attack: Attack, is_known: bool
) -> None:
    gateway, forged = Gateway(), forged_endpoints()
    if is_known:
        gateway.masq.hosts_are_there([number(NEIGHBOUR[0])], gateway.now)
    flood(gateway, attack, forged, ALL + 500)
    for port in range(20 if is_known else 1):
        assert asks(gateway, (NEIGHBOUR[0], 2000 + port))
        flood(gateway, attack, forged, 100)


@pytest.mark.parametrize("attack", [*CONNECTIONS, *DATAGRAMS])
def test_a_table_full_of_forged_sessions_has_room_for_who_is_there(attack: Attack) -> None:
    gateway, forged = Gateway(max_entries=500), forged_endpoints()
    assert gateway.connects(NEIGHBOUR, SERVER)
    flood(gateway, attack, forged, 1000)
    for port in range(20):
        assert gateway.connects((NEIGHBOUR[0], 2000 + port), SERVER)
        assert asks(gateway, (NEIGHBOUR[0], 2000 + port))
        flood(gateway, attack, forged, 100)
    assert gateway.out(tcp(NEIGHBOUR, SERVER, ACK, b"go on")) is not None


def test_what_waits_at_a_host_that_is_there_stays_longer_than_what_may_be_forged() -> None:
    gateway, forged = Gateway(max_entries=100), forged_endpoints()
    assert gateway.connects(NEIGHBOUR, SERVER)
    waiting = gateway.send((NEIGHBOUR[0], 5000), SERVER)
    flood(gateway, datagram, forged, 1000)
    assert gateway.lets_in(SERVER, waiting)


def test_a_host_that_is_there_has_its_ports_until_its_patience_is_over() -> None:
    gateway = Gateway(ports=range(61000, 61000 + 100))
    assert gateway.connects(INSIDE, SERVER)
    gateway.flood(INSIDE[0], 99)
    assert not gateway.connects(NEIGHBOUR, SERVER) or gateway.ended == {"evicted": 1}
    gateway.passes(PATIENCE + 1)
    assert gateway.connects((NEIGHBOUR[0], 2001), SERVER)


@pytest.mark.parametrize("fast", [True, False])
@given(acknowledged=st.integers(0, 2**32 - 1) | st.integers(NUMBER - 2, NUMBER + 3))
def test_only_the_acknowledgement_of_the_servers_number_shows_that_a_host_is_there(
    fast: bool, acknowledged: int
) -> None:
    gateway = Gateway(fast=fast)
    answered(gateway, INSIDE)
    assert gateway.out(tcp(INSIDE, SERVER, ACK, ack=acknowledged)) is not None
    (entry,) = gateway.sessions.entries()
    fits = acknowledged == NUMBER + 1
    assert gateway.sessions.hosts.is_genuine(number(INSIDE[0])) == fits
    assert entry.state_name == ("ESTABLISHED" if fits else "SYN_RECV")
    assert (entry.flags & HALF_OPEN == 0) == fits


def test_a_server_that_answers_again_with_another_number_is_acknowledged_by_either() -> None:
    """A server with SYN cookies remembers no number."""
    gateway = Gateway()
    answered(gateway, INSIDE)
    (entry,) = gateway.sessions.entries()
    mapped = "203.0.113.1", entry.mport
    gateway.into(tcp(SERVER, mapped, SYN | ACK, seq=2**32 - 1))
    gateway.out(tcp(INSIDE, SERVER, ACK, ack=0))
    assert entry.state_name == "ESTABLISHED"


def test_a_half_open_connection_lives_no_longer_than_one_that_opens() -> None:
    gateway = Gateway()
    guessed(gateway, INSIDE)
    gateway.passes(241)
    assert gateway.sessions.entry_count(TCP) == 0


def test_a_host_is_forgotten_when_it_has_not_shown_itself_for_long() -> None:
    gateway = Gateway()
    assert gateway.connects(INSIDE, SERVER)
    gateway.passes(GENUINE_FOR / 2)
    assert gateway.connects(NEIGHBOUR, SERVER)
    gateway.passes(GENUINE_FOR / 2)
    gateway.passes(0)
    assert not gateway.sessions.hosts.is_genuine(number(INSIDE[0]))
    assert gateway.sessions.hosts.is_genuine(number(NEIGHBOUR[0]))


def test_of_too_many_hosts_the_newest_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_GENUINE", 3)
    hosts = InsideHosts()
    for saddr in (1, 2, 3, 1, 4):
        hosts.is_there(saddr, 0.0)
    assert [hosts.is_genuine(saddr) for saddr in range(5)] == [False, True, False, True, True]
