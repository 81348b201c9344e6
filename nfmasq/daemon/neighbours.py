"""The hosts that the kernel knows to be there: they have answered ARP lately.

A host that speaks only UDP has no other way to show that it is there (`engine/table/limits.py`).
The kernel asks for a host's address by ARP when a packet goes to the host, and again when it has
not heard of the host for a while. A host that answers is REACHABLE for some tens of seconds. The
other states say less: a packet of ARP that anybody sends makes an entry that is STALE.

Once in `PAUSE` a thread has the kernel write out its table of neighbours. Of hosts behind a router
inside the table says nothing. The table is read here, and not by pyroute2: with 1,000 neighbours
that takes the interpreter 1.5 ms instead of 28, each second, in which packets wait.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from socket import AF_INET, AF_NETLINK, NETLINK_ROUTE, SOCK_RAW, socket
from struct import Struct
from time import monotonic, sleep

from nfmasq.engine import Masquerade

log = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds between two looks at the table."""

STEP = 64
"""How many neighbours the engine is told of at a time, with its lock held."""

BREATH = 0.000_1
"""Seconds between two steps."""

_RTM_NEWNEIGH, _RTM_GETNEIGH = 28, 30
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NUD_REACHABLE = 0x02
_NDA_DST = 1
_LARGEST = 65_536

_message = Struct("=IHHII")  # length, type, flags, number, sender
_neighbour = Struct("=BxxxiHBB")  # family, interface, state, flags, type
_attribute = Struct("=HH")  # length, type
_address = Struct("!I")

_ASK = _message.pack(
    _message.size + _neighbour.size, _RTM_GETNEIGH, _NLM_F_REQUEST | _NLM_F_DUMP, 0, 0
) + _neighbour.pack(AF_INET, 0, 0, 0, 0)


def reachable_in(messages: bytes) -> tuple[list[int], bool]:
    """Read what the kernel writes about its neighbours.

    Returns the addresses, in host order, of those that are reachable, and whether more follows.
    """
    addresses: list[int] = []
    at = 0
    while at + _message.size <= len(messages):
        length, kind, *_ = _message.unpack_from(messages, at)
        if kind in (_NLMSG_DONE, _NLMSG_ERROR) or length < _message.size:
            return addresses, False
        if kind == _RTM_NEWNEIGH:
            addresses += _reachable(messages[at + _message.size : at + length])
        at += length + 3 & ~3
    return addresses, True


def _reachable(body: bytes) -> list[int]:
    """Return the address of a neighbour that is reachable, in a list, from the message about it."""
    if len(body) < _neighbour.size:
        return []
    family, _, state, *_ = _neighbour.unpack_from(body)
    if family != AF_INET or not state & _NUD_REACHABLE:
        return []
    at = _neighbour.size
    while at + _attribute.size <= len(body):
        length, kind = _attribute.unpack_from(body, at)
        if kind == _NDA_DST and len(body) >= at + _attribute.size + _address.size:
            return list(_address.unpack_from(body, at + _attribute.size))
        at += max(length, _attribute.size) + 3 & ~3
    return []


class Neighbours:
    """Tells `engine` of the neighbours that are there, from `start` to `stop`.

    Raises OSError where the kernel cannot be asked.
    """

    def __init__(self, engine: Masquerade) -> None:
        self._engine = engine
        self._socket = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE)
        self._socket.settimeout(PAUSE)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="neighbours", daemon=True)

    def start(self) -> None:
        """Look at the table from now on."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while not self._stopping.wait(PAUSE):
            try:
                self.look()
            except (OSError, MemoryError) as error:
                log.debug("cannot read the table of neighbours: %s", error)

    def look(self) -> None:
        """Tell the engine of the neighbours that are there now. Raises OSError."""
        for addresses in self._reachable():
            for at in range(0, len(addresses), STEP):
                self._engine.hosts_are_there(addresses[at : at + STEP], monotonic())
                sleep(BREATH)

    def _reachable(self) -> Iterator[Sequence[int]]:
        """Ask the kernel; yields the addresses of each of its messages as it comes."""
        self._socket.send(_ASK)
        more = True
        while more:
            addresses, more = reachable_in(self._socket.recv(_LARGEST))
            yield addresses
