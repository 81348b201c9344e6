"""The timing wheel: never too early, hardly late, whatever is set, stopped and set again."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nfmasq.engine import PROFILES, UDP, IpMasq
from nfmasq.engine.table.timers import SLOTS, TICK, TimingWheel
from tests.engine.table.circles import around

HORIZON = SLOTS * TICK
CLOCKS = st.floats(0, 1e9, allow_nan=False)
SECONDS = st.one_of(
    st.floats(0, 3), st.floats(0, 3 * HORIZON), st.integers(0, 20).map(lambda n: n * TICK)
)


def entry() -> IpMasq:
    return IpMasq(UDP, 1, 61000, 2, 2000, 3, 53, 0, PROFILES["rfc"].table())


def all_fired(wheel: TimingWheel[IpMasq], now: float, limit: int = 3) -> list[IpMasq]:
    """List what fires by `now`, asked for in steps."""
    fired, more = wheel.fired(now, limit)
    while more:
        step, more = wheel.fired(now, limit)
        fired += step
    return fired


def standing(wheel: TimingWheel[IpMasq]) -> list[IpMasq]:
    """List the entries in all slots, and make sure that each slot is linked both ways."""
    found = []
    for slot in wheel._slots:
        in_slot: list[IpMasq] = around(slot, "t_link", "t_back")
        assert all(ms.slot is slot for ms in in_slot)
        found += in_slot
    return found


class Timers(RuleBasedStateMachine):
    """Compares entries on a wheel with a plain dict of when each is to fire."""

    @initialize(clock=CLOCKS)
    def start(self, clock: float) -> None:
        self.wheel = TimingWheel[IpMasq]()
        self.now = clock
        self.entries = [entry() for _ in range(4)]
        self.deadlines: dict[IpMasq, float] = {}

    @rule(which=st.integers(0, 3), seconds=SECONDS)
    def set(self, which: int, seconds: float) -> None:
        ms = self.entries[which]
        self.wheel.set(ms, self.now, seconds)
        self.deadlines[ms] = self.now + seconds

    @rule(which=st.integers(0, 3))
    def stop(self, which: int) -> None:
        self.wheel.stop(self.entries[which])
        self.deadlines.pop(self.entries[which], None)

    @rule(which=st.integers(0, 3))
    def forget(self, which: int) -> None:
        self.wheel.forget(self.entries[which])
        self.deadlines.pop(self.entries[which], None)
        assert self.entries[which] not in standing(self.wheel)

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(limit=st.integers(1, 9))
    def sweep(self, limit: int) -> None:
        for ms in all_fired(self.wheel, self.now, limit):
            assert self.deadlines.pop(ms) <= self.now
        assert all(deadline > self.now - TICK for deadline in self.deadlines.values())

    @rule(limit=st.integers(0, 3))
    def sweep_a_little(self, limit: int) -> None:
        fired, _ = self.wheel.fired(self.now, limit)
        assert len(fired) <= limit
        for ms in fired:
            assert self.deadlines.pop(ms) <= self.now

    @invariant()
    def the_timers_say_when(self) -> None:
        for ms in self.entries:
            assert ms.timer == self.deadlines.get(ms)
        places = standing(self.wheel)
        assert len(places) == len(set(places))
        assert self.deadlines.keys() <= set(places)

    def teardown(self) -> None:
        if self.deadlines:
            all_fired(self.wheel, max(self.now, *self.deadlines.values()) + TICK)
        assert all(ms.timer is None and ms.slot is None for ms in self.deadlines)


TestTimers = Timers.TestCase
TestTimers.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(CLOCKS, SECONDS)
def test_a_timer_fires_at_its_time_and_less_than_a_tick_late(clock: float, seconds: float) -> None:
    wheel, ms = TimingWheel[IpMasq](), entry()
    wheel.set(ms, clock, seconds)
    deadline = clock + seconds
    if seconds > 0.001:
        assert all_fired(wheel, deadline - 0.001) == []
    assert all_fired(wheel, deadline + TICK) == [ms]
    assert all_fired(wheel, deadline + 2 * HORIZON) == []


def test_a_timer_does_not_fire_while_it_is_stopped() -> None:
    wheel, ms = TimingWheel[IpMasq](), entry()
    wheel.set(ms, 0, 1)
    wheel.stop(ms)
    assert all_fired(wheel, 100) == []
    wheel.set(ms, 100, 1)
    assert all_fired(wheel, 100.9) == []
    assert all_fired(wheel, 101.25) == [ms]


def test_packets_that_push_a_timer_into_the_future_leave_the_wheel_as_it_is() -> None:
    wheel, ms = TimingWheel[IpMasq](), entry()
    wheel.set(ms, 0, 60)
    slot = ms.slot
    for now in range(50):
        wheel.stop(ms)
        wheel.set(ms, now, 60)
        assert ms.slot is slot
        assert standing(wheel) == [ms]
    assert all_fired(wheel, 108.9) == []
    assert all_fired(wheel, 109.25) == [ms]


def test_an_earlier_time_counts_at_once() -> None:
    wheel, ms = TimingWheel[IpMasq](), entry()
    wheel.set(ms, 0, 7440)
    wheel.set(ms, 10, 5)
    assert all_fired(wheel, 14.9) == []
    assert all_fired(wheel, 15.25) == [ms]
    assert all_fired(wheel, 8000) == []


def test_a_step_looks_at_no_more_than_its_limit() -> None:
    wheel = TimingWheel[IpMasq]()
    entries = [entry() for _ in range(10)]
    for ms in entries:
        wheel.set(ms, 0, 1)
    steps = []
    more = True
    while more:
        fired, more = wheel.fired(2, 4)
        steps.append(fired)
    assert [len(fired) for fired in steps] == [4, 4, 2]
    assert {ms for fired in steps for ms in fired} == set(entries)


def test_a_clock_that_leaps_ahead_is_caught_up_with_at_once() -> None:
    """A capture whose time stamps leap from 1970 to today must not hang a replay."""
    wheel, ms, later = TimingWheel[IpMasq](), entry(), entry()
    wheel.set(ms, 0, 200)
    wheel.set(later, 0, 1.9e9)
    assert all_fired(wheel, 1.8e9) == [ms]
    assert all_fired(wheel, 1.9e9 + TICK) == [later]


def test_shortening_and_lengthening_leaves_nothing_behind() -> None:
    wheel, ms = TimingWheel[IpMasq](), entry()
    for step in range(4000):
        now = step * TICK
        wheel.set(ms, now, 120 if step % 2 else 1)
        all_fired(wheel, now)
        assert standing(wheel) == [ms]
