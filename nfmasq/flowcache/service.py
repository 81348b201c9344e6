"""The flow cache of a running nfmasq: loaded, kept going, and off where it cannot be had.

Whatever is missing, nfmasq works without the cache, and says once why. What is in the way may come
and go while nfmasq runs: rules that do not know of the cache, or others that read whole marks.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address
from logging import INFO, WARNING

from pyroute2.netlink.exceptions import NetlinkError

from nfmasq.config.configuration import AUTO, DIRECT, OFF, ROUTED
from nfmasq.daemon.log import RateLimit
from nfmasq.engine import Masquerade
from nfmasq.engine.table.entry import CACHED
from nfmasq.flowcache.attachment import Attachment, Sides
from nfmasq.flowcache.flows import Flows
from nfmasq.flowcache.marks import route_that_reads_marks, rule_that_reads_marks
from nfmasq.flowcache.programs import Counts, Programs
from nfmasq.rules import Rule, interfaces_of, knows_flow_cache

log = logging.getLogger(__name__)
# A logger of its own, since a host can cause these lines.
log_of_hosts = logging.getLogger(f"{__name__}.hosts")
log_of_hosts.addFilter(RateLimit(limit=5, period=60))


PACE = 10_000
"""Packets a second that go on to the queue from a host that has crowded it."""


class KernelFlowCache:
    """Carries the lasting flows of `engine` in the kernel, from `start` to `close`.

    `wanted` is one of FLOW_CACHE. `mode` is ROUTED or DIRECT while packets are carried, else OFF,
    and `reason` says why, in words that follow "flow cache off: ".
    """

    def __init__(self, engine: Masquerade, wanted: str, queue: int, size: int) -> None:
        self.mode = OFF
        self.reason = "--flow-cache off"
        self._engine = engine
        self._wanted = wanted
        self._kind = DIRECT if wanted == DIRECT else ROUTED
        self._programs: Programs | None = None
        self._said: str | None = None
        self._rules: Sequence[Rule] = ()
        self._reader: str | None = None
        self._knows = False
        self._sides = Sides()
        self._queue, self._size = queue, size
        self._maddrs: set[int] = set()

    def start(self) -> None:
        """Load the programs, and remove what an nfmasq before has left; the queue is ours by now.

        Where that cannot be done, nfmasq works without a cache.
        """
        if self._wanted == OFF:
            return
        try:
            self._programs = Programs(self._size)
            self.add_maddrs(self._maddrs)
            self._attachment = Attachment(self._programs, self._kind, self._queue)
        except (OSError, NetlinkError) as error:
            self._close_programs()
            self._turn_off(_what_is_missing(error))
            return
        self._attachment.forget = self.forget
        self.reason = "no rules lead to the queue yet"
        self._engine.use_cache(Flows(self._programs, self._attachment.served))

    def follow(self, rules: Sequence[Rule]) -> None:
        """Serve the interfaces that our rules, which are loaded, lead packets from.

        `rules` are all rules there are; the same object where they are as they were.
        """
        if self._programs is None:
            return
        try:
            if rules is not self._rules:
                self._reader = rule_that_reads_marks(rules)
                ours = [rule for rule in rules if rule.our_chain]
                self._knows = knows_flow_cache(ours)
                sides = Sides(*map(tuple, interfaces_of(ours)))
                # Where rules are gone, the guard stays.
                self._sides = sides if all(sides) else self._sides
                self._rules = rules
            self._settle(self._sides, self._reader or route_that_reads_marks())
        except (OSError, NetlinkError) as error:
            self._turn_off(f"the interfaces cannot be served: {error}")

    def _settle(self, sides: Sides, reader: str | None) -> None:
        if not self._knows:
            self._turn_off("the rules do not know of it (nfmasq-rules up loads those that do)")
            return
        if reader and self._wanted == AUTO:
            self._turn_off(f"{reader} would see the mark of its packets")
            return
        self.mode = self._kind
        self._attachment.serve(sides)
        self._say(
            f"flow cache {self.mode}: inside {', '.join(sides.inside)}, "
            f"outside {', '.join(sides.outside)}"
        )
        if reader and self.mode == ROUTED:
            log.warning("%s sees the mark of the flow cache, bit 0x10000000", reader)

    def add_maddrs(self, maddrs: Iterable[int]) -> None:
        """Know these as masquerade addresses (host order), before any packet leaves from them."""
        self._maddrs.update(maddrs)
        if self._programs is not None:
            for maddr in self._maddrs:
                self._programs.add_maddr(maddr)

    def forget(self) -> None:
        """Have every flow leave the cache."""
        sessions = self._engine.sessions
        for ms in sessions.walk():
            if ms.flags & CACHED:
                with sessions.lock:
                    sessions.cached.withdrawn(ms)

    @property
    def sees_all(self) -> bool:
        """Say whether the programs see all packets that come in by the interfaces of the rules."""
        return self.mode != OFF and self._attachment.is_complete

    def hold(self, saddr: int) -> None:
        """Hold an inside host to `PACE`, where its packets can be held before they are queued.

        `saddr` is in host order.
        """
        if self._programs is None or self.mode == OFF or saddr < 0:
            return
        try:
            held = self._programs.hold(saddr, PACE)
        except OSError as error:
            log_of_hosts.error("%s", error)
            return
        if held:
            log_of_hosts.warning(
                "%s sends more than can be handled: held to %d packets a second",
                IPv4Address(saddr),
                PACE,
            )

    def take_end(self, packet: bytes) -> bytes:
        """Return what the datagram that begins with `packet` ends with (`Programs.take_end`)."""
        return self._programs.take_end(packet) if self._programs else b""

    def counts(self) -> Counts:
        """Return what has been done in the kernel so far."""
        return self._programs.counts() if self._programs else Counts()

    def close(self) -> None:
        """Detach everything; every packet takes the way to the queue again."""
        if self._programs is not None:
            self._attachment.close()
            self._engine.use_cache(None)
            self._close_programs()
            self.mode = OFF

    def _close_programs(self) -> None:
        if self._programs is not None:
            self._programs.close()
            self._programs = None

    def _turn_off(self, reason: str) -> None:
        self.mode, self.reason = OFF, reason
        if self._programs is not None:
            self._attachment.serve(self._sides, carry=False)
        self._say(f"flow cache off: {reason}")

    def _say(self, line: str) -> None:
        """Log a line, unless it was the last to be logged; loudly where it was to be on."""
        if line != self._said:
            log.log(WARNING if self.mode == OFF and self._wanted != AUTO else INFO, "%s", line)
            self._said = line


def _what_is_missing(error: Exception) -> str:
    """Say in words that a person can use why the programs cannot be had."""
    number = getattr(error, "errno", None)
    if number in (errno.EPERM, errno.EACCES):
        return "the kernel refuses its programs: give CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"
    if number is None and "libbpf" in str(error):
        return "libbpf.so.1 is not installed (Debian and Ubuntu: apt install libbpf1)"
    if number is None:
        return str(error)
    return f"this kernel does not load its programs: {os.strerror(number)}"
