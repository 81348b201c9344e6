"""The flow cache of a running nfmasq: loaded, kept going, and off where it cannot be had.

Whatever is missing, nfmasq works without the cache, and says once why. What is in the way may come
and go while nfmasq runs: rules that do not know of the cache, or others that read whole marks.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable

from nfmasq.config.configuration import AUTO, DIRECT, OFF, ROUTED
from nfmasq.engine import Masquerade
from nfmasq.engine.table.entry import CACHED
from nfmasq.flowcache.attachment import Attachment, Sides
from nfmasq.flowcache.flows import Flows
from nfmasq.flowcache.marks import reader_of_marks
from nfmasq.flowcache.programs import Counts, Programs
from nfmasq.rules import Rule, interfaces_of, knows_flow_cache

log = logging.getLogger(__name__)


class FlowCache:
    """Carries the lasting flows of `engine` in the kernel, from construction to `close`.

    `wanted` is one of FLOW_CACHE. `mode` is ROUTED or DIRECT while packets are carried, else OFF,
    and `reason` says why, in words that follow "flow cache off: ".
    """

    def __init__(self, engine: Masquerade, wanted: str, queue: int, size: int) -> None:
        self.mode = OFF
        self.reason = "--flow-cache off"
        self._engine = engine
        self._wanted = wanted
        self._programs: Programs | None = None
        self._said: str | None = None
        if wanted == OFF:
            return
        kind = DIRECT if wanted == DIRECT else ROUTED
        try:
            self._programs = Programs(size)
            self._attachment = Attachment(self._programs, kind, queue)
        except OSError as error:
            self._programs = None
            self._turn_off(_what_is_missing(error))
            return
        self._kind = kind
        self._attachment.forget = self.forget
        self.reason = "no rules lead to the queue yet"
        engine.use_cache(Flows(self._programs, self._attachment.served))

    def follow(self, rules: Iterable[Rule]) -> None:
        """Serve the interfaces that our rules, which are loaded, lead packets from."""
        if self._programs is None:
            return
        rules = list(rules)
        ours = [rule for rule in rules if rule.our_chain]
        sides = Sides(*map(tuple, interfaces_of(ours)))
        reader = reader_of_marks(rules)
        if not knows_flow_cache(ours):
            self._turn_off("the rules do not know of it (nfmasq-rules up loads those that do)")
        elif reader and self._wanted == AUTO:
            self._turn_off(f"{reader} would see the mark of its packets")
        else:
            self.mode = self._kind
            self._attachment.serve(sides)
            self._say(
                f"flow cache {self.mode}: inside {_names(sides.inside)}, "
                f"outside {_names(sides.outside)}"
            )
            if reader and self._kind == ROUTED:
                log.warning("%s sees the mark of the flow cache, bit 0x10000000", reader)

    def add_maddrs(self, maddrs: Iterable[int]) -> None:
        """Know these as masquerade addresses (host order), before any packet leaves from them."""
        if self._programs is not None:
            for maddr in maddrs:
                self._programs.add_maddr(maddr)

    def forget(self) -> None:
        """Have every flow leave the cache."""
        sessions = self._engine.sessions
        for ms in sessions.walk():
            if ms.flags & CACHED:
                with sessions.lock:
                    sessions.cached.withdrawn(ms)

    def counts(self) -> Counts:
        """Return what has been done in the kernel so far."""
        return self._programs.counts() if self._programs else Counts()

    def close(self) -> None:
        """Detach everything; every packet takes the way to the queue again."""
        if self._programs is not None:
            self._attachment.close()
            self._engine.use_cache(None)
            self._programs.close()
            self._programs = None
            self.mode = OFF

    def _turn_off(self, reason: str) -> None:
        self.mode, self.reason = OFF, reason
        if self._programs is not None:
            self._attachment.serve(Sides())
        self._say(f"flow cache off: {reason}")

    def _say(self, line: str) -> None:
        """Log a line, unless it was the last to be logged."""
        if line != self._said:
            log.info("%s", line)
            self._said = line


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def _what_is_missing(error: OSError) -> str:
    """Say in words that a person can use why the programs cannot be had."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return "not permitted to load its programs: give CAP_BPF and CAP_NET_ADMIN"
    if error.errno is None and "libbpf" in str(error):
        return "libbpf.so.1 is not installed (Debian and Ubuntu: apt install libbpf1)"
    if error.errno is None:
        return str(error)
    return f"this kernel does not load its programs: {error.strerror}"
