"""Rolls: all entries, or those of a host, the oldest first, walked through while they come and go.

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
from typing import Any, ClassVar

from nfmasq.engine.table.entry import IpMasq


class _Place:
    """A place in a circle that is not an entry: a mark, or a roll itself."""

    __slots__ = ("h_newer", "h_older", "newer", "older")

    newer: Any
    older: Any
    h_newer: Any
    h_older: Any


class _Circle(_Place):
    """Entries in a circle, linked by the fields that `_newer` and `_older` name."""

    __slots__ = ()

    _newer: ClassVar[str]
    _older: ClassVar[str]

    def __init__(self) -> None:
        setattr(self, self._newer, self)
        setattr(self, self._older, self)

    def walk(self, lock: AbstractContextManager[Any], step: int) -> Iterator[IpMasq]:
        """Yield the entries that there are, oldest first; the lock is held for `step` of them.

        An entry may have ended when it is yielded.
        """
        mark, end = _Place(), _Place()
        with lock:
            self._insert(mark, self)
            self._insert(end, getattr(self, self._older))
        try:
            while True:
                with lock:
                    passed = self._pass(mark, end, step)
                if not passed:
                    return
                yield from passed
        finally:
            with lock:
                self._take_out(mark)
                self._take_out(end)

    def _pass(self, mark: _Place, end: _Place, most: int) -> list[IpMasq]:
        """Move a mark behind the entries that follow, but not beyond `end`; return the entries."""
        passed: list[IpMasq] = []
        newer = self._newer
        last: Any = mark
        while len(passed) < most and (following := getattr(last, newer)) is not end:
            last = following
            if isinstance(last, IpMasq):
                passed.append(last)
        if last is not mark:
            self._take_out(mark)
            self._insert(mark, last)
        return passed

    def _insert(self, place: _Place, older: IpMasq | _Place) -> None:
        """Put a mark next to `older`, on its newer side."""
        newer = getattr(older, self._newer)
        setattr(place, self._older, older)
        setattr(place, self._newer, newer)
        setattr(older, self._newer, place)
        setattr(newer, self._older, place)

    def _take_out(self, place: _Place) -> None:
        newer, older = getattr(place, self._newer), getattr(place, self._older)
        setattr(newer, self._older, older)
        setattr(older, self._newer, newer)


class Roll(_Circle):
    """All entries, linked by their fields `newer` and `older`."""

    __slots__ = ()

    _newer = "newer"
    _older = "older"

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


class HostRoll(_Circle):
    """The entries of an inside host, linked by their fields `h_newer` and `h_older`."""

    __slots__ = ()

    _newer = "h_newer"
    _older = "h_older"

    def join(self, ms: IpMasq) -> None:
        """Add an entry of the host as the newest."""
        older = self.h_older
        ms.h_newer, ms.h_older = self, older
        self.h_older = older.h_newer = ms

    def leave(self, ms: IpMasq) -> None:
        """Take an entry out."""
        newer, older = ms.h_newer, ms.h_older
        newer.h_older, older.h_newer = older, newer
        ms.h_newer = ms.h_older = None

    def dissolve(self) -> None:
        """Have a roll without entries refer to itself no more, so that it is freed at once."""
        self.h_newer = self.h_older = None
