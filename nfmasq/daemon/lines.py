"""The lines in which packets wait that came faster than they are handled: a line for each host.

Theory of operation. The kernel's queue is one line for all. So a host that sends more than can be
handled would have everybody wait behind its packets. As soon as packets pile up, what waits in the
kernel is read ahead, into a line for each host. The lines take turns, and a host that had nothing
waiting comes first, as in RFC 8290 (section 4.1): a host that sends little finds no one before it.
A line that is empty after its turn has one more turn among the others before it is forgotten, so no
host gains by sending in spurts.

A host whose line does not come to its end for `PATIENCE` sends more than can be handled, all the
time. It is in `crowding` then: there are ways to hold it before its packets are queued
(`flowcache/service.py`), which take far less time than to drop them here.

There is room for `most` packets. A packet joins its line while this line is shorter than the room
that is left. So one host can have half of the room, two hosts two thirds of it together, and there
is always some room for another host. Nothing has to be searched for that.
"""

from __future__ import annotations

from collections import OrderedDict, deque

TURN = 4
"""The most packets of a line that are taken in its turn."""

PATIENCE = 0.05
"""Seconds after which a line that is still `LONG` belongs to a host that crowds the others."""

LONG = 64
"""Packets in a line of a host that may crowd the others."""

_UNIT = 8192
"""Bytes of a packet that count as one packet more: a superpacket takes the room of several."""


class _Line:
    """The packets of a host, since `begun`; `taken` is how much of the room they take."""

    __slots__ = ("begun", "messages", "taken")

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.begun = 0.0
        self.taken = 0


class Lines:
    """Packets, as the messages that brought them, in lines that are named by their host.

    `waiting` is how many packets wait. `now` is the time, in seconds; whoever uses this object sets
    it. `crowding` are the hosts that crowd the others; whoever has read it clears it.
    """

    def __init__(self, most: int) -> None:
        self.waiting = 0
        self.now = 0.0
        self.crowding: set[int] = set()
        self._room = most
        self._new: OrderedDict[int, _Line] = OrderedDict()
        self._old: OrderedDict[int, _Line] = OrderedDict()

    def join(self, host: int, message: bytes) -> bool:
        """Put a packet at the end of its host's line; False where the line has its share."""
        line = self._new.get(host) or self._old.get(host)
        if line is None:
            line = self._new[host] = _Line()
        if not line.messages:
            line.begun = self.now
        elif line.taken > LONG and self.now - line.begun > PATIENCE:
            self.crowding.add(host)
            line.begun = self.now
        if line.taken >= self._room:
            return False
        units = _units(message)
        line.taken += units
        self._room -= units
        line.messages.append(message)
        self.waiting += 1
        return True

    def take(self, count: int) -> list[bytes]:
        """Take up to `count` packets out, in the order in which they are to be handled."""
        taken: list[bytes] = []
        while len(taken) < count and (lines := self._new or self._old):
            host, line = lines.popitem(last=False)
            for _ in range(min(TURN, len(line.messages), count - len(taken))):
                message = line.messages.popleft()
                units = _units(message)
                line.taken -= units
                self._room += units
                taken.append(message)
            if line.messages or lines is self._new:
                self._old[host] = line
        self.waiting -= len(taken)
        return taken


def _units(message: bytes) -> int:
    """Return how much of the room a packet takes."""
    return 1 + len(message) // _UNIT
