"""The roll of all entries, compared with a list, while entries come and go and some walk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from nfmasq.engine import UDP, IpMasq, Timeouts
from nfmasq.engine.table.roll import HostRoll, Roll
from tests.engine.table.circles import around


class Walk:
    """A walk, what it has seen, and which entries were there when it began."""

    def __init__(self, roll: Roll, there: list[IpMasq], step: int) -> None:
        self.entries: Iterator[IpMasq] = roll.walk(nullcontext(), step)
        self.there = list(there)
        self.ended: set[IpMasq] = set()
        self.seen: list[IpMasq] = []


class Rolls(RuleBasedStateMachine):
    """Does each operation to a roll and to a list."""

    walks = Bundle("walks")

    @initialize(kind=st.sampled_from((Roll, HostRoll)))
    def start(self, kind: type[Roll]) -> None:
        self.roll = kind()
        self.newer, self.older = kind._newer, kind._older
        self.model: list[IpMasq] = []
        self.walking: list[Walk] = []

    @rule()
    def join(self) -> None:
        self.model.append(IpMasq(UDP, 1, 61000, 2, 1024, 3, 53, 0, Timeouts().table()))
        self.roll.join(self.model[-1])

    @precondition(lambda self: self.model)
    @rule(which=st.integers(0, 999))
    def leave(self, which: int) -> None:
        ms = self.model.pop(which % len(self.model))
        self.roll.leave(ms)
        assert getattr(ms, self.newer) is getattr(ms, self.older) is None
        for walk in self.walking:
            walk.ended.add(ms)

    @rule(target=walks, step=st.integers(1, 4))
    def a_walk_begins(self, step: int) -> Walk:
        walk = Walk(self.roll, self.model, step)
        walk.seen += islice(walk.entries, 1)
        self.walking.append(walk)
        return walk

    @rule(walk=walks, entries=st.integers(1, 5))
    def a_walk_goes_on(self, walk: Walk, entries: int) -> None:
        walk.seen += islice(walk.entries, entries)

    @rule(walk=consumes(walks))
    def a_walk_comes_to_its_end(self, walk: Walk) -> None:
        walk.seen += walk.entries
        self.walking.remove(walk)
        assert [ms for ms in walk.seen if ms not in walk.ended] == [
            ms for ms in walk.there if ms not in walk.ended
        ]
        assert len(walk.seen) == len(set(walk.seen))

    @invariant()
    def the_roll_is_the_list(self) -> None:
        places = around(self.roll, self.newer, self.older)
        assert [place for place in places if isinstance(place, IpMasq)] == self.model

    def teardown(self) -> None:
        for walk in getattr(self, "walking", ()):
            walk.seen += walk.entries
        if not getattr(self, "model", True):
            assert getattr(self.roll, self.newer) is getattr(self.roll, self.older) is self.roll


TestRolls = Rolls.TestCase
