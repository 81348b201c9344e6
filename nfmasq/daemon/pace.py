"""Walks over many entries with pauses, in which packets pass.

The interpreter runs one thread at a time. A thread that walks over a large table would hold up the
packets, so it sleeps after every few entries. How many entries, and how long a sleep, depends on
the work: each caller has measured its own numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


def paced(
    entries: Iterable[_T],
    step: int,
    pause: float,
    wait: Callable[[float], bool | None] = time.sleep,
) -> Iterator[_T]:
    """Yield all entries, and wait for `pause` seconds before the first of each `step` entries.

    The walk ends early where `wait` returns True, as the `wait` of a set `threading.Event` does.
    """
    for walked, entry in enumerate(entries):
        if walked % step == 0 and wait(pause):
            return
        yield entry
