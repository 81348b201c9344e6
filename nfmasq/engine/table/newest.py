"""Entries by a key, of which only the newest is asked for.

Many entries may have one key, and each of them may go at any time. All of this takes constant time,
on average over many calls. A key that has several entries has them in a dictionary, a pile, which
keeps the order in which they came. The last of them is found at once, as long as no gap lies behind
it: a dictionary leaves a gap where a key was deleted, and passes all gaps one by one when it is
read from its end. So the gaps behind the last entry are cleared away as soon as they are there.
Each gap is passed once.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.table.memory import is_sparse

K = TypeVar("K", bound=Hashable)


class Newest(Generic[K]):
    """The newest entry of each key. It is false where there is no entry.

    `piles` has the entry of a key, or its entries, the oldest first.
    """

    __slots__ = ("piles",)

    def __init__(self) -> None:
        self.piles: dict[K, IpMasq | dict[IpMasq, None]] = {}

    def __contains__(self, key: K) -> bool:
        return key in self.piles

    def __bool__(self) -> bool:
        return bool(self.piles)

    def get(self, key: K) -> IpMasq | None:
        """Return the newest entry of a key, or None."""
        pile = self.piles.get(key)
        return next(reversed(pile)) if isinstance(pile, dict) else pile

    def has_others(self, key: K, ms: IpMasq) -> bool:
        """Say whether a key has other entries than `ms`."""
        return self.piles.get(key, ms) is not ms

    def add(self, key: K, ms: IpMasq) -> None:
        """Add an entry, which is the newest of its key now."""
        pile = self.piles.setdefault(key, ms)
        if isinstance(pile, dict):
            pile[ms] = None
        elif pile is not ms:
            self.piles[key] = {pile: None, ms: None}

    def remove(self, key: K, ms: IpMasq) -> None:
        """Remove an entry. Raises KeyError where the key does not have the entry."""
        pile = self.piles[key]
        if isinstance(pile, dict):
            self._remove_from(pile, key, ms)
        elif pile is ms:
            del self.piles[key]
        else:
            raise KeyError(key)

    def _remove_from(self, pile: dict[IpMasq, None], key: K, ms: IpMasq) -> None:
        if next(reversed(pile)) is not ms:
            del pile[ms]
        else:
            pile.popitem()
            newest, _ = pile.popitem()  # clears the gaps away that lie behind the entry
            pile[newest] = None
        if len(pile) == 1:
            (self.piles[key],) = pile
        elif is_sparse(pile):
            self.piles[key] = pile.copy()
