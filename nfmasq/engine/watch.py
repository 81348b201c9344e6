"""Watchers are told here what happens to entries, and which packets are lost, as it happens.

Whoever wants to know of entries (a cache of known flows, a saved table, a log) is a `Watcher` and
subscribes. `Sessions` is the one gate that all entries pass: it makes, changes and ends them, and
nobody else tells the watchers. It tells them with the lock held, after the fact and in the order in
which things happen. So a watcher that hears of everything knows at each moment which entries there
are, what the tables know them by, and their states. Not told are counters, timers, and which entry
controls another; they can be read of an entry.

    made      an entry is in the table
    answered  the first packet came back for an entry: it lost the flag NO_REPLY
    changed   an entry has another state
    moved     the tables know an entry by other values: addresses, ports, what is left open
    helped    a helper was bound to an entry, or begins anew: packets need more than a rewrite
    ended     an entry is in the table no more, and why (`table/endings.py`); of the entries that a
              flush has ended at one stroke this is told later, while new entries are made
    withdrawn an entry that a flow cache carries is about to end, to move, to get a helper, another
              server or another state: the only event that is told before the fact
    refused   a session could not be had, and why (`counters.REASONS`)
    dropped   a packet was lost, and why (`counters.REASONS`)

A packet that is lost because its session is refused is told as `refused`, and not as `dropped` too.
A watcher must return soon, raise nothing, and leave alone what the tables know of an entry. An
event that nobody has subscribed to costs one look at an empty tuple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from nfmasq.engine.table.entry import OPEN_ENDED, IpMasq
from nfmasq.engine.wire.header import FiveTuple


class Identity(NamedTuple):
    """The values by which the tables know an entry; addresses and ports are ints in host order.

    `left_open` has the flags that say which of the values are not known yet.
    """

    protocol: int
    maddr: int
    mport: int
    saddr: int
    sport: int
    daddr: int
    dport: int
    left_open: int

    @classmethod
    def of(cls, ms: IpMasq) -> Identity:
        """Return the identity of an entry."""
        known = ms.protocol, ms.maddr, ms.mport, ms.saddr, ms.sport, ms.daddr, ms.dport
        return cls(*known, ms.flags & OPEN_ENDED)


class Watcher:
    """Hears of everything and does nothing: override the methods of interest."""

    def made(self, ms: IpMasq) -> None:
        """Hear that an entry is in the table."""

    def answered(self, ms: IpMasq) -> None:
        """Hear that the first packet came back for an entry."""

    def changed(self, ms: IpMasq, before: int) -> None:
        """Hear that an entry's state has changed; `before` is the state it had."""

    def moved(self, ms: IpMasq, before: Identity) -> None:
        """Hear that the tables know an entry by other values; `before` has the old values."""

    def helped(self, ms: IpMasq) -> None:
        """Hear that a helper was bound to an entry, or begins anew with it."""

    def ended(self, ms: IpMasq, reason: str) -> None:
        """Hear that an entry is in the table no more; `reason` is one of `endings.ENDINGS`."""

    def withdrawn(self, ms: IpMasq) -> None:
        """Hear that something is about to happen to an entry whose flow is in a cache."""

    def refused(self, session: FiveTuple, reason: str) -> None:
        """Hear that a session could not be had; `reason` is one of the counters' REASONS.

        `session` has the inside endpoint as its source, and the outside endpoint as its
        destination.
        """

    def dropped(self, packet: FiveTuple | None, reason: str) -> None:
        """Hear that a packet was lost; `reason` is one of the counters' REASONS.

        `packet` has the five values with which the packet came; None where it has no readable
        header.
        """


Tell: TypeAlias = "Callable[..., None]"


class Watch:
    """Holds the watchers' methods by event: `for tell in watch.made: tell(ms)`."""

    __slots__ = (
        "answered",
        "changed",
        "dropped",
        "ended",
        "helped",
        "made",
        "moved",
        "refused",
        "withdrawn",
    )

    def __init__(self) -> None:
        self.made: tuple[Tell, ...] = ()
        self.answered: tuple[Tell, ...] = ()
        self.changed: tuple[Tell, ...] = ()
        self.moved: tuple[Tell, ...] = ()
        self.helped: tuple[Tell, ...] = ()
        self.ended: tuple[Tell, ...] = ()
        self.withdrawn: tuple[Tell, ...] = ()
        self.refused: tuple[Tell, ...] = ()
        self.dropped: tuple[Tell, ...] = ()

    def subscribe(self, watcher: Watcher) -> None:
        """Tell a watcher of the events whose methods it overrides, from now on."""
        for event in self.__slots__:
            if getattr(type(watcher), event) is not getattr(Watcher, event):
                setattr(self, event, (*getattr(self, event), getattr(watcher, event)))

    def unsubscribe(self, watcher: Watcher) -> None:
        """Tell a watcher of nothing any more."""
        for event in self.__slots__:
            others = (tell for tell in getattr(self, event) if tell != getattr(watcher, event))
            setattr(self, event, tuple(others))
