"""A packet of a known flow holds its entry while it is in hand, though nothing is locked."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from itertools import count
from time import monotonic

import pytest

from nfmasq.engine import IpMasq
from nfmasq.engine.table.endings import DELETED, EXPIRED
from nfmasq.engine.watch import Watcher
from tests.gateway import INSIDE, OTHER_SERVER, SERVER, Gateway
from tests.packets import ACK, SYN, source, tcp, udp
from tests.threads import in_the_background

SECONDS = 1.5
LATER = 1e6
"""From this time on every entry is due at each sweep."""


class Endings(Watcher):
    """Notes how many packets each entry had when it ended."""

    def __init__(self) -> None:
        self.packets: list[tuple[IpMasq, int]] = []

    def ended(self, ms: IpMasq, reason: str) -> None:
        if reason == EXPIRED:
            self.packets.append((ms, packets_of(ms)))


def packets_of(ms: IpMasq) -> int:
    return ms.packets_out + ms.packets_in


@pytest.fixture
def _taking_turns() -> Iterator[None]:
    """Give the interpreter from thread to thread as often as can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_taking_turns")
@pytest.mark.parametrize("outbound", [True, False])
def test_an_entry_that_is_due_does_not_expire_while_a_packet_has_it_in_hand(outbound: bool) -> None:
    """No packet goes by an entry that has ended: it keeps the entry, or begins a new session."""
    gateway = Gateway(lock=threading.RLock())
    endings = Endings()
    gateway.sessions.watch.subscribe(endings)
    packets, end, times = 0, monotonic() + SECONDS, count(LATER)
    with in_the_background(lambda: gateway.masq.sweep(next(times), 8)):
        while monotonic() < end:
            mapped = gateway.send(INSIDE, SERVER)
            for _ in range(5):
                if outbound:
                    assert gateway.out(udp(INSIDE, SERVER)) is not None
                else:
                    gateway.into(udp(SERVER, mapped))
                packets += 1
    assert endings.packets
    changed = [ms for ms, before in endings.packets if packets_of(ms) != before]
    assert not changed, f"of {packets} packets some went by an entry that had ended"


def test_an_entry_in_hand_stays_and_its_timer_starts_again() -> None:
    gateway = Gateway()
    gateway.send(INSIDE, SERVER)
    (ms,) = gateway.sessions.entries()
    gateway.sessions.hand.ms = ms
    gateway.passes(1000)
    assert gateway.sessions.entries() == [ms]
    assert ms.timer == gateway.now + ms.timeout
    gateway.sessions.hand.ms = None
    gateway.passes(1000)
    assert gateway.sessions.entries() == []


def test_an_entry_in_hand_makes_no_room_for_another() -> None:
    gateway = Gateway(max_entries=1)
    gateway.send(INSIDE, SERVER)
    (ms,) = gateway.sessions.entries()
    gateway.sessions.hand.ms = ms
    assert gateway.out(udp(INSIDE, OTHER_SERVER)) is None
    assert gateway.sessions.entries() == [ms]


@pytest.mark.parametrize("fast", [True, False])
def test_no_packet_leaves_anything_in_hand(fast: bool) -> None:
    gateway = Gateway(fast=fast)
    mapped = source(gateway.out(tcp(INSIDE, SERVER, SYN)) or b"")
    for packet in (
        tcp(SERVER, mapped, SYN | ACK),
        tcp(SERVER, mapped, ACK)[:30],
        tcp(OTHER_SERVER, mapped, ACK),
    ):
        gateway.into(packet)
        assert gateway.sessions.hand.ms is None
    for packet in (tcp(INSIDE, SERVER, ACK), tcp(INSIDE, SERVER, ACK)[:30], udp(INSIDE, SERVER)):
        gateway.out(packet)
        assert gateway.sessions.hand.ms is None


def test_an_entry_that_a_person_ends_is_not_used_any_more_but_by_the_packet_in_hand() -> None:
    gateway = Gateway()
    gateway.send(INSIDE, SERVER)
    (ms,) = gateway.sessions.entries()
    gateway.sessions.hand.ms = ms
    assert gateway.sessions.remove(ms, DELETED)
    assert gateway.out(udp(INSIDE, SERVER)) is not None
    assert ms.packets_out == 1
    (begun,) = gateway.sessions.entries()
    assert begun is not ms
