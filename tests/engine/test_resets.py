"""The masquerade address goes: what becomes of the entries on it."""

from __future__ import annotations

import pytest

from nfmasq.engine import TCP, resets
from tests.gateway import INSIDE, NEW_ADDRESS, OTHER_SERVER, SERVER, Gateway, entries_on
from tests.packets import (
    ACK,
    FIN,
    RST,
    SYN,
    Endpoint,
    checksums_are_right,
    destination,
    number,
    source,
    source_address,
    tcp,
    udp,
)

EXPECTED = 0x01020304
OTHER_ADDRESS = "203.0.113.3"


def connect(gateway: Gateway, inside: Endpoint = INSIDE) -> None:
    """Open a connection in both directions."""
    sent = gateway.out(tcp(inside, SERVER, SYN))
    assert sent is not None
    assert gateway.into(tcp(SERVER, source(sent), SYN | ACK)) is not None
    assert gateway.out(tcp(inside, SERVER, ACK)) is not None


def address_goes(gateway: Gateway) -> int:
    """Give the gateway another address; returns how many entries ended."""
    gone, gateway.address = gateway.address, NEW_ADDRESS
    entries = entries_on(gateway, number(gone))
    return sum(gateway.masq.masq_address_gone(ms, gateway.now) for ms in entries)


def flags_and_number(packet: bytes) -> tuple[int, int]:
    return packet[33], int.from_bytes(packet[24:28], "big")


def test_an_entry_that_nothing_came_back_for_moves_with_its_next_packet() -> None:
    gateway = Gateway()
    gateway.send(INSIDE, SERVER)
    assert address_goes(gateway) == 0
    assert gateway.send(INSIDE, SERVER)[0] == NEW_ADDRESS
    assert len(gateway.sessions.entries()) == 1


def test_an_answered_entry_ends_at_once_and_is_counted() -> None:
    gateway = Gateway()
    assert gateway.lets_in(SERVER, gateway.send(INSIDE, SERVER))
    assert gateway.lets_in(OTHER_SERVER, gateway.send(INSIDE, OTHER_SERVER))
    assert address_goes(gateway) == 2
    assert gateway.sessions.entries() == []
    assert gateway.ended == {"address": 2}
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
    assert gateway.sessions.entries() == []


def sent_meanwhile(gateway: Gateway) -> list[bytes]:
    """Take the packets that the gateway has sent of its own since the last look."""
    sent = list(gateway.masq.outbox)
    gateway.masq.outbox.clear()
    return sent


def test_a_probe_that_is_not_answered_is_sent_again_after_1_3_and_9_seconds() -> None:
    """The answer may have come when the gateway had no default route yet."""
    gateway = Gateway()
    connect(gateway)
    address_goes(gateway)
    (probe,) = sent_meanwhile(gateway)
    again = []
    for quarter in range(1, 100):
        gateway.passes(0.25)
        again += [(quarter / 4, packet) for packet in sent_meanwhile(gateway)]
    assert again == [(1, probe), (3, probe), (9, probe)]


@pytest.mark.parametrize("seconds", [0, 1, 3])
@pytest.mark.parametrize("flags", [ACK, RST, RST | ACK])
def test_a_probe_that_is_answered_is_not_sent_again(seconds: float, flags: int) -> None:
    gateway = Gateway()
    connect(gateway)
    address_goes(gateway)
    gateway.passes(seconds)
    assert sent_meanwhile(gateway)
    assert gateway.out(tcp(INSIDE, SERVER, flags)) is None
    assert len(sent_meanwhile(gateway)) == (flags == ACK)
    for _ in range(10):
        gateway.passes(1)
    assert not gateway.masq.outbox


def test_a_connection_that_was_opened_anew_is_not_probed() -> None:
    gateway = Gateway()
    connect(gateway)
    address_goes(gateway)
    sent_meanwhile(gateway)
    gateway.out(tcp(INSIDE, SERVER, SYN))
    for _ in range(10):
        gateway.passes(1)
    assert not gateway.masq.outbox


def test_a_connection_that_is_remembered_no_more_is_probed_no_more() -> None:
    gateway = Gateway()
    connect(gateway)
    address_goes(gateway)
    gateway.now += resets.REMEMBERED + 1  # and nobody has looked what was due
    connect(gateway, (INSIDE[0], 40001))
    gateway.address = OTHER_ADDRESS
    for ms in gateway.sessions.entries():
        gateway.masq.masq_address_gone(ms, gateway.now)
    connect(gateway)
    sent_meanwhile(gateway)
    gateway.passes(1)
    (probe,) = sent_meanwhile(gateway)
    assert destination(probe) == (INSIDE[0], 40001)


def test_a_connection_that_ends_anew_is_probed_anew() -> None:
    gateway = Gateway()
    connect(gateway)
    address_goes(gateway)
    gateway.passes(2)
    connect(gateway)
    (ms,) = gateway.sessions.entries()
    sent_meanwhile(gateway)
    gateway.masq.masq_address_gone(ms, gateway.now)
    (probe,) = sent_meanwhile(gateway)
    gateway.passes(0.75)
    assert not gateway.masq.outbox
    gateway.passes(0.25)
    assert sent_meanwhile(gateway) == [probe]


def test_a_step_of_the_sweep_sends_no_more_probes_again_than_its_limit() -> None:
    gateway = Gateway()
    for port in range(7):
        connect(gateway, (INSIDE[0], 40000 + port))
    address_goes(gateway)
    probes = sent_meanwhile(gateway)
    gateway.now += 1
    for step, more in ((3, True), (3, True), (1, False)):
        assert gateway.masq.sweep(gateway.now, 3) is more
        assert len(gateway.masq.outbox) == step
        assert sent_meanwhile(gateway) == [probes.pop(0) for _ in range(step)]


def test_of_more_connections_than_are_remembered_each_is_probed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resets, "MOST_REMEMBERED", 2)
    gateway = Gateway()
    for port in range(3):
        connect(gateway, (INSIDE[0], 40000 + port))
    address_goes(gateway)
    probes = sent_meanwhile(gateway)
    assert len(probes) == 3
    gateway.passes(1)
    assert sent_meanwhile(gateway) == probes[:2]


def test_a_flood_of_segments_is_answered_at_a_bounded_rate_and_all_hosts_hear_in_the_end() -> None:
    gateway = Gateway()
    connect(gateway)
    address_goes(gateway)
    sent_meanwhile(gateway)
    for _ in range(3 * resets.RESETS_PER_SECOND):
        gateway.out(tcp(INSIDE, SERVER, ACK))
    assert len(sent_meanwhile(gateway)) == resets.RESETS_PER_SECOND
    gateway.now += 1
    assert gateway.out(tcp(INSIDE, SERVER, ACK)) is None
    assert len(sent_meanwhile(gateway)) == 1


def test_a_probe_whose_answer_is_one_too_many_is_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resets, "RESETS_PER_SECOND", 1)
    gateway = Gateway()
    hosts = [(INSIDE[0], 40000 + port) for port in range(2)]
    for inside in hosts:
        connect(gateway, inside)
    address_goes(gateway)
    probes = sent_meanwhile(gateway)
    for inside in hosts:
        gateway.out(tcp(inside, SERVER, ACK))
    assert len(sent_meanwhile(gateway)) == 1
    gateway.passes(1)
    assert sent_meanwhile(gateway) == probes[1:]


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
    (ms,) = gateway.sessions.entries()
    assert ms.maddr == number(NEW_ADDRESS)


def test_a_connection_that_was_ending_is_not_reset() -> None:
    gateway = Gateway()
    connect(gateway)
    (entry,) = gateway.sessions.entries()
    gateway.out(tcp(INSIDE, SERVER, FIN | ACK))
    gateway.into(tcp(SERVER, ("203.0.113.1", entry.mport), FIN | ACK))
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
    gone = entries_on(gateway, number(before))
    assert [ms.protocol for ms in gone] == [TCP]
    assert gateway.into(udp(OTHER_SERVER, (NEW_ADDRESS, 61001))) is not None
