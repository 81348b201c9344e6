"""A SYN from outside that nobody asked for: silence for six seconds, and then an ICMP error."""

from __future__ import annotations

import pytest

from nfmasq.engine import BEHAVIOURS, unsolicited
from nfmasq.engine.unsolicited import TOLD_PER_SECOND
from tests.gateway import GATEWAY, INSIDE, OTHER_SERVER, SERVER, Gateway
from tests.packets import (
    ACK,
    SYN,
    Endpoint,
    checksums_are_right,
    destination_address,
    number,
    source,
    source_address,
    tcp,
)

EI, AD, APD = BEHAVIOURS
PORT_UNREACHABLE = b"\x03\x03"
MAPPED: Endpoint = (GATEWAY, 61000)


def gateway_with_address(**settings: object) -> Gateway:
    """Make a gateway that knows its masquerade address."""
    gateway = Gateway(**settings)
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    return gateway


def test_an_unsolicited_syn_is_dropped_and_after_six_seconds_its_sender_is_told() -> None:
    gateway = gateway_with_address()
    syn = tcp(SERVER, MAPPED, SYN)
    assert gateway.into(syn) is None
    assert gateway.errors == {"unsolicited": 1}
    gateway.passes(5.9)
    assert not gateway.masq.outbox
    gateway.passes(0.2)
    (told,) = gateway.masq.outbox
    assert (source_address(told), destination_address(told)) == (GATEWAY, SERVER[0])
    assert told[20:22] == PORT_UNREACHABLE
    assert told[28:] == syn
    assert checksums_are_right(told)


def test_no_sender_is_told_that_cannot_be_one_host() -> None:
    gateway = gateway_with_address()
    for address in ("224.0.0.1", "255.255.255.255", "127.0.0.1", "0.0.0.0"):
        assert gateway.into(tcp((address, 443), MAPPED, SYN)) is None
    gateway.passes(10)
    assert not gateway.masq.outbox


def test_many_senders_are_told_in_steps_as_small_as_the_sweep_was_asked_for() -> None:
    gateway = gateway_with_address()
    for n in range(40):
        gateway.into(tcp((SERVER[0], 1024 + n), MAPPED, SYN))
    told = []
    while gateway.masq.sweep(gateway.now + 7, 16):
        told.append(len(gateway.masq.outbox))
    assert told == [16, 32]
    assert len(gateway.masq.outbox) == 40


def test_a_syn_that_is_sent_again_is_answered_once_and_six_seconds_after_the_first() -> None:
    gateway = gateway_with_address()
    for _ in range(3):
        assert gateway.into(tcp(SERVER, MAPPED, SYN)) is None
        gateway.passes(1.9)
    gateway.passes(0.5)
    assert len(gateway.masq.outbox) == 1
    gateway.passes(60)
    assert len(gateway.masq.outbox) == 1


def test_when_the_inside_opens_the_same_connection_meanwhile_there_is_silence() -> None:
    gateway = gateway_with_address()
    assert gateway.into(tcp(SERVER, MAPPED, SYN)) is None
    gateway.passes(3)
    sent = gateway.out(tcp(INSIDE, SERVER, SYN))
    assert sent is not None
    assert source(sent) == MAPPED
    assert gateway.into(tcp(SERVER, MAPPED, SYN)) == tcp(SERVER, INSIDE, SYN)
    assert gateway.out(tcp(INSIDE, SERVER, SYN | ACK)) == tcp(MAPPED, SERVER, SYN | ACK)
    gateway.passes(10)
    assert not gateway.masq.outbox


def test_a_syn_that_the_filtering_refuses_is_unsolicited_and_one_it_admits_is_not() -> None:
    gateway = gateway_with_address(filtering=AD)
    sent = gateway.out(tcp(INSIDE, SERVER, SYN))
    assert sent is not None
    assert gateway.into(tcp(OTHER_SERVER, source(sent), SYN)) is None
    assert gateway.into(tcp((SERVER[0], 5000), source(sent), SYN)) == tcp(
        (SERVER[0], 5000), INSIDE, SYN
    )


@pytest.mark.parametrize(
    "packet",
    [
        tcp(SERVER, (GATEWAY, 22), SYN),
        tcp(SERVER, ("203.0.113.99", 61000), SYN),
        tcp(SERVER, MAPPED, SYN | ACK),
        tcp(SERVER, MAPPED, ACK),
    ],
    ids=["another port", "another address", "an answer", "no opening"],
)
def test_what_may_be_the_gateways_own_is_left_alone(packet: bytes) -> None:
    gateway = gateway_with_address()
    assert gateway.into(packet) is packet
    gateway.passes(10)
    assert not gateway.masq.outbox


def test_where_unsolicited_syns_are_accepted_they_are_left_to_the_gateway() -> None:
    gateway = gateway_with_address(unsolicited="accept")
    syn = tcp(SERVER, MAPPED, SYN)
    assert gateway.into(syn) is syn


def flood(gateway: Gateway, first: int, many: int) -> None:
    """Have many outsiders send a SYN each that nobody asked for; all are dropped."""
    for n in range(first, first + many):
        outsider = (f"198.51.{n % 200}.{n % 250 + 1}", 1024 + n)
        assert gateway.into(tcp(outsider, MAPPED, SYN)) is None


def test_of_a_flood_only_so_many_syns_are_held_and_all_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unsolicited, "MOST_HELD", 40)
    gateway = gateway_with_address()
    flood(gateway, 0, 3 * 40)
    gateway.passes(7)
    assert len(gateway.masq.outbox) == 40


def test_of_a_flood_only_so_many_senders_are_told_in_a_second() -> None:
    gateway = gateway_with_address()
    flood(gateway, 0, 1000)
    gateway.passes(7)
    assert len(gateway.masq.outbox) == TOLD_PER_SECOND
    for tenth in range(100):
        flood(gateway, 100 * tenth, 100)
        gateway.passes(0.1)
    assert 2 * TOLD_PER_SECOND <= len(gateway.masq.outbox) <= (1 + 10) * TOLD_PER_SECOND


def test_senders_that_are_not_told_cost_those_that_are_told_nothing() -> None:
    gateway = gateway_with_address()
    for n in range(3 * TOLD_PER_SECOND):
        gateway.into(tcp(SERVER, (GATEWAY, 61000 + n), SYN))
        assert gateway.out(tcp((INSIDE[0], 1024 + n), SERVER, SYN)) is not None
    assert gateway.into(tcp(OTHER_SERVER, MAPPED, SYN)) is None
    gateway.passes(7)
    (told,) = gateway.masq.outbox
    assert destination_address(told) == OTHER_SERVER[0]
