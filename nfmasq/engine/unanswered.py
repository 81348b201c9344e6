"""The entries that the inside made and nothing came back for: the first to go when room is short.

They stand in a queue, the oldest in front. An entry that is answered, or ends, stays in the queue
until somebody comes across it. So that such do not pile up, each entry that joins looks at two in
front: what is no longer unanswered leaves. Where the queue has grown longer than the table, one in
front that is still unanswered must not keep those behind it from being seen, and goes to the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nfmasq.engine.entry import HASHED, NO_REPLY, IpMasq

_LOOKS_ON_JOINING = 2
_LOOKS = 64
"""How many entries `take` looks at: nobody waits for a search through all."""

_UNANSWERED = HASHED | NO_REPLY


class Unanswered:
    """The queue."""

    def __init__(self) -> None:
        self._queue: deque[IpMasq] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def join(self, ms: IpMasq, entries: int) -> None:
        """Put a new entry at the end; `entries` is how many the table has."""
        self._queue.append(ms)
        for _ in range(_LOOKS_ON_JOINING):
            first = self._queue[0]
            if first.flags & _UNANSWERED != _UNANSWERED:
                self._queue.popleft()
            elif len(self._queue) > entries:
                self._queue.rotate(-1)

    def take(self, wanted: Callable[[IpMasq], bool]) -> IpMasq | None:
        """One of the oldest that is as wanted, which leaves the queue; None where none is seen."""
        for _ in range(min(_LOOKS, len(self._queue))):
            first = self._queue.popleft()
            if first.flags & _UNANSWERED == _UNANSWERED:
                if wanted(first):
                    return first
                self._queue.append(first)
        return None
