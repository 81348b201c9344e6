"""Timers: a timing wheel, on which each entry is looked at when its time has come.

An entry's timer is a point in time. The wheel has a slot for each quarter of a second of the next
two minutes. An entry stands in the slot in which it is to be looked at next. To set a timer to a
later time costs nothing but the assignment: when the slot comes up, the entry is found to have time
left, and is put into a later slot. Only an earlier time moves the entry at once. An entry whose
time is beyond the end of the wheel stands in the last slot. So packets, which push timers into the
future all the time, do not touch the wheel. Setting and expiring cost the same, however many
entries there are.

The entries of a slot are linked in a circle by fields of their own, and the slot itself stands
between the last and the first. So an entry leaves its slot at once, wherever it stands, and nothing
is left of an entry that has ended.

The wheel knows nothing of an entry but its timer and its slot (`Timed`).
"""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

TICK = 0.25
"""Seconds that a slot stands for; a timer fires at most one tick late."""

SLOTS = 512

LATE = 1.0
"""Seconds after which a slot that has not been looked at is late."""


class Timed(Protocol):
    """What the wheel needs of an entry. Others may set `timer`, to a later time; nothing else."""

    timer: float | None
    slot: Slot | None
    t_link: Any
    t_back: Any


T = TypeVar("T", bound=Timed)


class Slot:
    """The entries to look at in one tick. `place` is the slot's place on the wheel.

    Which tick it stands for, the wheel says (`tick_of`). No number is kept here for each turn: an
    object that is made in the middle of a flood, and stays, keeps the memory around it.
    """

    __slots__ = ("place", "t_back", "t_link")

    def __init__(self, place: int) -> None:
        self.place = place
        self.t_link: Any = self
        self.t_back: Any = self


class TimingWheel(Generic[T]):
    """The timers of all entries. All times are in seconds, on the clock that the packets bring.

    From the time `late_from` on the wheel is late: somebody has to look at the slots that are due.
    """

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget all entries, whose timers do not fire any more."""
        self.late_from = float("inf")
        self._slots: list[Slot] = []
        self._tick = 0

    def set(self, ms: T, now: float, seconds: float) -> None:
        """Start the timer of `ms`, or set it anew: it fires `seconds` after `now`."""
        before = ms.timer
        ms.timer = timer = now + seconds
        slot = ms.slot
        if slot is None:
            if not self._slots:
                self._start(now)
            self._file(ms, int(timer / TICK) + 1)
        elif before is None or timer < before:  # else its slot comes up in time
            tick = int(timer / TICK) + 1
            if tick < self.tick_of(slot):
                _take_out(ms)
                self._file(ms, tick)

    def tick_of(self, slot: Slot) -> int:
        """Return the number of the tick in which a slot comes up next."""
        return self._tick + (slot.place - self._tick) % SLOTS

    def stop(self, ms: T) -> None:
        """Stop the timer of `ms`: it does not fire until it is set again."""
        ms.timer = None

    def forget(self, ms: T) -> None:
        """Stop the timer of `ms`, and keep nothing of it."""
        ms.timer = None
        if ms.slot is not None:
            _take_out(ms)

    def fired(self, now: float, limit: int) -> tuple[list[T], bool]:
        """Return the entries whose timers fire by `now`, after looking at no more than `limit`.

        Their timers are stopped. The second value is true where more entries are due.
        """
        if not self._slots:
            self._start(now)
        self._skip_turns(int(now / TICK))
        fired: list[T] = []
        while self._tick <= int(now / TICK):
            slot = self._slots[self._tick % SLOTS]
            while slot.t_link is not slot:
                if limit <= 0:
                    return fired, True
                limit -= 1
                self._look_at(slot.t_link, now, fired)
            self._turn_to(self._tick + 1)
        return fired, False

    def _turn_to(self, tick: int) -> None:
        self._tick = tick
        self.late_from = tick * TICK + LATE

    def _skip_turns(self, tick: int) -> None:
        """Skip whole turns after a leap of the clock.

        All slots are due then, and going round more than once would find no more.
        """
        turns = (tick - self._tick) // SLOTS - 1
        if turns > 0:
            self._turn_to(self._tick + turns * SLOTS)

    def _look_at(self, ms: T, now: float, fired: list[T]) -> None:
        _take_out(ms)
        if ms.timer is None:
            return  # in use; setting the timer again puts it back
        if ms.timer > now:
            self._file(ms, int(ms.timer / TICK) + 1)
        else:
            ms.timer = None
            fired.append(ms)

    def _file(self, ms: T, tick: int) -> None:
        first = self._tick
        if not first <= tick < first + SLOTS:
            tick = first if tick < first else first + SLOTS - 1
        slot = self._slots[tick % SLOTS]
        last = slot.t_back
        ms.slot, ms.t_back, ms.t_link = slot, last, slot
        last.t_link = slot.t_back = ms

    def _start(self, now: float) -> None:
        """Make the slots as soon as a time is known: the clock's zero may lie anywhere."""
        self._turn_to(int(now / TICK))
        self._slots = [Slot(place) for place in range(SLOTS)]


def _take_out(ms: Timed) -> None:
    """Take an entry out of its slot."""
    back, link = ms.t_back, ms.t_link
    back.t_link, link.t_back = link, back
    ms.slot = ms.t_back = ms.t_link = None
