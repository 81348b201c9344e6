"""Timers: a timing wheel, on which each entry is looked at when its time has come.

An entry's timer is a point in time. The wheel has a slot for each quarter of a second of the next
two minutes. An entry stands in the slot in which it is to be looked at next. To set a timer to a
later time costs nothing but the assignment: when the slot comes up, the entry is found to have time
left, and is put into a later slot. Only an earlier time moves the entry at once. An entry whose
time is beyond the end of the wheel stands in the last slot. So packets, which push timers into the
future all the time, do not touch the wheel. Setting and expiring cost the same, however many
entries there are.

The wheel knows nothing of an entry but its timer and its slot (`Timed`).
"""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

TICK = 0.25
"""Seconds that a slot stands for; a timer fires at most one tick late."""

SLOTS = 512


class Timed(Protocol):
    """What the wheel needs of an entry. Others may set `timer`, to a later time, but not `slot`."""

    timer: float | None
    slot: Slot[Any] | None


T = TypeVar("T", bound=Timed)


class Slot(Generic[T]):
    """The entries to look at in tick number `tick`."""

    __slots__ = ("entries", "tick")

    def __init__(self, tick: int) -> None:
        self.tick = tick
        self.entries: list[T] = []


class TimingWheel(Generic[T]):
    """The timers of all entries. All times are in seconds, on the clock that the packets bring."""

    def __init__(self) -> None:
        self._slots: list[Slot[T]] = []
        self._tick = 0

    def set(self, ms: T, now: float, seconds: float) -> None:
        """Start the timer of `ms`, or set it anew: it fires `seconds` after `now`."""
        before = ms.timer
        ms.timer = timer = now + seconds
        if before is not None and timer >= before and ms.slot is not None:
            return  # its slot comes up in time
        tick = int(timer / TICK) + 1
        if ms.slot is None or tick < ms.slot.tick:
            if not self._slots:
                self._start(now)
            self._file(ms, tick)

    def stop(self, ms: T) -> None:
        """Stop the timer of `ms`: it does not fire until it is set again."""
        ms.timer = None

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
            while slot.entries:
                if limit <= 0:
                    return fired, True
                limit -= 1
                self._look_at(slot.entries.pop(), slot, now, fired)
            self._tick += 1
            slot.tick += SLOTS
        return fired, False

    def _skip_turns(self, tick: int) -> None:
        """Skip whole turns after a leap of the clock.

        All slots are due then, and going round more than once would find no more.
        """
        turns = (tick - self._tick) // SLOTS - 1
        if turns > 0:
            self._tick += turns * SLOTS
            for slot in self._slots:
                slot.tick += turns * SLOTS

    def _look_at(self, ms: T, slot: Slot[T], now: float, fired: list[T]) -> None:
        if ms.slot is not slot:
            return  # it was moved to an earlier slot, and leaves this slot only now
        ms.slot = None
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
        slot.entries.append(ms)
        ms.slot = slot

    def _start(self, now: float) -> None:
        """Make the slots as soon as a time is known: the clock's zero may lie anywhere."""
        self._tick = int(now / TICK)
        ticks = range(self._tick, self._tick + SLOTS)
        self._slots = sorted(map(Slot[T], ticks), key=lambda slot: slot.tick % SLOTS)
