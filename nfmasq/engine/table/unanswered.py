"""The entries in which only one side has a part so far: they go first when room is short.

An entry that the inside made is unanswered until a packet comes back for it. An entry that the
outside made is unanswered until a second packet comes from the outside: a server answers anybody,
and the false senders of a SYN flood never confirm.

Unanswered entries stand in a line, the oldest in front. An entry that is answered, or ends, stays
in the line until somebody comes across it. So that these entries do not pile up, an entry that
joins has two entries in front looked at: an entry that is no longer unanswered leaves the line.
Where the line has grown longer than the table, an entry in front that is still unanswered goes to
the end. Otherwise it would keep the entries behind it from being seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nfmasq.engine.table.entry import HASHED, NO_REPLY, OUTSIDE, IpMasq

_LOOKS_ON_JOINING = 2
_LOOKS = 64
"""How many entries `take` looks at: nobody waits for a search through all."""


def _is_unanswered(ms: IpMasq) -> bool:
    if ms.flags & OUTSIDE:
        return ms.packets_in <= 1 and ms.flags & HASHED > 0
    return ms.flags & (HASHED | NO_REPLY) == HASHED | NO_REPLY


class Unanswered:
    """The line of unanswered entries, the oldest in front."""

    def __init__(self) -> None:
        self._line: deque[IpMasq] = deque()

    def __len__(self) -> int:
        return len(self._line)

    def join(self, ms: IpMasq, entries: int) -> None:
        """Put a new entry at the end; `entries` is how many entries the table has for this line."""
        line = self._line
        line.append(ms)
        for _ in range(_LOOKS_ON_JOINING):
            if not _is_unanswered(line[0]):
                line.popleft()
            elif len(line) > entries:
                line.rotate(-1)
            else:
                break

    def take(self, wanted: Callable[[IpMasq], bool]) -> IpMasq | None:
        """Take out the first entry from the front that is `wanted`; None where none is seen."""
        for _ in range(min(_LOOKS, len(self._line))):
            first = self._line.popleft()
            if _is_unanswered(first):
                if wanted(first):
                    return first
                self._line.append(first)
        return None
