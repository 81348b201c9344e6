"""The busiest entries, as a client is told of them that watches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from nfmasq.daemon import busiest as module
from nfmasq.daemon.busiest import busiest
from nfmasq.daemon.control import describe
from nfmasq.engine import IpMasq
from nfmasq.errors import NfmasqError
from tests.gateway import SERVER, Gateway, endpoints
from tests.packets import SYN, tcp

SECONDS = 2.0


@pytest.fixture
def gateway() -> Gateway:
    gateway = Gateway()
    for inside in endpoints("10.0.0.2", 3):
        gateway.out(tcp(inside, SERVER, SYN))
    return gateway


@pytest.fixture
def told(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a client is told; SECONDS pass between two looks, and nobody waits for them."""
    clock = count(0.0, SECONDS)
    monkeypatch.setattr(module, "monotonic", lambda: next(clock))

    def wait(seconds: float) -> bool:
        gateway.now += seconds
        return False

    return busiest(gateway.sessions, describe, lambda: gateway.now, SECONDS, wait)


def move(gateway: Gateway, ms: IpMasq, out: int, back: int) -> None:
    """Have an entry move bytes."""
    ms.bytes_out += out
    ms.bytes_in += back
    ms.timer = gateway.now + ms.timeout


def rates(look: dict[str, Any]) -> list[tuple[int, float, float]]:
    return [(entry["sport"], entry["rate_out"], entry["rate_in"]) for entry in look["busiest"]]


def test_at_once_a_client_learns_how_many_entries_there_are(told: Iterator[dict[str, Any]]) -> None:
    assert next(told) == {"entries": 3, "cached": 0, "busiest": []}


@pytest.mark.parametrize("remembered", [2, 100])
def test_rates_are_those_since_the_look_before(
    gateway: Gateway,
    told: Iterator[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    remembered: int,
) -> None:
    monkeypatch.setattr(module, "REMEMBERED", remembered)
    next(told)
    first, second, third = gateway.sessions.entries()
    for n in range(3):
        move(gateway, second, 1000, 0)
        move(gateway, third, 100, 400)
        told_of = rates(next(told))
        if n == 2:
            assert told_of[:2] == [(1025, 4000.0, 0.0), (1026, 400.0, 1600.0)]
    assert first.bytes_out


@pytest.mark.parametrize(("remembered", "looks"), [(100, 1), (2, 2)])
def test_an_entry_that_begins_is_told_of(
    gateway: Gateway,
    told: Iterator[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    remembered: int,
    looks: int,
) -> None:
    """In a large table its second look is the first that says how much it has moved since."""
    monkeypatch.setattr(module, "REMEMBERED", remembered)
    next(told), next(told)
    gateway.out(tcp(("10.0.0.3", 5000), SERVER, SYN))
    for n in range(looks):
        move(gateway, gateway.sessions.entries()[-1], 10_000, 0)
        sports = [sport for sport, *_ in rates(next(told))]
        assert (5000 in sports) == (n == looks - 1)


def test_when_nfmasq_stops_the_client_learns_it(gateway: Gateway) -> None:
    told = busiest(gateway.sessions, describe, lambda: 0.0, SECONDS, lambda seconds: True)
    next(told)
    with pytest.raises(NfmasqError, match="has stopped"):
        next(told)
