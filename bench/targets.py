"""The ratios that must hold in one run: nfmasq against the floor, and the table against itself."""

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


_AGAINST_THE_FLOOR = (
    ("UDP 64 B, packets per second", "udp_64", 0.85, True),
    ("TCP bulk, inside to outside", "tcp_up", 4.0, True),
    ("TCP bulk, outside to inside", "tcp_down", 5.0, True),
    ("new TCP connections per second", "connections", 0.7, True),
    ("median round trip", "trip_median", 1.3, False),
)


def against_the_floor(paths: Rounds) -> Medians:
    """Divide the paths' figures by the floor's of the same round; returns medians of the ratios."""
    floor = paths["floor"]
    return {
        path: {
            key: median(map(operator.truediv, values, floor[key]))
            for key, values in found.items()
            if key in floor
        }
        for path, found in paths.items()
    }


def outcomes(paths: Rounds, table: Medians, expiry: Mapping[str, float]) -> Iterator[Outcome]:
    """Yield the outcomes of all that was measured and must hold."""
    if "nfmasq" in paths and "floor" in paths:
        ratios = against_the_floor(paths)["nfmasq"]
        for title, key, bound, at_least in _AGAINST_THE_FLOOR:
            yield Outcome(f"against the floor: {title}", ratios[key], bound, at_least)
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
