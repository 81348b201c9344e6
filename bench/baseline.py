"""What the baselines share: reading the queue, and the mappings of baselines that masquerade.

The baselines use NetfilterQueue as its documentation shows it, with as long a queue as nfmasq's.
None has superpackets, which NetfilterQueue does not offer.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Generic, TypeVar

from netfilterqueue import NetfilterQueue, Packet

QUEUE = 0
QUEUE_LENGTH = 8192
SOCKET_BUFFER = 32 * 1024 * 1024

TCP, UDP = 6, 17

Endpoint = TypeVar("Endpoint")


def serve(handle: Callable[[Packet], None]) -> None:
    """Give each packet of the queue to `handle`, until the process is ended."""
    queue = NetfilterQueue()
    queue.bind(QUEUE, handle, QUEUE_LENGTH, sock_len=SOCKET_BUFFER)
    queue.run()


class Ports(Generic[Endpoint]):
    """The mappings of each protocol: the masquerade port of an inside endpoint, (address, port).

    Ports are given out in turn and never given back: a new mapping takes the port of the oldest.
    """

    def __init__(self, ports: range = range(1024, 65096)) -> None:
        self._next = cycle(ports)
        self._mport: dict[tuple[int, Endpoint], int] = {}
        self._inside: dict[tuple[int, int], Endpoint] = {}

    def mport(self, protocol: int, endpoint: Endpoint) -> int:
        """Return the port that stands for an inside endpoint; a new port where it has none."""
        key = (protocol, endpoint)
        if key not in self._mport:
            mport = next(self._next)
            former = self._inside.get((protocol, mport))
            if former is not None:
                del self._mport[protocol, former]
            self._mport[key] = mport
            self._inside[protocol, mport] = endpoint
        return self._mport[key]

    def inside(self, protocol: int, mport: int) -> Endpoint | None:
        """Return the inside endpoint that a port stands for; None where there is none."""
        return self._inside.get((protocol, mport))
