"""A line of entries that may have to go when room is short, the oldest in front.

What an entry must be to stand in a line is for the line's maker to say: not answered yet, for
example. An entry that is this no longer, or has ended, stays in the line until somebody comes
across it. So that these entries do not pile up, an entry that joins has two entries in front looked
at: an entry that is no longer what it must be leaves the line. Where the line has grown longer than
the table, an entry in front that still belongs there goes to the end. Otherwise it would keep the
entries behind it from being seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nfmasq.engine.table.entry import HASHED, IpMasq

_LOOKS_ON_JOINING = (1, 2)
_LOOKS = 64
"""How many entries `take` looks at: nobody waits for a search through all."""


class Line:
    """A line of entries that have all of the `flags`, the oldest in front.

    `belongs`, if it is given, must be true of them, too.
    """

    __slots__ = ("_belongs", "_flags", "_line")

    def __init__(
        self, flags: int = HASHED, belongs: Callable[[IpMasq], bool] | None = None
    ) -> None:
        self._flags = flags
        self._belongs = belongs
        self._line: deque[IpMasq] = deque()

    def __len__(self) -> int:
        return len(self._line)

    def join(self, ms: IpMasq, entries: int) -> None:
        """Put an entry at the end; `entries` is how many entries the table has for this line."""
        line, flags, belongs = self._line, self._flags, self._belongs
        line.append(ms)
        for _ in _LOOKS_ON_JOINING:
            first = line[0]
            if first.flags & flags != flags or (belongs is not None and not belongs(first)):
                line.popleft()
                if not line:
                    break
            elif len(line) > entries:
                line.rotate(-1)
            else:
                break

    def take(self, wanted: Callable[[IpMasq], bool]) -> IpMasq | None:
        """Take out the first entry from the front that is `wanted`; None where none is seen."""
        for _ in range(min(_LOOKS, len(self._line))):
            first = self._line.popleft()
            if self._is_here(first):
                if wanted(first):
                    return first
                self._line.append(first)
        return None

    def take_most(
        self, wanted: Callable[[IpMasq], bool], rank: Callable[[IpMasq], int]
    ) -> IpMasq | None:
        """Take out, of the entries in front that are `wanted`, the first of the highest rank.

        None where none is seen.
        """
        seen: list[IpMasq] = []
        for _ in range(min(_LOOKS, len(self._line))):
            first = self._line.popleft()
            if self._is_here(first):
                (seen if wanted(first) else self._line).append(first)
        most = max(seen, key=rank, default=None)
        self._line.extendleft(ms for ms in reversed(seen) if ms is not most)
        return most

    def _is_here(self, ms: IpMasq) -> bool:
        return ms.flags & self._flags == self._flags and (
            self._belongs is None or self._belongs(ms)
        )
