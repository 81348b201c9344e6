"""Which entries move most, told again and again to a client that watches (`nfmasq top`).

Theory of operation. A look walks through the table and notes how many bytes each entry has moved so
far. What it has moved since the look before is its rate. Nothing but the busiest entries is put
into words, and goes to the client, so a look at a large table is cheap.

To remember what each of a million entries had moved takes memory. So of a table with more than
`REMEMBERED` entries only so many are noted, of those that have had a packet since the look before.
Then an entry that begins, or goes on after a rest, is told of at its second look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import nlargest
from time import monotonic
from typing import Any, NamedTuple

from nfmasq.daemon.pace import paced
from nfmasq.engine import IpMasq
from nfmasq.engine.sessions import Sessions
from nfmasq.engine.table.entry import CACHED
from nfmasq.errors import NfmasqError

MOST = 100
"""How many entries are told of."""

SECONDS = (0.1, 60.0)
"""The least and the most seconds between two looks."""

REMEMBERED = 65_536
"""The most entries that are noted: a table that has no more is noted whole."""

_STEP = 1024  # entries between two pauses: a quarter of a millisecond of work
_CACHED_STEP = 32  # entries of flows in a flow cache, which has to be asked: likewise
_PAUSE = 0.0003  # seconds

Moved = tuple[int, int]
"""The bytes that an entry has moved, out and in."""

Describe = Callable[[Sessions, IpMasq, float], dict[str, Any]]


class Look(NamedTuple):
    """What the entries had moved; `is_whole` says whether all were noted.

    `time` is on the packets' clock, `begun` on `time.monotonic`'s, both in seconds.
    """

    time: float
    begun: float
    moved: dict[IpMasq, Moved]
    is_whole: bool


def busiest(
    sessions: Sessions,
    describe: Describe,
    clock: Callable[[], float],
    seconds: float,
    wait: Callable[[float], bool],
) -> Iterator[dict[str, Any]]:
    """Yield how many entries there are, how many of them are cached, and the busiest, without end.

    `busiest` are objects of `describe` with `rate_out` and `rate_in`, in bits a second. The first
    time they are missing: rates need two looks. `seconds` pass between two looks. `clock` is the
    clock of the packets. `wait` waits for so many seconds, and returns True where nfmasq stops.

    Raises NfmasqError where nfmasq stops.
    """
    yield _counts(sessions, [])
    before = _look(sessions, clock(), clock() - seconds)
    while not wait(seconds):
        after = _look(sessions, clock(), before.time)
        rates = paced(_rates(before, after), _STEP, _PAUSE)
        entries = [
            describe(sessions, ms, after.time) | {"rate_out": out, "rate_in": back}
            for out, back, ms in nlargest(MOST, rates, key=lambda rate: rate[0] + rate[1])
        ]
        yield _counts(sessions, entries)
        _take_apart(before)
        before = after
    raise NfmasqError("nfmasq has stopped")


def _counts(sessions: Sessions, entries: list[dict[str, Any]]) -> dict[str, Any]:
    cached = sessions.cached.flows
    return {"entries": sessions.room.entries, "cached": cached, "busiest": entries}


def _look(sessions: Sessions, now: float, since: float) -> Look:
    """Note what entries have moved; of a large table only those with packets `since` a time."""
    is_whole = sessions.room.entries <= REMEMBERED
    moved: dict[IpMasq, Moved] = {}
    cached: list[IpMasq] = []
    begun = monotonic()
    for ms in paced(sessions.walk(_STEP), _STEP, _PAUSE):
        if ms.flags & CACHED:
            cached.append(ms)
        elif len(moved) < REMEMBERED and (is_whole or (ms.timer or now) - ms.timeout >= since):
            moved[ms] = ms.bytes_out, ms.bytes_in
    for ms in paced(cached[:REMEMBERED], _CACHED_STEP, _PAUSE):
        usage, _ = sessions.account_of(ms)
        moved[ms] = usage.bytes_out, usage.bytes_in
    return Look(now, begun, moved, is_whole)


def _take_apart(look: Look) -> None:
    """Let go of what a look has noted, step by step: entries that have ended are freed with it."""
    for _ in paced(range(len(look.moved)), _STEP, _PAUSE):
        look.moved.popitem()


def _rates(before: Look, after: Look) -> Iterator[tuple[float, float, IpMasq]]:
    """Yield the bits a second of each entry, out and in; a new entry began with 0 bytes."""
    seconds = after.begun - before.begun
    for ms, (out, back) in after.moved.items():
        earlier = before.moved.get(ms, (0, 0) if before.is_whole else None)
        if earlier is not None:
            yield 8 * (out - earlier[0]) / seconds, 8 * (back - earlier[1]) / seconds, ms
