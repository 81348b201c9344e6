"""What follows when the gateway's addresses change (DHCP, PPP): connections end.

Theory of operation. An interface that loses its address may get the same address again: a lease was
renewed late, or a line was down for a moment. Until then nothing is lost, and nothing is ended. But
once the interface has another address instead, and no interface of this machine has the old
address, no answer can come any more to packets that went out from the old address. The entries on
the old address are ended, and the inside ends of their TCP connections are told, so that programs
open new connections at once. An entry that was never answered stays, and moves to the new address
with its next packet.

Interfaces are known by name: a PPP interface comes back as another interface of the same name. A
thread of its own ends the entries, in steps as small as the sweeper's, while further changes are
followed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from queue import SimpleQueue
from time import monotonic

from nfmasq.daemon.pace import paced
from nfmasq.daemon.sweeper import PAUSE, STEP
from nfmasq.engine import Masquerade
from nfmasq.engine.wire.address import dotted

log = logging.getLogger(__name__)

WALK = 32
"""How many entries are looked at between two pauses."""


class Renumbering:
    """Keeps `engine` to the addresses that the gateway has, from construction to `stop`.

    `send_own` empties the engine's outbox, and never fails.
    """

    def __init__(self, engine: Masquerade, send_own: Callable[[], None]) -> None:
        self._engine = engine
        self._send_own = send_own
        self._addresses: Mapping[str, Sequence[int]] | None = None
        self._last_held: dict[str, Sequence[int]] = {}
        self._gone: SimpleQueue[int | None] = SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renumbering", daemon=True)
        self._thread.start()

    def follow(self, addresses: Mapping[str, Sequence[int]]) -> None:
        """Take `addresses` for all that the gateway has now.

        They are integers in host order, by the name of their interface; an interface without an
        address is left out.
        """
        if self._addresses is not None:
            _log_changes(self._addresses, addresses)
        self._addresses = addresses
        here = frozenset(chain.from_iterable(addresses.values()))
        self._engine.inbound.maddrs = here
        self._engine.outbound.beside = _beside(addresses)
        for name, held in addresses.items():
            for maddr in frozenset(self._last_held.get(name, ())) - here:
                self._gone.put(maddr)
            self._last_held[name] = held

    def stop(self) -> None:
        """End the thread; entries that are not ended yet stay."""
        self._stopping.set()
        self._gone.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (maddr := self._gone.get()) is not None:
            try:
                self._end_entries_on(maddr)
            except Exception as error:
                log.error(
                    "ending the entries on %s failed: %r",
                    dotted(maddr),
                    error,
                    exc_info=log.isEnabledFor(logging.DEBUG),
                )

    def _end_entries_on(self, maddr: int) -> None:
        def wait(seconds: float) -> bool:
            self._send_own()
            # The address may have come back while many entries were ended.
            return self._stopping.wait(seconds) or maddr in self._engine.inbound.maddrs

        ended = 0
        entries = paced(self._engine.sessions.walk(), WALK, PAUSE, wait)
        on_maddr = (ms for ms in entries if ms.maddr == maddr)
        for ms in paced(on_maddr, STEP, PAUSE, wait):
            ended += self._engine.masq_address_gone(ms, monotonic())
        self._send_own()
        log.info("%s is gone, and with it entries: %d", dotted(maddr), ended)


def _beside(addresses: Mapping[str, Sequence[int]]) -> dict[int, frozenset[int]]:
    """Return the addresses of all interfaces that have an address, by this address."""
    beside: dict[int, frozenset[int]] = {}
    for held in addresses.values():
        for address in held:
            beside[address] = beside.get(address, frozenset()).union(held)
    return beside


def _log_changes(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> None:
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            listed = ", ".join(dotted(address) for address in after.get(name, ()))
            log.info("%s has the addresses: %s", name, listed or "none")
