"""What a flush has left: entries that have ended, and the structures that had them.

To end a million entries one by one takes seconds. So a flush puts new structures in the place of
the old ones, at one stroke, and what is left is taken apart here, a little at a time. Nothing is
freed in one long piece: entries lose their links to each other, and dictionaries their keys, step
by step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, TypeAlias

from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.table.limits import InsideHost
from nfmasq.engine.table.roll import Roll

Kept: TypeAlias = "dict[Any, Any] | set[Any]"


class Remains:
    """The entries on the rolls, and the dictionaries and sets, of former tables.

    It is false where nothing is left.
    """

    def __init__(self) -> None:
        self._rolls: list[Roll] = []
        self._kept: list[Kept] = []
        self._nested: deque[Kept] = deque()  # those that were values in others
        self._hosts: list[Kept] = []  # until the entries have left their rolls

    def __bool__(self) -> bool:
        return bool(self._rolls or self._kept or self._nested or self._hosts)

    def add(self, roll: Roll, hosts: dict[int, InsideHost], kept: Iterable[Kept]) -> None:
        """Add what nobody else uses any more."""
        self._rolls.append(roll)
        self._hosts.append(hosts)
        self._kept += kept

    def take(self, most: int) -> list[IpMasq]:
        """Take out `most` entries at most, the newest first, and as many keys of each kind.

        The entries are linked to nothing any more.
        """
        for kept in self._kept:
            self._empty(kept, most)
        self._kept = [kept for kept in self._kept if kept]
        if not self._kept and self._nested:
            self._empty(self._nested[-1], most)
            if not self._nested[-1]:
                self._nested.pop()
        if not self._rolls:
            self._kept += self._hosts
            self._hosts.clear()
        return self._entries(most)

    def _entries(self, most: int) -> list[IpMasq]:
        taken: list[IpMasq] = []
        while self._rolls and len(taken) < most:
            roll = self._rolls[-1]
            ms = roll.newest()
            if ms is None:
                self._rolls.pop()
                continue
            roll.leave(ms)
            _leave_host(ms)
            _unlink(ms)
            taken.append(ms)
        return taken

    def _empty(self, kept: Kept, most: int) -> None:
        for _ in range(min(most, len(kept))):
            held = kept.popitem()[1] if isinstance(kept, dict) else kept.pop()
            if isinstance(held, dict):
                self._nested.appendleft(held)
            elif isinstance(held, InsideHost):
                held.roll.dissolve()
                if held.over:
                    self._nested.appendleft(held.over)


def _leave_host(ms: IpMasq) -> None:
    """Take an entry out of the roll of its host, whichever that is (`HostRoll.leave`)."""
    newer, older = ms.h_newer, ms.h_older
    newer.h_older, older.h_newer = older, newer
    ms.h_newer = ms.h_older = None


def _unlink(ms: IpMasq) -> None:
    """Take an entry's links away, so that no circle of entries is left."""
    ms.m_link = ms.m_back = ms.s_link = ms.s_back = None
    ms.t_link = ms.t_back = ms.slot = None
    ms.l_link = ms.l_back = ms.line = None
