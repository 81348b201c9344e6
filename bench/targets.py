"""The ratios that must hold in one run: of data paths, and of the table against itself.

nfmasq by NFQUEUE is held against the floor, and with its flow cache against the kernel's own
MASQUERADE. Connections that end soon never come into the cache: with it, there may be no fewer than
without.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

Medians = Mapping[str, Mapping[str, float]]
"""Results by what was measured (a path; a number of entries), then by quantity."""

Rounds = Mapping[str, Mapping[str, Sequence[float]]]
"""Results before medians are taken, by what was measured, then by quantity: one value a round."""

MOST_BYTES = 700
"""The memory that an entry may take, in bytes."""


class Outcome(NamedTuple):
    """A ratio (or a number of bytes) that was measured, and what it must be."""

    title: str
    value: float
    bound: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """Whether the value keeps to the bound."""
        keeps: Callable[[float, float], bool] = operator.ge if self.at_least else operator.le
        return keeps(self.value, self.bound)


_TITLES = {
    "tcp_up": "TCP bulk, inside to outside",
    "tcp_down": "TCP bulk, outside to inside",
    "udp_64": "UDP 64 B, packets per second",
    "connections": "new TCP connections per second",
    "http": "new TCP connections per second, HTTP",
    "trip_median": "median round trip",
}


class Target(NamedTuple):
    """What the ratio of a path's figure to another path's must be, in the same round."""

    path: str
    other: str
    quantity: str
    bound: float
    at_least: bool = True


NOISE = 0.95
"""What counts as no lower, of new connections: a run cannot tell more exactly.

The rounds of one path are up to 8 in a hundred apart, on a machine that does nothing else.
"""

_TARGETS = (
    Target("nfmasq", "floor", "udp_64", 0.85),
    Target("nfmasq", "floor", "tcp_up", 4.0),
    Target("nfmasq", "floor", "tcp_down", 5.0),
    Target("nfmasq", "floor", "connections", 0.7),
    Target("nfmasq", "floor", "trip_median", 1.3, at_least=False),
    Target("routed", "masquerade", "tcp_up", 0.95),
    Target("routed", "masquerade", "tcp_down", 0.95),
    Target("routed", "masquerade", "udp_64", 0.85),
    Target("routed", "masquerade", "trip_median", 1.08, at_least=False),
    Target("routed", "nfmasq", "http", NOISE),
    Target("direct", "masquerade", "tcp_up", 1.0),
    Target("direct", "masquerade", "tcp_down", 1.0),
    Target("direct", "masquerade", "udp_64", 1.0),
    Target("direct", "masquerade", "trip_median", 1.0, at_least=False),
    Target("direct", "nfmasq", "http", NOISE),
)


def against(other: str, paths: Rounds) -> Medians:
    """Divide the paths' figures by another path's of the same round; returns medians of that."""
    others = paths[other]
    return {
        path: {
            key: median(map(operator.truediv, values, others[key]))
            for key, values in found.items()
            if key in others
        }
        for path, found in paths.items()
    }


def outcomes(paths: Rounds, table: Medians, expiry: Mapping[str, float]) -> Iterator[Outcome]:
    """Yield the outcomes of all that was measured and must hold."""
    for path, other, key, bound, at_least in _TARGETS:
        if path in paths and other in paths:
            title = f"{path} against {other}: {_TITLES[key]}"
            yield Outcome(title, against(other, paths)[path][key], bound, at_least)
    if table:
        smallest, largest = min(table, key=int), max(table, key=int)
        ratio = table[smallest]["found"] / table[largest]["found"]
        title = f"find, at {int(largest):,} entries against {int(smallest):,}"
        yield Outcome(title, ratio, 1.5, False)
        if "bytes_in_use" in table[largest]:
            used = table[largest]["bytes_in_use"]
            yield Outcome(f"bytes an entry in use, of {int(largest):,}", used, MOST_BYTES, False)
    if expiry:
        title = "p99 of the round trip while 100,000 entries expire, against none"
        yield Outcome(title, expiry["ratio"], 2.0, False)
