"""The process of a running nfmasq: set for short waits, to give memory back, and with means enough.

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

import _thread
import ctypes
import gc
import os
import resource
import sys
import threading
from contextlib import ExitStack

from nfmasq.errors import NfmasqError

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

DESCRIPTORS = 192
"""File descriptors that nfmasq needs at most: its own, and those of the clients that it has at a
time (`connections.py`)."""

THREADS = 16
"""Threads that can be started when nfmasq starts: its own, and some for clients."""

_BEGINS_WITHIN = 5.0  # seconds


def favour_packets(stack: ExitStack) -> None:
    """Set the interpreter for short waits, until `stack` unwinds."""
    stack.callback(sys.setswitchinterval, sys.getswitchinterval())
    sys.setswitchinterval(SWITCH_INTERVAL)
    thresholds = gc.get_threshold()
    stack.callback(gc.set_threshold, *thresholds)
    gc.set_threshold(*thresholds[:2], YOUNG_COLLECTIONS)


def give_memory_back() -> None:
    """Have the C library give large blocks back to the system, for as long as the process runs.

    All threads allocate from one heap: one of them runs at a time, and a heap of its own for each
    thread would take address space, of which there may be little. To be called before there are
    other threads. Where the C library has no such settings, nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
        mallopt(_M_ARENA_MAX, 1)


def secure_threads() -> None:
    """Make sure that `THREADS` threads can be started. Raises RuntimeError where they cannot.

    Without memory a thread may begin, and end before it has done anything: `Thread.start` would
    wait for it without end.
    """
    began, done = threading.Semaphore(0), threading.Event()

    def begin() -> None:
        began.release()
        done.wait()

    try:
        for _ in range(THREADS):
            _thread.start_new_thread(begin, ())
            if not began.acquire(timeout=_BEGINS_WITHIN):
                raise RuntimeError("can't start new thread")
    finally:
        done.set()


def secure_descriptors() -> None:
    """Make sure that there are `DESCRIPTORS` file descriptors to open, whoever connects later.

    Raises NfmasqError where there are fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = DESCRIPTORS + _open_descriptors()
    if soft != resource.RLIM_INFINITY and soft < enough:
        if hard != resource.RLIM_INFINITY and hard < enough:
            raise NfmasqError(
                f"{hard} open files are allowed, and nfmasq takes up to {enough}: raise the limit "
                "(ulimit -n, or LimitNOFILE= of the unit)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def _open_descriptors() -> int:
    """Return how many descriptors are open; 0 where that cannot be found out."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0
