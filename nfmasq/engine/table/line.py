"""A line of entries that may have to go when room is short, the oldest in front.

An entry stands in one line at most. It is linked into the line by its own fields, so it leaves from
any place at once, and nothing is left of it. What an entry must be to stand in a line is for the
line's maker to say. Where no event tells that an entry is this no more, the entry stays until
somebody comes across it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nfmasq.engine.table.entry import IpMasq

_LOOKS = 64
"""How many entries are looked at: nobody waits for a search through all."""


class Line:
    """A line of entries, linked in a circle by their fields `l_link` and `l_back`.

    The line itself stands between the last entry and the first. `belongs`, if it is given, must be
    true of the entries.
    """

    __slots__ = ("_belongs", "l_back", "l_link")

    def __init__(self, belongs: Callable[[IpMasq], bool] | None = None) -> None:
        self._belongs = belongs
        self.l_link: Any = self
        self.l_back: Any = self

    def join(self, ms: IpMasq) -> None:
        """Put an entry, which stands in no line, at the end."""
        last = self.l_back
        ms.line, ms.l_back, ms.l_link = self, last, self
        last.l_link = self.l_back = ms

    def leave(self, ms: IpMasq) -> None:
        """Take an entry of this line out."""
        back, link = ms.l_back, ms.l_link
        back.l_link, link.l_back = link, back
        ms.line = ms.l_back = ms.l_link = None

    def take(self, wanted: Callable[[IpMasq], bool]) -> IpMasq | None:
        """Take out the first entry from the front that is `wanted`; None where none is seen."""
        last = self.l_back
        for _ in range(_LOOKS):
            first = self.l_link
            if first is self:
                break
            ms: IpMasq = first
            self.leave(ms)
            if self._belongs is None or self._belongs(ms):
                if wanted(ms):
                    return ms
                self.join(ms)
            if ms is last:
                break
        return None

    def take_most(
        self,
        wanted: Callable[[IpMasq], bool],
        rank: Callable[[IpMasq], Any],
        compared: int = _LOOKS,
    ) -> IpMasq | None:
        """Take out, of the entries in front that are `wanted`, the first of the highest rank.

        None where none is seen. The first `compared` of them are compared.
        """
        seen: list[IpMasq] = []
        for ms in self._front():
            if self._belongs is not None and not self._belongs(ms):
                self.leave(ms)
            elif wanted(ms):
                seen.append(ms)
                if len(seen) == compared:
                    break
            else:
                self.leave(ms)
                self.join(ms)
        most = max(seen, key=rank, default=None)
        if most is not None:
            self.leave(most)
        return most

    def _front(self) -> list[IpMasq]:
        """List the entries in front that are looked at."""
        front: list[IpMasq] = []
        ms = self.l_link
        while ms is not self and len(front) < _LOOKS:
            front.append(ms)
            ms = ms.l_link
        return front
