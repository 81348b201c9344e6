"""The hosts that the kernel knows to be there: they have answered ARP lately.

A host that speaks only UDP has no other way to show that it is there (`engine/table/limits.py`).
The kernel asks for a host's address by ARP when a packet goes to the host, and again when it has
not heard of the host for a while. A host that answers is REACHABLE for some tens of seconds. The
other states say less: a packet of ARP that anybody sends makes an entry that is STALE, and the
kernel asks only 5 seconds after it has sent to the host. So the kernel is told to ask at once,
where the host is STALE, and has sessions, and is not known to be there. Neighbours that other
programs manage are left alone.

Who is on the network of the hosts can answer ARP for them, as he can take their packets. So this
protects from those who forge addresses alone.

Once in `PAUSE` a thread has the kernel write out its table of neighbours. Of hosts behind a router
inside the table says nothing. The table is read here, and not by pyroute2: with 1,000 neighbours
that takes the interpreter 1.5 ms instead of 28, each second, in which packets wait.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from socket import AF_INET, AF_NETLINK, NETLINK_ROUTE, SOCK_RAW, socket
from struct import Struct
from time import monotonic, sleep
from typing import NamedTuple, TypeVar

from nfmasq.engine import Masquerade

log = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds between two looks at the table."""

STEP = 64
"""How many neighbours the engine is told of, or asked about, at a time, with its lock held."""

BREATH = 0.000_1
"""Seconds between two steps."""

MOST_ASKED = 64
"""How many hosts are asked for their addresses after one look at the table."""

ANSWER = 0.1
"""Seconds for the hosts that have been asked to answer."""

_RTM_NEWNEIGH, _RTM_GETNEIGH = 28, 30
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NUD_REACHABLE, _NUD_STALE, _NUD_DELAY, _NUD_PROBE = 0x02, 0x04, 0x08, 0x10
_NDA_DST = 1
_LARGEST = 65_536

_message = Struct("=IHHII")  # length, type, flags, number, sender
_neighbour = Struct("=BxxxiHBB")  # family, interface, state, flags, type
_attribute = Struct("=HH")  # length, type
_address = Struct("!I")
_error = Struct("=i")

_T = TypeVar("_T")

_ASK = _message.pack(
    _message.size + _neighbour.size, _RTM_GETNEIGH, _NLM_F_REQUEST | _NLM_F_DUMP, 0, 0
) + _neighbour.pack(AF_INET, 0, 0, 0, 0)


class Neighbour(NamedTuple):
    """A host as the kernel knows it: its address in host order, its interface, state and flags."""

    address: int
    interface: int
    state: int
    flags: int

    @property
    def is_reachable(self) -> bool:
        """Whether the host has answered ARP lately."""
        return self.state & _NUD_REACHABLE > 0

    @property
    def may_be_asked(self) -> bool:
        """Whether the kernel knows a hardware address for it, and has not heard of it lately."""
        return self.state & (_NUD_STALE | _NUD_DELAY) > 0 and not self.flags


def neighbours_in(messages: bytes) -> tuple[list[Neighbour], bool]:
    """Read what the kernel writes about its IPv4 neighbours.

    Returns the neighbours, and whether more follows.
    """
    neighbours: list[Neighbour] = []
    at = 0
    while at + _message.size <= len(messages):
        length, kind, *_ = _message.unpack_from(messages, at)
        if kind in (_NLMSG_DONE, _NLMSG_ERROR) or length < _message.size:
            return neighbours, False
        if kind == _RTM_NEWNEIGH:
            neighbours += _neighbour_in(messages[at + _message.size : at + length])
        at += length + 3 & ~3
    return neighbours, True


def _neighbour_in(body: bytes) -> list[Neighbour]:
    """Return the neighbour, in a list, that a message is about."""
    if len(body) < _neighbour.size:
        return []
    family, interface, state, flags, _ = _neighbour.unpack_from(body)
    if family != AF_INET:
        return []
    at = _neighbour.size
    while at + _attribute.size <= len(body):
        length, kind = _attribute.unpack_from(body, at)
        if kind == _NDA_DST and len(body) >= at + _attribute.size + _address.size:
            (address,) = _address.unpack_from(body, at + _attribute.size)
            return [Neighbour(address, interface, state, flags)]
        at += max(length, _attribute.size) + 3 & ~3
    return []


def _to_ask(neighbour: Neighbour) -> bytes:
    """Return the message that has the kernel ask a neighbour by ARP now."""
    body = _neighbour.pack(AF_INET, neighbour.interface, _NUD_PROBE, 0, 0)
    body += _attribute.pack(_attribute.size + _address.size, _NDA_DST)
    body += _address.pack(neighbour.address)
    flags = _NLM_F_REQUEST | _NLM_F_ACK
    return _message.pack(_message.size + len(body), _RTM_NEWNEIGH, flags, 0, 0) + body


def _netlink() -> socket:
    """Open a socket to the kernel's tables. Raises OSError."""
    opened = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE)
    opened.settimeout(PAUSE)
    return opened


def _steps(sequence: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Yield a few at a time, with a pause after each few: the engine's lock is held for them."""
    for at in range(0, len(sequence), STEP):
        yield sequence[at : at + STEP]
        sleep(BREATH)


class Neighbours:
    """Tells `engine` of the neighbours that are there, from `start` to `stop`.

    Raises OSError where the kernel cannot be asked.
    """

    def __init__(self, engine: Masquerade) -> None:
        self._engine = engine
        self._socket = _netlink()
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
                if self.look() and not self._stopping.wait(ANSWER):
                    self.look()
            except (OSError, MemoryError) as error:
                log.debug("cannot read the table of neighbours: %s", error)
                self._begin_anew()

    def _begin_anew(self) -> None:
        """Use another socket: what is still to come by this socket answers a former question."""
        with suppress(OSError):
            fresh = _netlink()
            self._socket.close()
            self._socket = fresh

    def look(self) -> bool:
        """Tell the engine of the neighbours that are there now, and have others asked.

        Returns whether any is asked: its answer may be there in ANSWER seconds. Raises OSError.
        """
        unheard: list[Neighbour] = []
        for neighbours in self._read():
            self._tell([each.address for each in neighbours if each.is_reachable])
            unheard += [each for each in neighbours if each.may_be_asked]
        unknown = [each for step in _steps(unheard) for each in self._unknown(step)]
        # At random, so that nobody keeps others from being asked.
        asked = random.sample(unknown, min(MOST_ASKED, len(unknown)))
        return sum(map(self._ask, asked)) > 0

    def _ask(self, neighbour: Neighbour) -> bool:
        """Have the kernel ask a neighbour; false where it cannot, or has heard of it."""
        self._socket.send(_to_ask(neighbour))
        answer = self._socket.recv(_LARGEST)
        return _error.unpack_from(answer, _message.size) == (0,)

    def _unknown(self, neighbours: Sequence[Neighbour]) -> list[Neighbour]:
        unknown = self._engine.hosts_unknown(each.address for each in neighbours)
        return [each for each in neighbours if each.address in unknown]

    def _tell(self, addresses: Sequence[int]) -> None:
        for step in _steps(addresses):
            self._engine.hosts_are_there(step, monotonic())

    def _read(self) -> Iterator[list[Neighbour]]:
        """Ask the kernel; yields the neighbours of each of its messages as it comes."""
        self._socket.send(_ASK)
        more = True
        while more:
            neighbours, more = neighbours_in(self._socket.recv(_LARGEST))
            yield neighbours
