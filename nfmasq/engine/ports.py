"""The masquerade ports: which there are, which are taken, and which one comes next.

Each (protocol, masquerade address) has its own ports of the same range. Which are taken
is a byte a port, so that the next one that is not is found by a search through bytes
at the processor's speed, also when nearly all are taken; the numbers free are counted along.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_system_random = random.SystemRandom()


class MasqueradePorts:
    """The ports of one range, for every protocol and masquerade address.

    `ports` is an ascending range within 1 to 65535.
    """

    def __init__(self, ports: range) -> None:
        self.ports = ports
        self.masq_port = ports[0]
        self._taken: dict[tuple[int, int], bytearray] = {}
        self._free: dict[tuple[int, int], int] = {}

    def get_next_mport(self) -> int:
        """The next port of the range; after its last comes its first."""
        mport = self.masq_port
        self.masq_port = mport + 1 if mport < self.ports[-1] else self.ports[0]
        return mport

    def take(self, protocol: int, maddr: int, mport: int) -> None:
        """Mark a free port as taken; a port outside the range is nobody's to count."""
        if mport in self.ports:
            key = (protocol, maddr)
            self._taken.setdefault(key, bytearray(len(self.ports)))[mport - self.ports[0]] = 1
            self._free[key] = self._free.get(key, len(self.ports)) - 1

    def give_back(self, protocol: int, maddr: int, mport: int) -> None:
        """Mark a taken port as free; an address without taken ports is forgotten."""
        if mport in self.ports:
            key = (protocol, maddr)
            self._taken[key][mport - self.ports[0]] = 0
            self._free[key] += 1
            if self._free[key] == len(self.ports):
                del self._taken[key], self._free[key]

    def unused(self, protocol: int, maddr: int, mport: int) -> bool:
        """Whether this port of the range is free."""
        taken = self._taken.get((protocol, maddr))
        return taken is None or not taken[mport - self.ports[0]]

    def next_unused(self, protocol: int, maddr: int) -> int | None:
        """What get_next_mport gives, called until a port is unused; None after a whole round."""
        mport = self.get_next_mport()
        taken = self._taken.get((protocol, maddr))
        if taken is None:
            return mport
        place = taken.find(0, mport - self.ports[0])
        if place < 0:
            place = taken.find(0)
        if place < 0:
            return None
        self.masq_port = self.ports[place]
        return self.get_next_mport()

    def free(self, protocol: int) -> int:
        """How many ports are free, on all addresses that have one taken; all where none has."""
        counts = [n for (number, _), n in list(self._free.items()) if number == protocol]
        return sum(counts) if counts else len(self.ports)


def sequential(ports: MasqueradePorts, protocol: int, maddr: int, sport: int) -> int | None:
    """`--port-selection sequential`: one after the other."""
    return ports.next_unused(protocol, maddr)


def preserve(ports: MasqueradePorts, protocol: int, maddr: int, sport: int) -> int | None:
    """`preserve`: the inside port itself where it is in the range and free, else sequential."""
    if sport in ports.ports and ports.unused(protocol, maddr, sport):
        return sport
    return ports.next_unused(protocol, maddr)


def at_random(ports: MasqueradePorts, protocol: int, maddr: int, sport: int) -> int | None:
    """`random`: the first free one from a random port on (RFC 6056, algorithm 1)."""
    ports.masq_port = _system_random.choice(ports.ports)
    return ports.next_unused(protocol, maddr)


PORT_SELECTIONS: dict[str, Callable[[MasqueradePorts, int, int, int], int | None]] = {
    "sequential": sequential,
    "preserve": preserve,
    "random": at_random,
}
"""The ways of `--port-selection`: (ports, protocol, maddr, sport) to a free mport, or None."""
