"""Masquerade ports: a free port is found as long as there is any, and it is the right port."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import PORT_SELECTIONS, TCP, UDP
from nfmasq.engine.table.ports import MasqueradePorts, kind
from tests.gateway import masquerade_with

MADDR = 0xCB007101
OTHER = 0xCB007102

RANGES = (*range(1020, 1030), *range(61000, 61008))
"""Two ranges, the first of them on both sides of 1024."""

SELECTIONS = pytest.mark.parametrize("selection", PORT_SELECTIONS)

PORTS = st.lists(
    st.integers(1, 65535) | st.integers(1000, 1050), min_size=1, max_size=30, unique=True
).map(sorted)
"""Any ascending masquerade ports, often on both sides of 1024."""

TAKEN = st.sets(st.sampled_from(RANGES))


def with_taken(taken: set[int], of: Sequence[int] = RANGES) -> MasqueradePorts:
    ports = MasqueradePorts(of)
    for mport in taken:
        ports.take(UDP, MADDR, mport)
    return ports


def choose(selection: str, ports: MasqueradePorts, sport: int) -> int | None:
    return PORT_SELECTIONS[selection](ports, UDP, MADDR, sport)


# -- for every selection --------------------------------------------------------------


@SELECTIONS
@given(PORTS, st.data(), st.integers(0, 65535))
def test_a_selection_gives_a_free_port_as_long_as_there_is_one(
    selection: str, among: list[int], data: st.DataObject, sport: int
) -> None:
    taken = data.draw(st.sets(st.sampled_from(among)))
    chosen = choose(selection, with_taken(taken, among), sport)
    free = set(among) - taken
    assert (chosen in free) if free else chosen is None


@SELECTIONS
@given(PORTS)
def test_every_port_is_given_once_and_then_none(selection: str, among: list[int]) -> None:
    ports = MasqueradePorts(among)
    given_out = []
    for free in range(len(among), 0, -1):
        assert ports.free(UDP) == free
        mport = choose(selection, ports, 5353)
        assert mport is not None
        ports.take(UDP, MADDR, mport)
        given_out.append(mport)
    assert sorted(given_out) == among
    assert ports.free(UDP) == 0
    assert choose(selection, ports, 5353) is None


@SELECTIONS
@given(st.sampled_from(RANGES), st.integers(0, 65535))
def test_a_port_given_back_is_the_one_that_is_found(selection: str, mport: int, sport: int) -> None:
    ports = with_taken(set(RANGES))
    ports.give_back(UDP, MADDR, mport)
    assert choose(selection, ports, sport) == mport


@SELECTIONS
@pytest.mark.parametrize("last", [1, 1023, 1024, 40_000, 65_000])
def test_the_last_of_65000_ports_is_found_in_no_time(selection: str, last: int) -> None:
    """A walk through all ports would take some 2 ms."""
    everything = range(1, 65_001)
    ports = with_taken({*everything} - {last}, everything)

    def seconds() -> float:
        began = time.perf_counter()
        assert choose(selection, ports, 5353) == last
        return time.perf_counter() - began

    assert min(seconds() for _ in range(20)) < 0.000_5


# -- sequential -----------------------------------------------------------------------


@given(PORTS, st.integers(0, 70))
def test_after_the_last_port_comes_the_first(among: list[int], calls: int) -> None:
    masq = masquerade_with(ports=among)
    assert [masq.sessions.get_next_mport() for _ in range(calls)] == [
        among[n % len(among)] for n in range(calls)
    ]


@given(PORTS, st.data(), st.integers(0, 70))
def test_next_unused_is_get_next_mport_called_until_a_port_is_unused(
    among: list[int], data: st.DataObject, calls_before: int
) -> None:
    taken = data.draw(st.sets(st.sampled_from(among)))
    ports, naive = with_taken(taken, among), with_taken(taken, among)
    for _ in range(calls_before):
        ports.get_next_mport()
        naive.get_next_mport()
    one_round = (naive.get_next_mport() for _ in among)
    assert ports.next_unused(UDP, MADDR) == next(
        (mport for mport in one_round if naive.unused(UDP, MADDR, mport)), None
    )
    assert ports.get_next_mport() == naive.get_next_mport()


# -- preserve -------------------------------------------------------------------------


@given(TAKEN, st.sampled_from(RANGES))
def test_preserve_keeps_the_inside_port_where_it_is_free(taken: set[int], sport: int) -> None:
    chosen = choose("preserve", with_taken(taken), sport)
    assert (chosen == sport) == (sport not in taken)


@given(PORTS, st.data(), st.integers(0, 65535))
def test_preserve_keeps_class_and_parity_then_class_then_parity(
    among: list[int], data: st.DataObject, sport: int
) -> None:
    taken = data.draw(st.sets(st.sampled_from(among)))
    free = set(among) - taken
    below, parity = sport < 1024, sport % 2
    same_class = {mport for mport in free if (mport < 1024) == below}
    same_parity = {mport for mport in free if mport % 2 == parity}

    chosen = choose("preserve", with_taken(taken, among), sport)

    best = same_class & same_parity or same_class or same_parity or free
    assert (chosen in best) if best else chosen is None


@pytest.mark.parametrize(
    ("port", "is_below_1024"), [(0, True), (1, True), (1023, True), (1024, False), (65535, False)]
)
def test_the_classes_of_ports_meet_at_1024(port: int, is_below_1024: bool) -> None:
    assert kind(port) == (is_below_1024, port % 2)


# -- random ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choose_next",
    [
        lambda ports: choose("random", ports, 1),
        # The inside port is taken already: then a random port is drawn.
        lambda ports: choose("preserve", ports, 40_000),
    ],
    ids=["random", "preserve, taken"],
)
def test_random_ports_do_not_follow_a_row(
    choose_next: Callable[[MasqueradePorts], int | None],
) -> None:
    ports = with_taken({40_000}, range(1, 65536))
    chosen = []
    for _ in range(8):
        mport = choose_next(ports)
        assert mport is not None
        ports.take(UDP, MADDR, mport)
        chosen.append(mport)
    assert len({after - before for before, after in pairwise(chosen)}) > 3


@pytest.mark.parametrize("selection", ["random", "preserve"])
def test_each_free_port_is_chosen_about_as_often_as_the_others(selection: str) -> None:
    """Also the port after a row of taken ports, where a search onward would often end."""
    row = {*range(40_000, 40_100)}
    ports = with_taken(row, range(40_000, 40_400))
    choices = [choose(selection, ports, 40_000) for _ in range(20_000)]
    # Of 300 free ports each comes up some 67 times, of the 150 even ports each 133 times. With a
    # search onward, the port after the row would come up 5,000 times.
    assert choices.count(40_100) < 400


def test_random_leaves_no_trace_in_the_row_of_ports() -> None:
    ports = MasqueradePorts(range(1, 65536))
    for _ in range(8):
        choose("random", ports, 1)
    assert ports.get_next_mport() == 1


# -- by protocol and address, and counted ---------------------------------------------


def test_protocols_and_addresses_have_their_own_ports() -> None:
    ports = with_taken(set(RANGES))
    assert ports.next_unused(UDP, MADDR) is None
    assert ports.next_unused(TCP, MADDR) is not None
    assert ports.next_unused(UDP, OTHER) is not None
    assert ports.free(TCP) == len(RANGES)


@given(PORTS, st.data())
def test_ports_all_given_back_are_all_free_and_leave_nothing(
    among: list[int], data: st.DataObject
) -> None:
    taken = data.draw(st.sets(st.sampled_from(among)))
    ports = with_taken(taken, among)
    assert ports.free(UDP) == len(among) - len(taken)
    assert {mport for mport in range(65536) if ports.unused(UDP, MADDR, mport)} == (
        set(among) - taken
    )
    for mport in taken:
        ports.give_back(UDP, MADDR, mport)
    assert ports.free(UDP) == len(among)
    assert vars(ports) == vars(MasqueradePorts(among))


@given(before=PORTS, after=PORTS, data=st.data())
def test_what_is_taken_stays_taken_when_other_ports_become_the_masquerade_ports(
    before: list[int], after: list[int], data: st.DataObject
) -> None:
    """Also a port that was none of the masquerade ports: a forwarded port."""
    taken = data.draw(st.sets(st.sampled_from([*before, *after])))
    ports = MasqueradePorts(after, with_taken(taken, before))
    assert ports.free(UDP) == len(set(after) - taken)
    assert {mport for mport in after if ports.unused(UDP, MADDR, mport)} == set(after) - taken
    for mport in taken:
        ports.give_back(UDP, MADDR, mport)
    assert vars(ports) == vars(MasqueradePorts(after))


def test_what_is_no_masquerade_port_is_not_counted_and_not_free() -> None:
    ports = MasqueradePorts(RANGES)
    for between in (0, 2000, 65535):
        ports.take(UDP, MADDR, between)
        assert ports.free(UDP) == len(RANGES)
        assert not ports.unused(UDP, MADDR, between)
        ports.give_back(UDP, MADDR, between)
        assert ports.free(UDP) == len(RANGES)
