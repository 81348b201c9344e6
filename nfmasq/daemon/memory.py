"""Memory that runs out: noticed in time, so that no packet and no thread is lost to it.

By default there are no more entries than fit into memory (`config/memory.py`). Who has asked for
more may come to the end of memory. So a thread looks, four times a second, how much of a limit is
left. It must suffice for the dictionaries of the tables to grow once more, which they do at one
time. Where it does not, no entry is added any more: a new entry takes the place of another.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from nfmasq.config import memory
from nfmasq.engine import Masquerade

log = logging.getLogger(__name__)

PAUSE = 0.25
"""Seconds between two looks."""

GROWTH_AN_ENTRY = 240
"""Bytes for each entry that the dictionaries take when all of them double."""

RESERVE = 16 << 20
"""Bytes that are left free for everything else."""

_PAGE = os.sysconf("SC_PAGE_SIZE")


class MemoryWatch:
    """Watches the memory of this process for `engine`, from `start` to `stop`.

    `addresses` and `resident` are the limits of the process's addresses and of its memory, in
    bytes; None: there is none.
    """

    def __init__(self, engine: Masquerade, addresses: int | None, resident: int | None) -> None:
        self._engine = engine
        self._limits = addresses, resident
        self._ended = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def start(self) -> None:
        """Watch from now on, if there is a limit."""
        if self._limits != (None, None):
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(PAUSE):
            self.look()

    def look(self) -> None:
        """Let no entry be added any more where too little memory is left."""
        room = self._engine.sessions.room
        taken = map(int, Path("/proc/self/statm").read_text("ascii").split()[:2])
        left = [
            limit - pages * _PAGE
            for limit, pages in zip(self._limits, taken, strict=True)
            if limit is not None
        ]
        if min(left) > RESERVE + GROWTH_AN_ENTRY * room.entries:
            return
        if room.entries < room.max_entries:
            with self._engine.sessions.lock:
                room.is_all_there_is()
            log.warning("memory runs out: there are no more than %d entries now", room.max_entries)


def watch(engine: Masquerade) -> MemoryWatch:
    """Make the watch for the limits that this process has."""
    return MemoryWatch(engine, memory.address_limit(), memory.cgroup_limit())
