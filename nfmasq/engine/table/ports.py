"""The masquerade ports: which there are, which are taken, and which one a new session gets.

Each (protocol, masquerade address) has its own ports, of the same numbers. Which of them are not
to be had is a byte a port, in the place of its number, with a 1 for a port that is taken and for
one that is no masquerade port at all. So the next one to be had is found by a search through
bytes at the processor's speed, in one range or several, also when nearly all are taken; the
numbers free are counted along.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

DRAWS = 4
"""Ports drawn at random before the next one that is free is taken.

They come out alike for all free ports, as long as not nearly all others are taken.
"""

_random: random.Random = random.SystemRandom()

_Kind = tuple[bool, int]


class Pool(NamedTuple):
    """At least one port, ascending, of which any will do; they are multiples of `step` apart."""

    ports: Sequence[int]
    step: int


class MasqueradePorts:
    """The masquerade ports of every protocol and masquerade address.

    `ports` has at least one, and is ascending within 1 to 65535: a range, or several one after
    the other. `every` is the pool of them all, `of_kind` has one for each kind of port
    (see `kind`) that there is.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self.ports = ports
        self.masq_port = ports[0]
        self._none_taken = bytearray(b"\1") * 65536
        self._taken: dict[tuple[int, int], bytearray] = {}
        self._free: dict[tuple[int, int], int] = {}
        by_kind: dict[_Kind, list[int]] = defaultdict(list)
        for mport in ports:
            self._none_taken[mport] = 0
            by_kind[kind(mport)].append(mport)
        self.every = Pool(ports, 1)
        self.of_kind = {which: Pool(alike, 2) for which, alike in by_kind.items()}

    def __contains__(self, port: int) -> bool:
        return not self._none_taken[port]

    def get_next_mport(self) -> int:
        """The next masquerade port; after the last comes the first."""
        mport = self.masq_port
        self.masq_port = _next(self._none_taken, mport + 1)
        return mport

    def take(self, protocol: int, maddr: int, mport: int) -> None:
        """Mark a free port as taken; one that is no masquerade port is nobody's to count."""
        if self._none_taken[mport]:
            return
        key = (protocol, maddr)
        taken = self._taken.get(key)
        if taken is None:
            taken = self._taken[key] = self._none_taken.copy()
            self._free[key] = len(self.ports)
        taken[mport] = 1
        self._free[key] -= 1

    def give_back(self, protocol: int, maddr: int, mport: int) -> None:
        """Mark a taken port as free; an address without taken ports is forgotten."""
        if mport in self:
            key = (protocol, maddr)
            self._taken[key][mport] = 0
            self._free[key] += 1
            if self._free[key] == len(self.ports):
                del self._taken[key], self._free[key]

    def unused(self, protocol: int, maddr: int, mport: int) -> bool:
        """Whether this is a masquerade port that is free."""
        return not self._taken_of(protocol, maddr)[mport]

    def next_unused(self, protocol: int, maddr: int) -> int | None:
        """What get_next_mport gives, called until a port is unused; None after a whole round."""
        mport = _next(self._taken_of(protocol, maddr), self.masq_port)
        if mport < 0:
            return None
        self.masq_port = _next(self._none_taken, mport + 1)
        return mport

    def any_unused(self, protocol: int, maddr: int, pools: Iterable[Pool]) -> int | None:
        """A random one of the unused ports in the first pool that has any; None if none has.

        RFC 6056, algorithm 2 (section 3.3.2): a random port, until it is a free one. That may miss
        the last free ones, so after some draws it is the next free one after a random port
        (algorithm 1, section 3.3.1).
        """
        if self._free.get((protocol, maddr)) != 0:
            taken = self._taken_of(protocol, maddr)
            for pool in pools:
                mport = _draw(taken, pool)
                if mport is not None:
                    return mport
        # A session that shares a port then, as mappings by destination may, begins its search here.
        self.masq_port = _random.choice(self.ports)
        return None

    def free(self, protocol: int) -> int:
        """How many ports are free, on all addresses that have one taken; all where none has."""
        counts = [n for (number, _), n in list(self._free.items()) if number == protocol]
        return sum(counts) if counts else len(self.ports)

    def _taken_of(self, protocol: int, maddr: int) -> bytearray:
        return self._taken.get((protocol, maddr), self._none_taken)


def _next(taken: bytearray, mport: int) -> int:
    """The first port to be had from `mport` on, round the end; -1 if there is none."""
    found = taken.find(0, mport)
    return found if found >= 0 else taken.find(0)


def _draw(taken: bytearray, pool: Pool) -> int | None:
    """A random port of the pool that is to be had."""
    for _ in range(DRAWS):
        mport = _random.choice(pool.ports)
        if not taken[mport]:
            return mport
    for start, stop in ((mport, pool.ports[-1] + 1), (pool.ports[0], mport)):
        place = taken[start : stop : pool.step].find(0)
        if place >= 0:
            return start + place * pool.step
    return None


def kind(port: int) -> _Kind:
    """A port's class, true for a well-known one (RFC 4787, REQ-3a: 0 to 1023), and its parity."""
    return port < 1024, port % 2


def sequential(ports: MasqueradePorts, protocol: int, maddr: int, sport: int) -> int | None:
    """`--port-selection sequential`: one after the other."""
    return ports.next_unused(protocol, maddr)


def preserve(ports: MasqueradePorts, protocol: int, maddr: int, sport: int) -> int | None:
    """`preserve`: the inside port itself where it is to be had, else one of its kind.

    RFC 4787 recommends that the class stay (REQ-3a: NFS servers, for one, want ports below 1024)
    and the parity (REQ-4: some programs take RTP to be on even ports and RTCP on odd ones; that the
    two be next to each other is not asked for, section 4.2.3). Where no such port is free, parity
    is given up before class: RFC 7857 (section 8) lets a NAT do without parity, and says no such
    thing of the class. Of the other class, one of the same parity is best again.

    Which one of them is left to chance, as RFC 7857 (section 9) and RFC 6056 (section 4) ask of
    a NAT that preserves ports and has to change one.
    """
    if ports.unused(protocol, maddr, sport):
        return sport
    well_known, parity = kind(sport)
    best_first = (
        (well_known, parity),
        (well_known, 1 - parity),
        (not well_known, parity),
        (not well_known, 1 - parity),
    )
    pools = [ports.of_kind[which] for which in best_first if which in ports.of_kind]
    return ports.any_unused(protocol, maddr, pools)


def at_random(ports: MasqueradePorts, protocol: int, maddr: int, sport: int) -> int | None:
    """`random`: any, unforeseeable from those before (RFC 6056)."""
    return ports.any_unused(protocol, maddr, [ports.every])


PORT_SELECTIONS: dict[str, Callable[[MasqueradePorts, int, int, int], int | None]] = {
    "sequential": sequential,
    "preserve": preserve,
    "random": at_random,
}
"""The ways of `--port-selection`: (ports, protocol, maddr, sport) to a free mport, or None."""
