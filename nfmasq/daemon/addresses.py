"""The masquerade address of each outbound packet: given, or what the kernel's routing picks.

Theory of operation. The handler asks once a packet, so the common answer must cost one dictionary
look-up: `known` holds the interfaces that have one answer for every packet. The handler calls
`pick` only for an interface that is not in `known`. There are two sources:

* `GivenAddresses`, from --masquerade-address. A single address is the answer everywhere. Of several
  addresses, each inside host always gets the same address (the paired pooling of RFC 4787, REQ-2).
* `RoutedAddresses`, the default. As with the kernel's own masquerade, a packet gets an address of
  global scope that is on the interface by which the packet leaves. Where the interface has one
  address, this is the answer. Where it has several, the kernel is asked which address it prefers
  toward the destination, and its answers are remembered. Where it has none, there is no answer: an
  interface that has no DHCP lease yet must not borrow the address of another interface, which may
  be the inside interface.

A thread of `RoutedAddresses` listens to what the kernel announces about addresses, links and
routes. What an announcement says does not matter: after any announcement, also after announcements
were lost, the addresses are read anew and the remembered answers are forgotten. Announcements may
come in thousands (a routing daemon at work), so the thread gathers them for `_GATHER_SECONDS` after
each reading.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Address

from pyroute2 import IPRoute
from pyroute2.netlink import rtnl
from pyroute2.netlink.exceptions import NetlinkError

from nfmasq.daemon.log import RateLimit

log = logging.getLogger(__name__)
log.addFilter(RateLimit(limit=5, period=60))

MAX_ANSWERS = 65536
"""Destinations for which the kernel's answer is remembered."""

_ANNOUNCEMENTS = rtnl.RTMGRP_LINK | rtnl.RTMGRP_IPV4_IFADDR | rtnl.RTMGRP_IPV4_ROUTE
_RT_SCOPE_UNIVERSE = 0
_GATHER_SECONDS = 0.1
_LOOK_UP_SECONDS = 0.1  # how long `close` may have to wait for the thread

_SADDR = slice(12, 16)
_DADDR = slice(16, 20)


class GivenAddresses:
    """Picks from a `pool` of at least one address (integers, host order), for any interface."""

    def __init__(self, pool: Sequence[int]) -> None:
        self.known: dict[int, int] = {}
        self._pool = pool

    def pick(self, interface: int, packet: bytes) -> int:
        """Return the address (host order) that stands for the inside host of this packet."""
        if len(self._pool) == 1:
            self.known[interface] = self._pool[0]
        return self.pick_for_hairpin(packet)

    def pick_for_hairpin(self, packet: bytes) -> int:
        """Return what `pick` returns: an inside host has one address toward all other hosts."""
        return self._pool[int.from_bytes(packet[_SADDR], "big") % len(self._pool)]


class RoutedAddresses:
    """Follows the addresses on the outgoing interfaces, from construction to `close`.

    `on_change` is called with all addresses of global scope (integers, host order) by the name of
    their interface: in the constructor, and then from the thread that listens, each time that the
    addresses have changed. When a new address is picked for the first time, `on_change` knows it.

    Raises OSError or NetlinkError where the kernel does not tell its addresses.
    """

    def __init__(self, on_change: Callable[[Mapping[str, Sequence[int]]], None]) -> None:
        self.known: dict[int, int] = {}
        self._addresses: Mapping[int, tuple[int, ...]] = {}
        self._answers: dict[tuple[int, int], int | None] = {}
        self._on_change = on_change
        self._closing = threading.Event()
        # Listening begins before reading, so that no change falls between the two.
        self._announcements = _listen()
        self._kernel = IPRoute()
        addresses = _global_addresses()
        on_change(_by_name(addresses))
        self._take(addresses)
        self._thread = threading.Thread(target=self._follow, name="addresses", daemon=True)
        self._thread.start()

    def pick(self, interface: int, packet: bytes) -> int | None:
        """Return the address (host order) that the kernel prefers toward this packet's destination.

        None where there is none.
        """
        if len(self._addresses.get(interface, ())) < 2:
            # No address at all; or a single one by now, after the handler looked in `known`.
            return self.known.get(interface)
        # Held by a name of its own: if the addresses change meanwhile, the answer goes into the old
        # dictionary, which is not read any more.
        answers = self._answers
        destination = int.from_bytes(packet[_DADDR], "big")
        key = (interface, destination)
        if key not in answers:
            if len(answers) >= MAX_ANSWERS:
                answers.clear()
            answers[key] = self._ask(interface, destination)
        return answers[key]

    def pick_for_hairpin(self, packet: bytes) -> int:
        """Return this packet's destination (host order), an address of the gateway.

        Answers to it come back to the gateway.
        """
        return int.from_bytes(packet[_DADDR], "big")

    def close(self) -> None:
        """Stop following the addresses; to be called from the thread that called `pick`."""
        self._closing.set()
        self._thread.join()
        self._announcements.close()
        self._kernel.close()

    def _ask(self, interface: int, destination: int) -> int | None:
        try:
            (route,) = self._kernel.route("get", dst=str(IPv4Address(destination)), oif=interface)
        except NetlinkError as error:
            log.debug("the kernel has no route to %s: %s", IPv4Address(destination), error)
            return None
        preferred = route.get("prefsrc")
        return int(IPv4Address(preferred)) if preferred else None

    def _follow(self) -> None:
        stale = False
        while not self._closing.is_set():
            stale = self._announced() or stale
            if not stale:
                continue
            try:
                addresses = _global_addresses()
            except Exception as error:  # whatever it is, the next announcement may find it gone
                log.error("cannot read this machine's addresses: %s", error)
            else:
                stale = False
                if addresses != self._addresses:
                    self._on_change(_by_name(addresses))
                self._take(addresses)
            self._closing.wait(_GATHER_SECONDS)

    def _announced(self) -> bool:
        """Say whether anything was announced since the last call; waits a little for it."""
        self._announcements.settimeout(_LOOK_UP_SECONDS)
        announced = False
        while True:
            try:
                self._announcements.recv(1)
            except (BlockingIOError, TimeoutError):
                return announced
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            announced = True
            self._announcements.settimeout(0)

    def _take(self, addresses: Mapping[int, tuple[int, ...]]) -> None:
        """Answer by these addresses from now on, and forget the kernel's answers."""
        before, self._addresses = self._addresses, addresses
        self._answers = {}
        for interface in {**before, **addresses}:
            if len(addresses.get(interface, ())) == 1:
                self.known[interface] = addresses[interface][0]
            else:
                self.known.pop(interface, None)


def _listen() -> socket.socket:
    announcements = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    announcements.bind((0, _ANNOUNCEMENTS))
    return announcements


def _global_addresses() -> dict[int, tuple[int, ...]]:
    """Read the IPv4 addresses of global scope by interface index, as the kernel has them now."""
    addresses: dict[int, tuple[int, ...]] = {}
    with IPRoute() as kernel:
        for address in kernel.get_addr(family=socket.AF_INET, scope=_RT_SCOPE_UNIVERSE):
            interface = address["index"]
            local = int(IPv4Address(address.get("local")))
            addresses[interface] = (*addresses.get(interface, ()), local)
    return addresses


def _by_name(addresses: Mapping[int, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    named = {}
    for interface, held in addresses.items():
        with suppress(OSError):  # the interface is gone, which the kernel will announce
            named[socket.if_indextoname(interface)] = held
    return named
