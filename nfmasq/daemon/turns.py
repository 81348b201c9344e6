"""Reads the queue so that hosts take turns, where several have packets that wait.

Theory of operation. The kernel's queue is one line, whoever sent the packets. As long as packets
are handled as they come, or all of them are of one host, that is the quickest. Now and then a batch
is looked at that is large. Where it has packets of several hosts, what waits in the kernel is read
ahead, into a line for each host (`lines.py`), for the next `SHARED` seconds. Only a few packets are
handed over at a time then, so that what comes meanwhile is soon in its own line.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from nfmasq.daemon.lines import Lines
from nfmasq.daemon.receive import Receiver

SHARED = 10.0
"""Seconds for which hosts take turns after the packets of two were seen beside each other."""

FEW = 4
"""The most packets that are handed over at a time while hosts take turns."""

LOOK = 2
"""One large batch in `LOOK` is looked at, where all packets have been of one host so far."""

AHEAD = 8
"""The most batches that are read ahead at a time."""


class Turns:
    """Reads messages from `receiver`, whose batches are of `most` messages at most.

    `whose` returns the host of a message's packet. `drop` is called with the message of a packet
    whose host has its share of what may wait, `hold` with a host that sends more than can be
    handled all the time.
    """

    def __init__(
        self,
        receiver: Receiver,
        most: int,
        lines: Lines,
        whose: Callable[[bytes], int],
        drop: Callable[[bytes], None],
        hold: Callable[[int], None],
    ) -> None:
        self._receiver, self._most = receiver, most
        self._lines = lines
        self._whose, self._drop, self._hold = whose, drop, hold
        self._shared_until = 0.0
        self._large = 0
        self._host = 0

    def receive(self) -> list[bytes]:
        """Return the messages to be handled next, in reverse order; waits where there are none.

        The list is empty after a wait in vain, or where a signal came. Raises OSError.
        """
        if self._lines.waiting:
            self._read_ahead()
            return self._lines.take(FEW)[::-1]
        batch = self._receiver.receive()
        if len(batch) <= FEW or not self._is_shared(batch):
            return batch
        self._line_up(batch)
        return self._lines.take(FEW)[::-1]

    def _is_shared(self, batch: list[bytes]) -> bool:
        """Say whether several hosts have sent packets lately."""
        now = self._lines.now = monotonic()
        if now < self._shared_until:
            return True
        self._large += 1
        if self._large % LOOK or len(set(map(self._whose, batch))) == 1:
            return False
        self._shared_until = now + SHARED
        return True

    def _read_ahead(self) -> None:
        """Have what waits in the kernel wait in lines, unless one host has been alone for long."""
        now = self._lines.now = monotonic()
        if now > self._shared_until:
            return
        for _ in range(AHEAD):
            batch = self._receiver.receive_waiting()
            self._line_up(batch)
            if len(batch) < self._most:
                break
        while self._lines.crowding:
            self._hold(self._lines.crowding.pop())

    def _line_up(self, batch: list[bytes]) -> None:
        for message in reversed(batch):
            host = self._whose(message)
            if host != self._host:
                self._host = host
                self._shared_until = self._lines.now + SHARED
            if not self._lines.join(host, message):
                self._drop(message)
