"""The packet in hand holds a reference to its entry, without the lock.

Theory of operation. On the plain way a look-up counts a reference in the entry (`refcnt`), with the
lock held. The fast path takes no lock, and two threads that count in one number lose counts. So the
fast path has a place of its own for its reference: the hand. Only the thread that handles packets
writes it, and one entry is in hand at a time.

Whoever ends an entry that nobody may be using must not miss the packet that takes the entry in hand
at this very moment. Two steps on each side see to it:

    a packet                                 whoever ends the entry, with the lock
    1. takes the entry in hand               1. takes the entry's rewrite away
    2. reads the entry's rewrite             2. looks into the hand

Whichever order the four steps happen in, either the packet finds no rewrite, or the other finds the
entry in hand, or both. Without a rewrite the packet waits for the lock, and then sees whether the
entry is still there (`fastpath.precompute`). With the entry in hand it does not end: its timer
starts again, or another entry makes room.

A packet that fails while it has an entry in hand leaves it there until the next packet of a known
flow comes. The entry lives as much longer, and nothing else follows.
"""

from __future__ import annotations

from nfmasq.engine.table.entry import IpMasq


class Hand:
    """What the packet in hand refers to: `ms`, an entry or None."""

    __slots__ = ("ms",)

    def __init__(self) -> None:
        self.ms: IpMasq | None = None
