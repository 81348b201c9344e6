"""Entries whose five values are not all known, found by what is known of them.

An open-ended entry (`entry.OPEN_ENDED`) waits for a packet that fills in what is missing, and any
packet that fits what is known may do so. So the entry cannot stand in an index by all five values.
It stands here under a pattern, in which None takes the place of a value that is open. There are
four patterns that a packet can fit in each direction, and eight from the inside, where the inside
port may be open, too. To look them all up takes constant time, however many entries there are.

Where entries of several patterns fit a packet, the entry that knows more goes before the entry that
knows less, and the outside address counts for more than the port. Of one pattern the newest entry
goes first. An entry with DLOOSE never keeps anything of the outside endpoint for known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from nfmasq.engine.table.entry import MASQ_DADDR_PASS, MASQ_DPORT_PASS, NO_SPORT, IpMasq
from nfmasq.engine.table.keys import endpoint_key, inside_key, mapping_key, masquerade_key
from nfmasq.engine.table.newest import Newest

Pattern: TypeAlias = "tuple[int, bool, int | None, int | None]"
"""The key of an endpoint of the entry, whether the port in it is open, and the outside address and
port, or None."""


class OpenEnded:
    """All open-ended entries.

    `by_m` and `by_s` have them by their masquerade endpoint and their inside endpoint, `by_mapping`
    by their mapping (`keys.py`). An inside endpoint whose port is open has port 0.
    """

    def __init__(self) -> None:
        self.by_m: Newest[int] = Newest()
        self.by_s: Newest[int] = Newest()
        self.by_mapping: Newest[int] = Newest()
        self._inward: Newest[Pattern] = Newest()
        self._outward: Newest[Pattern] = Newest()

    def __bool__(self) -> bool:
        return bool(self.by_m)

    def dictionaries(self) -> Iterator[dict[Any, Any]]:
        """Yield what has the entries."""
        for entries in (self.by_m, self.by_s, self.by_mapping, self._inward, self._outward):
            yield entries.piles

    def add(self, ms: IpMasq) -> None:
        """Add an entry, as the newest."""
        self.by_m.add(masquerade_key(ms), ms)
        self.by_s.add(inside_key(ms), ms)
        self.by_mapping.add(mapping_key(ms), ms)
        self._inward.add(_inward_pattern(ms), ms)
        self._outward.add(_outward_pattern(ms), ms)

    def remove(self, ms: IpMasq) -> None:
        """Remove an entry, which is as it was when it was added."""
        self.by_m.remove(masquerade_key(ms), ms)
        self.by_s.remove(inside_key(ms), ms)
        self.by_mapping.remove(mapping_key(ms), ms)
        self._inward.remove(_inward_pattern(ms), ms)
        self._outward.remove(_outward_pattern(ms), ms)

    def may_be_of(self, protocol: int, saddr: int, sport: int) -> bool:
        """Say whether an inside endpoint has an entry, or may turn out to have one."""
        by_s = self.by_s.piles
        return (
            endpoint_key(protocol, saddr, sport) in by_s or endpoint_key(protocol, saddr, 0) in by_s
        )

    def find_in(self, m_key: int, daddr: int, dport: int) -> IpMasq | None:
        """Return the entry of a packet from the outside, by its destination and its source."""
        if m_key not in self.by_m:
            return None
        return _first(self._inward, _patterns(m_key, False, daddr, dport))

    def find_out(self, s_key: int, port_is_open: bool, daddr: int, dport: int) -> IpMasq | None:
        """Return the entry of a packet from the inside, by its source and its destination.

        With `port_is_open` only the entries whose inside port is open are looked at; the source has
        port 0 then.
        """
        if s_key not in self.by_s:
            return None
        return _first(self._outward, _patterns(s_key, port_is_open, daddr, dport))


def _first(entries: Newest[Pattern], patterns: Iterator[Pattern]) -> IpMasq | None:
    return next(filter(None, map(entries.get, patterns)), None)


def _patterns(key: int, port_is_open: bool, daddr: int, dport: int) -> Iterator[Pattern]:
    """Yield the patterns that a packet fits, the pattern that knows most first."""
    yield key, port_is_open, daddr, dport
    yield key, port_is_open, daddr, None
    yield key, port_is_open, None, dport
    yield key, port_is_open, None, None


def _inward_pattern(ms: IpMasq) -> Pattern:
    return masquerade_key(ms), False, *_outside(ms)


def _outward_pattern(ms: IpMasq) -> Pattern:
    return inside_key(ms), ms.flags & NO_SPORT > 0, *_outside(ms)


def _outside(ms: IpMasq) -> tuple[int | None, int | None]:
    """Return what an entry knows of its outside endpoint."""
    return (
        None if ms.flags & MASQ_DADDR_PASS else ms.daddr,
        None if ms.flags & MASQ_DPORT_PASS else ms.dport,
    )
