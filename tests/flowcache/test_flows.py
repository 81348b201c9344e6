"""The flows in the kernel's map: what is taken, what is not, and what is given back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nfmasq.engine import IpMasq
from nfmasq.engine.cached import UNUSED
from nfmasq.engine.table.entry import CACHED
from nfmasq.flowcache.flows import Flows
from nfmasq.flowcache.programs import Programs
from tests.gateway import INSIDE, SERVER, Gateway, endpoints

WAN, OTHER = 7, 8


@pytest.fixture
def entries() -> list[IpMasq]:
    """Return the entries of 20 sessions that were answered."""
    gateway = Gateway()
    for inside in endpoints(INSIDE[0], 20):
        assert gateway.lets_in(SERVER, gateway.send(inside, SERVER))
    return gateway.sessions.entries()


@pytest.fixture
def small(_kernel: None) -> Iterator[Programs]:
    """Load the programs with room for 16 flows, that is 32 directions."""
    programs = Programs(16)
    yield programs
    programs.close()


def test_there_is_room_for_so_many_flows_in_both_directions(
    small: Programs, entries: list[IpMasq]
) -> None:
    flows = Flows(small, {WAN})
    taken = [flows.put(ms, outward, WAN) for ms in entries for outward in (True, False)]
    assert taken == [True] * 32 + [False] * 8
    entries[0].flags |= CACHED
    assert flows.drop(entries[0]) == UNUSED
    assert flows.put(entries[-1], True, WAN)
    assert flows.put(entries[-1], False, 0)
    assert not flows.put(entries[-2], True, WAN)


def test_nothing_is_carried_that_could_not_leave(small: Programs, entries: list[IpMasq]) -> None:
    served: set[int] = set()
    flows, (ms, *_) = Flows(small, served), entries
    assert not flows.put(ms, True, WAN)
    assert not flows.put(ms, False, 0)
    served.add(WAN)
    assert not flows.put(ms, True, OTHER)
    assert flows.put(ms, True, WAN)
    assert flows.put(ms, False, 0)


def test_what_is_carried_already_may_be_put_again(small: Programs, entries: list[IpMasq]) -> None:
    flows, (ms, *_) = Flows(small, {WAN, OTHER}), entries
    for outward, interface in ((True, WAN), (True, WAN), (True, OTHER), (False, 0), (False, 0)):
        assert flows.put(ms, outward, interface)
    ms.flags |= CACHED
    assert flows.usage(ms) == flows.drop(ms) == UNUSED
    assert flows.usage(ms) == UNUSED


def test_what_the_map_has_lost_is_unused(small: Programs, entries: list[IpMasq]) -> None:
    """Nobody else takes flows out of the map, but if somebody does nothing fails."""
    flows, (ms, *_) = Flows(small, {WAN}), entries
    ms.flags |= CACHED
    assert flows.drop(ms) == UNUSED
