"""The masquerade ports: one round after the other, never a taken one, none lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import PORT_SELECTIONS, TCP, UDP, Masquerade
from nfmasq.engine.ports import MasqueradePorts

MADDR = 0xCB007101
OTHER = 0xCB007102
RANGE = range(61000, 61008)

SELECTIONS = pytest.mark.parametrize("selection", PORT_SELECTIONS)
TAKEN = st.sets(st.sampled_from(RANGE))


def with_taken(taken: set[int]) -> MasqueradePorts:
    ports = MasqueradePorts(RANGE)
    for mport in taken:
        ports.take(UDP, MADDR, mport)
    return ports


def naive_next_unused(ports: MasqueradePorts) -> int | None:
    """The design document's search: get_next_mport until one is unused, at most one round."""
    for _ in RANGE:
        mport = ports.get_next_mport()
        if ports.unused(UDP, MADDR, mport):
            return mport
    return None


@given(st.integers(1, 65535), st.integers(1, 20), st.integers(0, 50))
def test_after_the_last_port_comes_the_first(first: int, count: int, calls: int) -> None:
    span = range(first, min(first + count, 65536))
    masq = Masquerade(ports=span)
    assert [masq.get_next_mport() for _ in range(calls)] == [
        span[n % len(span)] for n in range(calls)
    ]


@given(TAKEN, st.integers(0, 20))
def test_next_unused_is_get_next_mport_called_until_a_port_is_unused(
    taken: set[int], calls_before: int
) -> None:
    ports, naive = with_taken(taken), with_taken(taken)
    for _ in range(calls_before):
        ports.get_next_mport()
        naive.get_next_mport()
    found = ports.next_unused(UDP, MADDR)
    assert found == naive_next_unused(naive)
    if found is not None:
        assert ports.get_next_mport() == naive.get_next_mport()


@SELECTIONS
@given(TAKEN, st.integers(1, 65535))
def test_a_selection_gives_a_free_port_as_long_as_there_is_one(
    selection: str, taken: set[int], sport: int
) -> None:
    chosen = PORT_SELECTIONS[selection](with_taken(taken), UDP, MADDR, sport)
    if taken == set(RANGE):
        assert chosen is None
    else:
        assert chosen in set(RANGE) - taken


@SELECTIONS
def test_every_port_is_given_once_and_then_none(selection: str) -> None:
    ports = MasqueradePorts(RANGE)
    given_out = []
    for sport in range(1, len(RANGE) + 1):
        mport = PORT_SELECTIONS[selection](ports, UDP, MADDR, sport)
        assert mport is not None
        ports.take(UDP, MADDR, mport)
        given_out.append(mport)
    assert sorted(given_out) == list(RANGE)
    assert ports.free(UDP) == 0
    assert PORT_SELECTIONS[selection](ports, UDP, MADDR, 1) is None


@SELECTIONS
@given(st.sampled_from(RANGE))
def test_a_port_given_back_is_the_one_that_is_found(selection: str, mport: int) -> None:
    ports = with_taken(set(RANGE))
    ports.give_back(UDP, MADDR, mport)
    assert PORT_SELECTIONS[selection](ports, UDP, MADDR, 5353) == mport


@given(TAKEN, st.sampled_from(RANGE))
def test_preserve_keeps_the_inside_port_where_it_is_free(taken: set[int], sport: int) -> None:
    chosen = PORT_SELECTIONS["preserve"](with_taken(taken), UDP, MADDR, sport)
    assert (chosen == sport) == (sport not in taken)


def test_random_does_not_follow_a_row() -> None:
    ports = MasqueradePorts(range(1, 65536))
    chosen = [PORT_SELECTIONS["random"](ports, UDP, MADDR, 1) for _ in range(8)]
    rows = [list(range(first, first + 8)) for first in range(1, 65529)]
    assert chosen not in rows


def test_protocols_and_addresses_have_their_own_ports() -> None:
    ports = with_taken(set(RANGE))
    assert ports.next_unused(UDP, MADDR) is None
    assert ports.next_unused(TCP, MADDR) is not None
    assert ports.next_unused(UDP, OTHER) is not None
    assert ports.free(TCP) == len(RANGE)


@given(TAKEN)
def test_ports_all_given_back_are_all_free_and_leave_nothing(taken: set[int]) -> None:
    ports = with_taken(taken)
    assert ports.free(UDP) == len(RANGE) - len(taken)
    for mport in taken:
        ports.give_back(UDP, MADDR, mport)
    assert ports.free(UDP) == len(RANGE)
    assert repr(vars(ports)) == repr(vars(MasqueradePorts(RANGE)))


def test_a_port_outside_the_range_is_not_counted() -> None:
    ports = MasqueradePorts(RANGE)
    ports.take(UDP, MADDR, 8080)
    assert ports.free(UDP) == len(RANGE)
    ports.give_back(UDP, MADDR, 8080)
    assert ports.free(UDP) == len(RANGE)
