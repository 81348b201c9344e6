"""Lines of entries that may have to go, compared with a plain list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nfmasq.engine import UDP, IpMasq, Timeouts
from nfmasq.engine.table import line
from nfmasq.engine.table.line import Line
from tests.engine.table.circles import around

WHICH = st.integers(0, 999)
PORTS = st.integers(1, 4)


def entry(sport: int = 1024) -> IpMasq:
    return IpMasq(UDP, 1, 61000, 2, sport, 3, 53, 0, Timeouts().table())


def standing(waiting: Line) -> list[IpMasq]:
    """List the entries of a line, and make sure that it is linked both ways."""
    found: list[IpMasq] = around(waiting, "l_link", "l_back")
    assert all(ms.line is waiting for ms in found)
    return found


class Lines(RuleBasedStateMachine):
    """Does each operation to a line and to a list; `mport` 0 says that an entry belongs no more."""

    @initialize()
    def start(self) -> None:
        self.line = Line(lambda ms: ms.mport != 0)
        self.model: list[IpMasq] = []

    @rule(sport=PORTS)
    def join(self, sport: int) -> None:
        self.model.append(entry(sport))
        self.line.join(self.model[-1])

    @precondition(lambda self: self.model)
    @rule(which=WHICH)
    def leave(self, which: int) -> None:
        ms = self.model.pop(which % len(self.model))
        self.line.leave(ms)
        assert (ms.line, ms.l_link, ms.l_back) == (None, None, None)

    @precondition(lambda self: self.model)
    @rule(which=WHICH)
    def belongs_no_more(self, which: int) -> None:
        self.model[which % len(self.model)].mport = 0

    @rule(sport=PORTS)
    def take(self, sport: int) -> None:
        taken = self.line.take(lambda ms: ms.sport == sport)
        here = [ms for ms in self.model if ms.mport]
        at = next((n for n, ms in enumerate(here) if ms.sport == sport), None)
        assert taken is (None if at is None else here[at])
        if at is None:
            self.model = here
        else:
            gone = self.model.index(here[at])
            passed = [ms for ms in self.model[:gone] if ms.mport]
            self.model = self.model[gone + 1 :] + passed

    @rule(sport=PORTS)
    def take_most(self, sport: int) -> None:
        taken = self.line.take_most(lambda ms: ms.sport >= sport, lambda ms: ms.sport)
        here = [ms for ms in self.model if ms.mport]
        wanted = [ms for ms in here if ms.sport >= sport]
        most = max(wanted, key=lambda ms: ms.sport, default=None)
        assert taken is most
        self.model = [ms for ms in wanted if ms is not most] + [
            ms for ms in here if ms.sport < sport
        ]

    @invariant()
    def the_line_is_the_list(self) -> None:
        assert standing(self.line) == self.model


TestLines = Lines.TestCase


@given(unwanted=st.integers(0, 3 * line._LOOKS))
def test_no_more_than_some_in_front_are_looked_at_and_the_next_time_the_next(unwanted: int) -> None:
    waiting, looks = Line(), 0
    for _ in range(unwanted):
        waiting.join(entry(1))
    wanted = entry(2)
    waiting.join(wanted)

    def is_wanted(ms: IpMasq) -> bool:
        nonlocal looks
        looks += 1
        return ms is wanted

    for tries in range(1, 5):
        if waiting.take(is_wanted) is wanted:
            break
        assert looks == tries * line._LOOKS
    assert looks == unwanted + 1
    assert len(standing(waiting)) == unwanted
