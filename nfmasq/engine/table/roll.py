"""The roll: all entries, the oldest first, to be walked through while they come and go.

Theory of operation. The entries are linked in a circle, and the roll itself stands between the
newest and the oldest. A walk has two marks in the circle. In each step it takes a few entries that
follow its first mark, and the mark moves behind them. Between two steps anything may happen: the
mark has its place among the entries that are left. So the lock is held for a few entries at a time,
however many there are. The second mark stands behind the entry that was the newest when the walk
began, and ends the walk.

So an entry that is there during the whole walk is seen once, and an entry that is made meanwhile is
not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from nfmasq.engine.table.entry import IpMasq


class _Place:
    """A place in the circle that is not an entry: a mark, or the roll itself."""

    __slots__ = ("newer", "older")

    def __init__(self) -> None:
        self.newer: Any = self
        self.older: Any = self


class Roll(_Place):
    """All entries, linked by their fields `newer` and `older`."""

    __slots__ = ()

    def join(self, ms: IpMasq) -> None:
        """Add an entry as the newest."""
        # As `_insert`, without the time for the call.
        older = self.older
        ms.newer, ms.older = self, older
        self.older = older.newer = ms

    def leave(self, ms: IpMasq) -> None:
        """Take an entry out."""
        # As `_take_out`, without the time for the call.
        newer, older = ms.newer, ms.older
        newer.older, older.newer = older, newer
        ms.newer = ms.older = None

    def all(self) -> Iterator[IpMasq]:
        """Yield all entries, the oldest first; none may come or go meanwhile."""
        place = self.newer
        while place is not self:
            if isinstance(place, IpMasq):
                yield place
            place = place.newer

    def newest(self) -> IpMasq | None:
        """Return the newest entry; None where there is none."""
        place: Any = self.older
        while place is not self:
            if isinstance(place, IpMasq):
                return place
            place = place.older
        return None

    def walk(self, lock: AbstractContextManager[Any], step: int) -> Iterator[IpMasq]:
        """Yield the entries that there are, oldest first; the lock is held for `step` of them.

        An entry may have ended when it is yielded.
        """
        mark, end = _Place(), _Place()
        with lock:
            _insert(mark, self)
            _insert(end, self.older)
        try:
            while True:
                with lock:
                    passed = _pass(mark, end, step)
                if not passed:
                    return
                yield from passed
        finally:
            with lock:
                _take_out(mark)
                _take_out(end)


def _pass(mark: _Place, end: _Place, most: int) -> list[IpMasq]:
    """Move a mark behind the entries that follow, but not beyond `end`; return the entries."""
    passed: list[IpMasq] = []
    last: Any = mark
    while len(passed) < most and last.newer is not end:
        last = last.newer
        if isinstance(last, IpMasq):
            passed.append(last)
    if last is not mark:
        _take_out(mark)
        _insert(mark, last)
    return passed


def _insert(place: _Place, older: IpMasq | _Place) -> None:
    """Put a mark next to `older`, on its newer side."""
    newer = older.newer
    place.older, place.newer = older, newer
    older.newer = newer.older = place


def _take_out(place: IpMasq | _Place) -> None:
    newer, older = place.newer, place.older
    newer.older, older.newer = older, newer
