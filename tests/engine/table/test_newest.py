"""The newest entry of each key, compared with a list of entries for each key."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nfmasq.engine import UDP, IpMasq, Timeouts
from nfmasq.engine.table.newest import Newest

KEYS = st.integers(1, 3)


def entry() -> IpMasq:
    return IpMasq(UDP, 1, 61000, 2, 1024, 3, 53, 0, Timeouts().table())


class Piles(RuleBasedStateMachine):
    """Adds and removes entries, of any age, and compares what is the newest."""

    @initialize()
    def start(self) -> None:
        self.newest: Newest[int] = Newest()
        self.model: dict[int, list[IpMasq]] = {}

    @rule(key=KEYS, times=st.integers(1, 9))
    def add(self, key: int, times: int) -> None:
        for _ in range(times):
            ms = entry()
            self.newest.add(key, ms)
            self.model.setdefault(key, []).append(ms)

    @precondition(lambda self: self.model)
    @rule(which=st.integers(0, 999), age=st.integers(0, 999))
    def remove(self, which: int, age: int) -> None:
        key = [*self.model][which % len(self.model)]
        pile = self.model[key]
        self.newest.remove(key, pile.pop(age % len(pile)))
        if not pile:
            del self.model[key]

    @rule(key=KEYS)
    def remove_what_is_not_there(self, key: int) -> None:
        with pytest.raises(KeyError):
            self.newest.remove(key, entry())

    @invariant()
    def the_newest_is_found(self) -> None:
        assert bool(self.newest) == bool(self.model)
        for key in range(1, 4):
            pile = self.model.get(key, [])
            assert self.newest.get(key) is (pile[-1] if pile else None)
            assert (key in self.newest) == bool(pile)
            assert self.newest.has_others(key, entry()) == bool(pile)
            if pile:
                assert self.newest.has_others(key, pile[0]) == (len(pile) > 1)

    @invariant()
    def the_others_are_there_in_their_order(self) -> None:
        for key, pile in self.newest.piles.items():
            assert (list(pile) if isinstance(pile, dict) else [pile]) == self.model[key]
        assert self.newest.piles.keys() == self.model.keys()


TestPiles = Piles.TestCase
