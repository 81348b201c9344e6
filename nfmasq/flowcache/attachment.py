"""The programs attached to interfaces, as interfaces come and go.

Theory of operation. A program stands at an interface under a handle, which is ours by the number of
the queue. So whatever an nfmasq before has left there is found, and replaced at one stroke or
removed. Everything is done by one step, `settle`: it compares what is attached with what should be,
and mends the difference. A thread takes the step again after each announcement of the kernel about
interfaces and their programs: an interface that comes later is served, and a program that somebody
else has removed comes back.

What marks packets goes first, and what rewrites them as they leave goes last. Between the two is a
moment in which the packets that were marked leave. Where no flows are to be carried, a program that
only guards stands where packets leave.

An interface keeps its place for programs as long as it is on a side: to make a place, or to take it
away, the kernel stops the interface for a moment, and loses packets.

An interface can be served where its packets have Ethernet headers, or nothing, before the IP
header.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Set
from typing import NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from nfmasq.config.configuration import DIRECT
from nfmasq.daemon.announcements import INTERFACES, Announcements
from nfmasq.daemon.log import RateLimit
from nfmasq.flowcache.libbpf import EGRESS, INGRESS
from nfmasq.flowcache.programs import ETHERNET, INSIDE, OUTSIDE, Programs
from nfmasq.rules import overlap

log = logging.getLogger(__name__)
log.addFilter(RateLimit(limit=10, period=60))

PRIORITY = 0x6E66
"""The priority of our programs among others at an interface."""

_HANDLE = 0x6E66_0000  # and the number of the queue

_ETHERNET = {1, 772}
"""Kinds of interfaces with Ethernet headers: ARPHRD_ETHER, _LOOPBACK of linux/if_arp.h."""

_BARE = {0xFFFE, 512, 519, 768}
"""Kinds without headers: ARPHRD_NONE (WireGuard, tun), _PPP, _RAWIP, _TUNNEL."""

_INGRESS_PARENT, _EGRESS_PARENT = 0xFFFFFFF2, 0xFFFFFFF3  # of a clsact; linux/pkt_sched.h
_LEAVING, _GUARD = "leaving", "guard"
"""What stands where packets leave: what rewrites packets and guards, or what only guards."""
_GATHER_SECONDS = 0.05
_LEAVING_SECONDS = 0.1


class Place(NamedTuple):
    """Where a program stands: the index of an interface, and INGRESS or EGRESS."""

    interface: int
    point: int


class Sides(NamedTuple):
    """The interfaces' names, or patterns of names, on both sides, as rules have them (`ppp+`)."""

    inside: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()

    def of(self, name: str) -> int:
        """Return the side that an interface is on, INSIDE or OUTSIDE; 0: on neither."""
        for side, names in ((INSIDE, self.inside), (OUTSIDE, self.outside)):
            if any(overlap(name, pattern) for pattern in names):
                return side
        return 0


def can_serve(kind: object, mode: str) -> bool:
    """Say whether packets of an interface can be carried in this mode, ROUTED or DIRECT.

    `kind` is the interface's ARPHRD_ number of linux/if_arp.h.
    """
    return kind in _ETHERNET or (mode != DIRECT and kind in _BARE)


class Attachment:
    """Keeps the programs attached, from construction to `close`.

    `served` has the indices of the outside interfaces at which packets are rewritten as they leave:
    always the same set. `left_out` has the names of interfaces that cannot be served; `is_complete`
    says whether all others are, and there are no `left_out`. `forget` is
    called, and waited for, before packets are rewritten no more at an outside interface: no flow
    may be known after it.
    """

    def __init__(self, programs: Programs, mode: str, queue: int) -> None:
        self.served: set[int] = set()
        self.left_out: tuple[str, ...] = ()
        self.is_complete = False
        self.forget: Callable[[], None] = lambda: None
        self._programs, self._libbpf = programs, programs.libbpf
        self._mode = mode
        self._handle = _HANDLE | queue
        self._sides = Sides()
        self._carries = True
        self._known: set[int] = set()
        self._attached: dict[Place, tuple[str, int]] = {}
        self._made: set[int] = set()
        self._one_at_a_time = threading.Lock()
        self._changes = Announcements(INTERFACES)
        with IPRoute() as kernel:
            for link in kernel.get_links():
                self._remove_left(kernel, link["index"])
        self._thread = threading.Thread(target=self._follow, name="interfaces", daemon=True)
        self._thread.start()

    def serve(self, sides: Sides, carry: bool = True) -> None:
        """Serve these interfaces from now on, and no others; without `carry`, only guard them."""
        if (sides, carry) != (self._sides, self._carries):
            self._settle(sides, carry)

    def close(self) -> None:
        """Detach all programs, and stop following the interfaces."""
        self._changes.end()
        self._thread.join()
        self.serve(Sides())
        self._changes.close()

    # -- one step --------------------------------------------------------------------

    def _settle(self, sides: Sides | None = None, carry: bool = True) -> None:
        """Serve other `sides` where they are given, or else see to those that are served."""
        with self._one_at_a_time, IPRoute() as kernel:
            if sides is None:
                sides, carry = self._sides, self._carries
            links = {link["index"]: link for link in kernel.get_links()}
            wanted = self._wanted(sides, carry, links)
            for gone in [place for place in self._attached if place.interface not in links]:
                del self._attached[gone]
                self.served.discard(gone.interface)
            for interface in self._known - links.keys():
                self._forget_interface(interface)
            self._detach_others(kernel, wanted)
            for interface in [each for each in self._known if not sides.of(_name(links[each]))]:
                self._take_place_away(kernel, interface)
                self._forget_interface(interface)
            for place in sorted(wanted, key=lambda place: -place.point):
                self._attach(place, wanted[place])
            self._sides, self._carries = sides, carry
            self.is_complete = not self.left_out and wanted.keys() == self._attached.keys()

    def _wanted(
        self, sides: Sides, carry: bool, links: Mapping[int, Mapping[str, object]]
    ) -> dict[Place, str]:
        """Return which program is to stand where."""
        wanted, left_out = {}, []
        for index, link in links.items():
            name = _name(link)
            side = sides.of(name)
            if not side:
                continue
            if not can_serve(link["ifi_type"], self._mode):
                left_out.append(name)
                continue
            is_ethernet = link["ifi_type"] in _ETHERNET
            self._programs.set_interface(index, side | (ETHERNET if is_ethernet else 0))
            self._known.add(index)
            kind = "ether" if is_ethernet else "bare"
            coming = "inside" if side == INSIDE else "outside"
            if carry:
                way = DIRECT if self._mode == DIRECT else kind
                wanted[Place(index, INGRESS)] = f"{coming}_{way}"
            if side == OUTSIDE:
                wanted[Place(index, EGRESS)] = f"{_LEAVING if carry else _GUARD}_{kind}"
        if set(left_out) - set(self.left_out):
            log.warning("the flow cache cannot serve %s: its packets go to the queue", left_out)
        self.left_out = tuple(left_out)
        return wanted

    def _attach(self, place: Place, program: str) -> None:
        libbpf, found = self._libbpf, self._attached.get(place)
        ours = {"handle": self._handle, "priority": PRIORITY}
        if found and found == (program, libbpf.attached(*place, **ours)):
            return
        try:
            made = libbpf.attach(*place, self._programs.program(program), **ours)
        except OSError as error:
            log.error("the flow cache cannot serve interface %d: %s", place.interface, error)
            if place.point == EGRESS:
                self._rewrites_no_more({place.interface})
            return
        if made:
            self._made.add(place.interface)
        self._attached[place] = program, libbpf.attached(*place, **ours) or 0
        if program.startswith(_LEAVING):
            self.served.add(place.interface)

    def _detach_others(self, kernel: IPRoute, wanted: Mapping[Place, str]) -> None:
        """Detach what is not wanted, and see to it that guards can take the other places."""
        places = [place for place in self._attached if place not in wanted]
        leaving = [place for place in places if place.point == EGRESS]
        for place in places:
            if place not in leaving:
                self._detach(place)
        to_guard = {place.interface for place in wanted if wanted[place].startswith(_GUARD)}
        if leaving or to_guard & self.served:
            self._rewrites_no_more({place.interface for place in leaving} | to_guard)
            time.sleep(_LEAVING_SECONDS)
        for place in leaving:
            self._detach(place)

    def _take_place_away(self, kernel: IPRoute, interface: int) -> None:
        if interface in self._made and not _has_programs(kernel, interface):
            self._libbpf.take_place_away(interface)

    def _forget_interface(self, interface: int) -> None:
        self._programs.set_interface(interface, 0)
        self._known.discard(interface)
        self._made.discard(interface)

    def _rewrites_no_more(self, interfaces: Set[int]) -> None:
        self.served -= interfaces
        self.forget()

    def _detach(self, place: Place) -> None:
        self._libbpf.detach(*place, handle=self._handle, priority=PRIORITY)
        del self._attached[place]

    def _remove_left(self, kernel: IPRoute, interface: int) -> None:
        """Remove what an nfmasq that was killed has left at an interface."""
        ours = {"handle": self._handle, "priority": PRIORITY}
        found = [self._libbpf.detach(interface, point, **ours) for point in (INGRESS, EGRESS)]
        if any(found):
            log.info("the flow cache of a former nfmasq was found, and is removed")
            if not _has_programs(kernel, interface):
                self._libbpf.take_place_away(interface)

    # -- following -------------------------------------------------------------------

    def _follow(self) -> None:
        while self._changes.wait(_GATHER_SECONDS):
            try:
                self._settle()
            except Exception as error:  # whatever it is, the next change may find it gone
                log.error("the flow cache cannot follow the interfaces: %s", error)


def _name(link: Mapping[str, object]) -> str:
    return str(link.get("ifname"))


def _has_programs(kernel: IPRoute, interface: int) -> bool:
    """Say whether anything is attached to an interface; true where that cannot be seen."""
    try:
        return any(
            kernel.get_filters(index=interface, parent=parent)
            for parent in (_INGRESS_PARENT, _EGRESS_PARENT)
        )
    except NetlinkError:
        return True
