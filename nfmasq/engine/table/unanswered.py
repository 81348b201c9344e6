"""The entries that only one side has a part in so far: the first to go when room is short.

One that the inside made is unanswered until something comes back for it. One that the
outside made is so until another packet comes from there: a server answers whoever it seems to be,
and the false sender of a SYN flood never confirms.

They stand in a queue, the oldest in front. An entry that is answered, or ends, stays in the queue
until somebody comes across it. So that such do not pile up, each entry that joins looks at two in
front: what is no longer unanswered leaves. Where the queue has grown longer than the table, one in
front that is still unanswered must not keep those behind it from being seen, and goes to the end.
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
    """The queue."""

    def __init__(self) -> None:
        self._queue: deque[IpMasq] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def join(self, ms: IpMasq, entries: int) -> None:
        """Put a new entry at the end; `entries` is how many the table has."""
        queue = self._queue
        queue.append(ms)
        for _ in range(_LOOKS_ON_JOINING):
            if not _is_unanswered(queue[0]):
                queue.popleft()
            elif len(queue) > entries:
                queue.rotate(-1)
            else:
                break

    def take(self, wanted: Callable[[IpMasq], bool]) -> IpMasq | None:
        """One of the oldest that is as wanted, which leaves the queue; None where none is seen."""
        for _ in range(min(_LOOKS, len(self._queue))):
            first = self._queue.popleft()
            if _is_unanswered(first):
                if wanted(first):
                    return first
                self._queue.append(first)
        return None
