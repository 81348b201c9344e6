"""Addresses that change: which entries end then, and that no others end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from nfmasq.daemon.renumbering import Renumbering
from nfmasq.engine import UDP, IpMasq, Masquerade
from nfmasq.engine.table.entry import NO_REPLY
from tests.gateway import ended
from tests.packets import number
from tests.traffic.observed import eventually

OLD, NEW, LATER = map(number, ("198.51.100.2", "198.51.100.3", "198.51.100.4"))
ELSEWHERE, MOVED = map(number, ("192.0.2.1", "192.0.2.2"))

Addresses = dict[str, tuple[int, ...]]


class Gateway:
    """A masquerade with answered entries on OLD and ELSEWHERE, whose addresses are followed."""

    def __init__(self) -> None:
        self.engine = Masquerade()
        self.renumbering = Renumbering(self.engine, self.engine.outbox.clear)
        for maddr in (OLD, ELSEWHERE):
            self.add(maddr, 0)

    def add(self, maddr: int, flags: int, sport: int = 5000) -> None:
        ms = self.engine.sessions.ip_masq_new(
            UDP, maddr, 0, number("10.77.0.11"), sport, number("203.0.113.11"), maddr & 255, flags
        )
        assert ms
        self.engine.sessions.ip_masq_put(ms)

    def entries_on(self, maddr: int) -> int:
        return sum(ms.maddr == maddr for ms in self.engine.sessions.entries())

    def follow(self, *pictures: Addresses) -> None:
        """Follow one picture of the addresses after the other; waits until all is done.

        Pictures are taken up in order, so the entries of the address that another interface loses
        at the end are ended last.
        """
        for picture in pictures:
            self.renumbering.follow({**picture, "last": (ELSEWHERE,)})
        self.renumbering.follow({**pictures[-1], "last": (MOVED,)})
        assert eventually(lambda: not self.entries_on(ELSEWHERE))


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.renumbering.stop()


@pytest.mark.parametrize(
    "pictures",
    [
        [{"wan": (OLD,)}, {"wan": (NEW,)}],
        [{"wan": (OLD,)}, {}, {"wan": (NEW,)}],
        [{"wan": (OLD,)}, {"wan": (OLD, NEW)}, {"wan": (NEW,)}],
        [{"wan": (OLD, NEW)}, {"wan": (NEW,)}],
        [{"wan": (OLD,)}, {"ppp0": (OLD,), "wan": (NEW,)}, {"wan": (NEW,)}, {"ppp0": (LATER,)}],
    ],
    ids=["replaced", "after a while without", "side by side", "one of two", "moved, then replaced"],
)
def test_entries_end_when_their_address_is_replaced(
    gateway: Gateway, pictures: list[Addresses]
) -> None:
    gateway.follow(*pictures)
    assert gateway.entries_on(OLD) == 0
    assert ended(gateway.engine) == {"address": 2}  # the entries on OLD and on ELSEWHERE


@pytest.mark.parametrize(
    "pictures",
    [
        [{"wan": (OLD,)}, {}],
        [{"wan": (OLD,)}, {}, {"wan": (OLD,)}],
        [{"wan": (OLD,)}, {"wan": (OLD, NEW)}],
        [{"wan": (OLD,)}, {"wan": (NEW,), "dmz": (OLD,)}],
        [{"wan": (OLD,), "wan2": (NEW,)}, {"wan2": (NEW,)}, {"wan2": (LATER,)}],
    ],
    ids=["none yet", "the same again", "another beside it", "moved", "another interface's"],
)
def test_entries_stay_while_their_address_may_come_back(
    gateway: Gateway, pictures: list[Addresses]
) -> None:
    gateway.follow(*pictures)
    assert gateway.entries_on(OLD) == 1


def test_an_entry_that_was_never_answered_stays(gateway: Gateway) -> None:
    gateway.add(OLD, NO_REPLY, sport=6000)
    gateway.follow({"wan": (OLD,)}, {"wan": (NEW,)})
    (left,) = gateway.engine.sessions.entries()
    assert left.flags & NO_REPLY


def test_the_engine_knows_the_addresses_of_all_interfaces(gateway: Gateway) -> None:
    gateway.renumbering.follow({"wan": (OLD, NEW), "lan": (ELSEWHERE,)})
    assert set(gateway.engine.inbound.maddrs) == {OLD, NEW, ELSEWHERE}
    assert gateway.engine.outbound.beside == {
        OLD: {OLD, NEW},
        NEW: {OLD, NEW},
        ELSEWHERE: {ELSEWHERE},
    }
    gateway.renumbering.follow({})
    assert not gateway.engine.inbound.maddrs
    assert not gateway.engine.outbound.beside


def test_an_address_of_two_interfaces_is_beside_the_addresses_of_both(gateway: Gateway) -> None:
    gateway.renumbering.follow({"wan": (OLD, NEW), "ppp0": (OLD, MOVED)})
    assert gateway.engine.outbound.beside[OLD] == {OLD, NEW, MOVED}
    assert gateway.engine.outbound.beside[NEW] == {OLD, NEW}


class Midway(Gateway):
    """A gateway that stands still while it ends many entries on OLD, until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.renumbering.stop()
        self.go_on = threading.Event()
        self.renumbering = Renumbering(self.engine, self._between_two_steps)
        for sport in range(10_000, 10_100):
            self.add(OLD, 0, sport)
        self.renumbering.follow({"wan": (OLD,)})
        self.renumbering.follow({"wan": (NEW,)})
        assert eventually(lambda: bool(ended(self.engine)))

    def _between_two_steps(self) -> None:
        self.engine.outbox.clear()
        if ended(self.engine):
            self.go_on.wait()

    def is_stopping(self) -> bool:
        return self.renumbering._stopping.is_set()


@pytest.fixture
def midway() -> Iterator[Midway]:
    midway = Midway()
    yield midway
    midway.go_on.set()
    midway.renumbering.stop()


def test_an_address_that_comes_back_meanwhile_keeps_what_is_left(midway: Midway) -> None:
    midway.renumbering.follow({"wan": (OLD,)})
    midway.go_on.set()
    midway.follow({"wan": (OLD,)})
    assert midway.entries_on(OLD) > 0


def test_stopping_does_not_wait_for_a_large_table(midway: Midway) -> None:
    stopping = threading.Thread(target=midway.renumbering.stop)
    stopping.start()
    assert eventually(midway.is_stopping)
    midway.go_on.set()
    stopping.join()
    assert midway.entries_on(OLD) > 0


def test_changes_are_logged_with_what_ended(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("nfmasq"), "propagate", True)
    caplog.set_level(logging.INFO, "nfmasq")
    gateway.follow({"wan": (OLD,)}, {}, {"wan": (NEW,)})
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if "last" not in message][:3] == [
        "wan has the addresses: none",
        "wan has the addresses: 198.51.100.3",
        "198.51.100.2 is gone, and with it entries: 1",
    ]


def test_a_failure_costs_that_address_only(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    address_gone = gateway.engine.masq_address_gone

    def fail(ms: IpMasq, now: float) -> object:
        if ms.maddr == OLD:
            raise ZeroDivisionError
        return address_gone(ms, now)

    monkeypatch.setattr(gateway.engine, "masq_address_gone", fail)
    gateway.follow({"wan": (OLD,)}, {"wan": (NEW,)})
    assert gateway.entries_on(OLD) == 1
