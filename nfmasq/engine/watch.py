"""The gate: what happens to entries, and to packets that are lost, is told here as it happens.

Whoever wants to know of entries (a cache of known flows, a saved table, a log) is a `Watcher` and
subscribes. `Sessions` tells, and nobody else: it is where entries are made, changed and ended.
It tells with the lock held, after the fact and in the order in which things happen; so a watcher
that heard of everything could keep a copy of the table.

    made      an entry is in the table
    answered  the first packet came back for it: it lost the flag NO_REPLY
    changed   its state is another one
    moved     what the tables know it by is another one: addresses, ports, what is left open
    helped    a helper was bound to it, or begins anew: its packets need more than a rewrite
    ended     it is in the table no more, and why (`table/endings.py`)
    refused   a session could not be had, and why: one of the counters' REASONS
    dropped   a packet was lost, and why: likewise

A watcher must return soon, raise nothing, and leave the entries as they are. What nobody has
subscribed to costs one look at an empty tuple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.wire.header import FiveTuple


class Identity(NamedTuple):
    """What the tables know an entry by; addresses and ports are ints in host order."""

    protocol: int
    maddr: int
    mport: int
    saddr: int
    sport: int
    daddr: int
    dport: int

    @classmethod
    def of(cls, ms: IpMasq) -> Identity:
        """Read the identity of an entry."""
        return cls(ms.protocol, ms.maddr, ms.mport, ms.saddr, ms.sport, ms.daddr, ms.dport)


class Watcher:
    """Hears of everything and does nothing: override what is of interest."""

    def made(self, ms: IpMasq) -> None:
        """Hear that an entry is in the table."""

    def answered(self, ms: IpMasq) -> None:
        """Hear that the first packet came back for an entry."""

    def changed(self, ms: IpMasq, before: int) -> None:
        """Hear that an entry's state is another one than `before`."""

    def moved(self, ms: IpMasq, before: Identity) -> None:
        """Hear that the tables know an entry by other values than `before`."""

    def helped(self, ms: IpMasq) -> None:
        """Hear that a helper was bound to an entry, or begins anew with it."""

    def ended(self, ms: IpMasq, reason: str) -> None:
        """Hear that an entry is in the table no more; `reason` is one of `endings.ENDINGS`."""

    def refused(self, session: FiveTuple, reason: str) -> None:
        """Hear that a session could not be had; `reason` is one of the counters' REASONS.

        The session goes from inside to outside.
        """

    def dropped(self, packet: FiveTuple | None, reason: str) -> None:
        """Hear that a packet was lost; `reason` is one of the counters' REASONS.

        The values are those with which it came, None where it has no readable header.
        """


Tell: TypeAlias = "Callable[..., None]"


class Watch:
    """The watchers' methods, by what is told: `for tell in watch.made: tell(ms)`."""

    __slots__ = ("answered", "changed", "dropped", "ended", "helped", "made", "moved", "refused")

    def __init__(self) -> None:
        self.made: tuple[Tell, ...] = ()
        self.answered: tuple[Tell, ...] = ()
        self.changed: tuple[Tell, ...] = ()
        self.moved: tuple[Tell, ...] = ()
        self.helped: tuple[Tell, ...] = ()
        self.ended: tuple[Tell, ...] = ()
        self.refused: tuple[Tell, ...] = ()
        self.dropped: tuple[Tell, ...] = ()

    def subscribe(self, watcher: Watcher) -> None:
        """Tell a watcher of what it overrides, from now on."""
        for event in self.__slots__:
            if getattr(type(watcher), event) is not getattr(Watcher, event):
                setattr(self, event, (*getattr(self, event), getattr(watcher, event)))

    def unsubscribe(self, watcher: Watcher) -> None:
        """Tell a watcher of nothing any more."""
        for event in self.__slots__:
            others = (tell for tell in getattr(self, event) if tell != getattr(watcher, event))
            setattr(self, event, tuple(others))
