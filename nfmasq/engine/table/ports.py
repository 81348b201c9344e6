"""The masquerade ports: which there are, which are taken, and which port a new session gets.

Each (protocol, masquerade address) has ports of its own, with the same numbers, in an array of a
byte for each port number. A byte is 0 for a free port. It is 1 for a port that is taken, and for a
port that is no masquerade port at all. So the next free port is found by a search through bytes at
the processor's speed, in one range or several, also when nearly all ports are taken. The number of
free ports is kept beside the array.

A second array has only what is taken, masquerade port or not (a forwarded port). When other ports
become the masquerade ports, the first array is made anew from the second, at the processor's speed
too.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

DRAWS = 4
"""How many ports are drawn at random before the next free port is taken.

All free ports are drawn equally often, as long as not nearly all ports are taken.
"""

_random: random.Random = random.SystemRandom()

_Kind = tuple[bool, int]


class Pool(NamedTuple):
    """Ports of which any will do: at least one, ascending, and multiples of `step` apart."""

    ports: Sequence[int]
    step: int


class _Taken:
    """The taken ports of one protocol and masquerade address.

    `held` has a 1 for each port that is taken, `count` is how many these are. `not_free` has a 1
    also for each port that is no masquerade port, `free` is how many ports have none.
    """

    __slots__ = ("count", "free", "held", "not_free")

    def __init__(self, held: bytearray, count: int, no_ports: bytearray) -> None:
        self.held = held
        self.count = count
        ones = int.from_bytes(held, "big") | int.from_bytes(no_ports, "big")
        self.not_free = bytearray(ones.to_bytes(len(held), "big"))
        self.free = self.not_free.count(0)


class MasqueradePorts:
    """The masquerade ports of every protocol and masquerade address.

    `ports` has at least one port, and is ascending within 1 to 65535: a range, or several ranges
    one after the other. What is taken of the ports that there were `before` stays taken. `every` is
    the pool of all ports, `of_kind` has a pool for each kind of port (see `kind`) that there is.
    `masq_port` is the port that get_next_mport gives next. Addresses are ints in host order.
    """

    def __init__(self, ports: Sequence[int], before: MasqueradePorts | None = None) -> None:
        self.ports = ports
        self.masq_port = ports[0]
        self._none_taken = bytearray(b"\1") * 65536
        by_kind: dict[_Kind, list[int]] = defaultdict(list)
        for mport in ports:
            self._none_taken[mport] = 0
            by_kind[kind(mport)].append(mport)
        self.every = Pool(ports, 1)
        self.of_kind = {which: Pool(alike, 2) for which, alike in by_kind.items()}
        self._taken: dict[tuple[int, int], _Taken] = {
            key: _Taken(taken.held, taken.count, self._none_taken)
            for key, taken in (before._taken if before is not None else {}).items()
        }

    def __contains__(self, port: int) -> bool:
        return not self._none_taken[port]

    def get_next_mport(self) -> int:
        """Return the next masquerade port, taken or not; after the last port comes the first."""
        mport = self.masq_port
        self.masq_port = _next(self._none_taken, mport + 1)
        return mport

    def take(self, protocol: int, maddr: int, mport: int) -> None:
        """Mark a port as taken, masquerade port or not."""
        key = (protocol, maddr)
        taken = self._taken.get(key)
        if taken is None:
            taken = self._taken[key] = _Taken(bytearray(65536), 0, self._none_taken)
        taken.held[mport] = 1
        taken.count += 1
        if not self._none_taken[mport]:
            taken.not_free[mport] = 1
            taken.free -= 1

    def give_back(self, protocol: int, maddr: int, mport: int) -> None:
        """Mark a taken port as not taken; forget an address without taken ports."""
        key = (protocol, maddr)
        taken = self._taken[key]
        taken.held[mport] = 0
        taken.count -= 1
        if not self._none_taken[mport]:
            taken.not_free[mport] = 0
            taken.free += 1
        if not taken.count:
            del self._taken[key]

    def give_all_back(self) -> None:
        """Mark all ports as not taken."""
        self._taken = {}

    def unused(self, protocol: int, maddr: int, mport: int) -> bool:
        """Say whether a port is a masquerade port that is free."""
        return not self._not_free(protocol, maddr)[mport]

    def next_unused(self, protocol: int, maddr: int) -> int | None:
        """Return the next free port; None where a whole round finds none.

        It is the port that get_next_mport would give, called until a port is free.
        """
        taken = self._taken.get((protocol, maddr))
        not_free = taken.not_free if taken is not None else self._none_taken
        mport = not_free.find(0, self.masq_port)
        if mport < 0:
            mport = not_free.find(0)
            if mport < 0:
                return None
        following = self._none_taken.find(0, mport + 1)
        self.masq_port = following if following >= 0 else self.ports[0]
        return mport

    def any_unused(self, protocol: int, maddr: int, pools: Iterable[Pool]) -> int | None:
        """Return a random free port of the first pool that has a free port; None if none has.

        RFC 6056, algorithm 2 (section 3.3.2): ports are drawn at random until a port is free. This
        may miss the last free ports. So after some draws the next free port after a random port is
        taken (algorithm 1, section 3.3.1).
        """
        taken = self._taken.get((protocol, maddr))
        if taken is None or taken.free:
            not_free = self._not_free(protocol, maddr)
            for pool in pools:
                mport = _draw(not_free, pool)
                if mport is not None:
                    return mport
        # The session may share a port then (address-and-port-dependent mapping): look from here on.
        self.masq_port = _random.choice(self.ports)
        return None

    def free(self, protocol: int) -> int:
        """Return how many ports of a protocol number are free.

        The free ports of all addresses with a taken port are added up. Where no port is taken on
        any address, it is the number of all ports.
        """
        every = len(self.ports)
        of_protocol = (t.free for (number, _), t in list(self._taken.items()) if number == protocol)
        counts = [free for free in of_protocol if free < every]
        return sum(counts) if counts else every

    def _not_free(self, protocol: int, maddr: int) -> bytearray:
        taken = self._taken.get((protocol, maddr))
        return taken.not_free if taken is not None else self._none_taken


def _next(not_free: bytearray, mport: int) -> int:
    """Return the first free port from `mport` on, round the end; -1 if there is none."""
    found = not_free.find(0, mport)
    return found if found >= 0 else not_free.find(0)


def _draw(not_free: bytearray, pool: Pool) -> int | None:
    """Return a random free port of the pool; None if there is none."""
    for _ in range(DRAWS):
        mport = _random.choice(pool.ports)
        if not not_free[mport]:
            return mport
    for start, stop in ((mport, pool.ports[-1] + 1), (pool.ports[0], mport)):
        place = not_free[start : stop : pool.step].find(0)
        if place >= 0:
            return start + place * pool.step
    return None


def kind(port: int) -> _Kind:
    """Return a port's class and its parity.

    The class is true for a well-known port, 0 to 1023 (RFC 4787 REQ-3a); the parity is 0 for even.
    """
    return port < 1024, port % 2


def sequential(ports: MasqueradePorts, protocol: int, maddr: int, sport: int) -> int | None:
    """Return the next free mport, in ascending order; or None. (`--port-selection sequential`)"""
    return ports.next_unused(protocol, maddr)


def preserve(ports: MasqueradePorts, protocol: int, maddr: int, sport: int) -> int | None:
    """Return the inside port where it is free, else a port of its kind; or None. (`preserve`)

    RFC 4787 recommends that the class stays (REQ-3a: NFS servers, for example, want ports below
    1024). It recommends that the parity stays, too (REQ-4: some programs expect RTP on even ports
    and RTCP on odd ports). It does not ask for the two to be next to each other (section 4.2.3).
    Where no port of the same class and parity is free, the parity is given up first: RFC 7857
    (section 8) lets a NAT do without parity, and does not say this of the class. In the other class
    a port of the same parity is again the better choice.

    Which port of the kind it is, is left to chance. RFC 7857 (section 9) and RFC 6056 (section 4)
    ask for this where a NAT preserves ports and has to change a port.
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
    """Return a random free mport; or None. (`random`)

    It cannot be foreseen from earlier mports (RFC 6056).
    """
    return ports.any_unused(protocol, maddr, [ports.every])


PORT_SELECTIONS: dict[str, Callable[[MasqueradePorts, int, int, int], int | None]] = {
    "sequential": sequential,
    "preserve": preserve,
    "random": at_random,
}
"""The ways of `--port-selection`: (ports, protocol, maddr, sport) to a free mport, or None."""
