"""The masquerade address goes: what becomes of the entries on it."""

from __future__ import annotations

from nfmasq.engine import TCP
from tests.gateway import INSIDE, NEW_ADDRESS, OTHER_SERVER, SERVER, Gateway
from tests.packets import (
    ACK,
    FIN,
    RST,
    SYN,
    checksums_are_right,
    destination,
    number,
    source,
    source_address,
    tcp,
    udp,
)

EXPECTED = 0x01020304


def connect(gateway: Gateway) -> None:
    """A connection, open in both directions."""
    sent = gateway.out(tcp(INSIDE, SERVER, SYN))
    assert sent is not None
    assert gateway.into(tcp(SERVER, source(sent), SYN | ACK)) is not None
    assert gateway.out(tcp(INSIDE, SERVER, ACK)) is not None


def address_goes(gateway: Gateway) -> int:
    """The gateway has another address now; how many entries ended."""
    gone, gateway.address = gateway.address, NEW_ADDRESS
    entries = gateway.masq.entries_on(number(gone))
    return sum(gateway.masq.masq_address_gone(ms, gateway.now) for ms in entries)


def flags_and_number(packet: bytes) -> tuple[int, int]:
    return packet[33], int.from_bytes(packet[24:28], "big")


def test_an_entry_that_nothing_came_back_for_moves_with_its_next_packet() -> None:
    gateway = Gateway()
    gateway.send(INSIDE, SERVER)
    assert address_goes(gateway) == 0
    assert gateway.send(INSIDE, SERVER)[0] == NEW_ADDRESS
    assert len(gateway.masq.entries()) == 1


def test_an_answered_entry_ends_at_once_and_is_counted() -> None:
    gateway = Gateway()
    assert gateway.lets_in(SERVER, gateway.send(INSIDE, SERVER))
    assert gateway.lets_in(OTHER_SERVER, gateway.send(INSIDE, OTHER_SERVER))
    assert address_goes(gateway) == 2
    assert gateway.masq.entries() == []
    assert gateway.masq.counters.ended == {"address": 2, "evicted": 0}
    assert not gateway.masq.outbox
    assert gateway.send(INSIDE, SERVER)[0] == NEW_ADDRESS


def test_a_tcp_host_is_asked_for_its_number_and_reset_with_it() -> None:
    gateway = Gateway()
    connect(gateway)
    assert address_goes(gateway) == 1

    probe = gateway.masq.outbox.popleft()
    assert (source(probe), destination(probe)) == (SERVER, INSIDE)
    assert flags_and_number(probe) == (ACK, 0)
    assert checksums_are_right(probe)

    answer = bytearray(tcp(INSIDE, SERVER, ACK))
    answer[28:32] = EXPECTED.to_bytes(4, "big")
    assert gateway.out(bytes(answer)) is None
    reset = gateway.masq.outbox.popleft()
    assert (source(reset), destination(reset)) == (SERVER, INSIDE)
    assert flags_and_number(reset) == (RST, EXPECTED)
    assert checksums_are_right(reset)
    assert gateway.errors == {"address_changed": 1}
    assert gateway.masq.entries() == []


def test_a_reset_is_not_answered_with_a_reset() -> None:
    gateway = Gateway()
    connect(gateway)
    address_goes(gateway)
    gateway.masq.outbox.clear()
    assert gateway.out(tcp(INSIDE, SERVER, RST | ACK)) is None
    assert not gateway.masq.outbox


def test_the_same_ports_can_open_a_connection_anew() -> None:
    gateway = Gateway()
    connect(gateway)
    address_goes(gateway)
    connect(gateway)
    (ms,) = gateway.masq.entries()
    assert ms.maddr == number(NEW_ADDRESS)


def test_a_connection_that_was_ending_is_not_reset() -> None:
    gateway = Gateway()
    connect(gateway)
    mapped = gateway.masq.entries()[0]
    gateway.out(tcp(INSIDE, SERVER, FIN | ACK))
    gateway.into(tcp(SERVER, ("203.0.113.1", mapped.mport), FIN | ACK))
    assert address_goes(gateway) == 1
    assert not gateway.masq.outbox


def test_without_resets_what_goes_on_makes_a_new_entry() -> None:
    gateway = Gateway(reset_on_address_change=False)
    connect(gateway)
    assert address_goes(gateway) == 1
    assert not gateway.masq.outbox
    sent = gateway.out(tcp(INSIDE, SERVER, ACK))
    assert sent is not None
    assert source_address(sent) == NEW_ADDRESS


def test_entries_on_another_address_stay() -> None:
    gateway = Gateway()
    connect(gateway)
    before, gateway.address = gateway.address, NEW_ADDRESS
    assert gateway.lets_in(OTHER_SERVER, gateway.send(INSIDE, OTHER_SERVER))
    gone = gateway.masq.entries_on(number(before))
    assert [ms.protocol for ms in gone] == [TCP]
    assert gateway.into(udp(OTHER_SERVER, (NEW_ADDRESS, 61001))) is not None
