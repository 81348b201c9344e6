"""The interpreter of a running nfmasq: set for short waits, and to give memory back.

Threads. A thread that works keeps the interpreter until another thread has waited for
`SWITCH_INTERVAL`. Packets are often the other thread.

Memory. An entry is freed with its last reference, and nothing that ends leaves a cycle. So the
collections of all objects, which walk the whole table, have nothing to find, and hardly happen.
What the table frees after a flood goes back to the system: small objects as soon as no other object
lives beside them, and large blocks, which are the tables of dictionaries, at once. The C library
would keep large blocks on its heap after it has seen some of them; a fixed threshold prevents this.
It would also keep a heap for each thread, whose addresses count where RLIMIT_AS is set: here all
threads share a heap, for only the thread that has the interpreter makes objects.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import ExitStack

SWITCH_INTERVAL = 0.000_2
"""Seconds after which a working thread gives the interpreter to a waiting thread.

A packet that arrives while another thread computes (a scrape, a long list) waits for this time.
Each packet of a burst waits for it, since reading from the queue gives the interpreter away.
Python's default of 5 ms would be felt in each packet.
"""

YOUNG_COLLECTIONS = 10_000
"""How many garbage collections of young objects there are for each collection of all objects.

A collection of all objects walks the whole table: for 100,000 entries some 60 ms, in which no
packet moves.
"""

LARGE_BLOCK = 256 * 1024
"""Bytes of a block from which on the C library gets it from the system, and gives it back."""

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def favour_packets(stack: ExitStack) -> None:
    """Set the interpreter for short waits, until `stack` unwinds."""
    stack.callback(sys.setswitchinterval, sys.getswitchinterval())
    sys.setswitchinterval(SWITCH_INTERVAL)
    thresholds = gc.get_threshold()
    stack.callback(gc.set_threshold, *thresholds)
    gc.set_threshold(*thresholds[:2], YOUNG_COLLECTIONS)


def give_memory_back() -> None:
    """Have the C library give large blocks back to the system, for as long as the process runs.

    To be called before there are other threads. Where the C library has no such setting, nothing is
    done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
        mallopt(_M_ARENA_MAX, 1)
