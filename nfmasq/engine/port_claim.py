"""Which session gives up its port to a new session, when no port is free and none is over.

A session that waits for its answer goes when it has waited in vain for PATIENCE, or when its host
holds far more ports than the host of the new session, unless only the host that holds them has
shown that it is there. An answered UDP session goes when it has been idle for longer than RFC 4787
protects it.

A host that has not shown that it is there (`table/limits.py`) gives up its ports sooner, since its
address may be forged. A session that waits for its answer goes at once, to any host that has shown
that it is there, or that holds less than half as many ports. So forged addresses share what is left
among each other, and a host that is new here gets a port for as long as it needs to show that it
is there. An answered UDP session goes where its host holds more than KEPT_ANSWERED ports, and more
than twice as many. Where its host holds fewer, it goes only to a host that has shown that it is
there, and has few ports itself.
"""

from __future__ import annotations

from collections.abc import Callable

from nfmasq.engine.port_choice import Ends, PortChoice
from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.table.limits import InsideHosts

FEW_PORTS = 64
"""A host that holds this many ports or fewer gives no port up to another host, unless PATIENCE is
over, or it has not shown that it is there."""

KEPT_ANSWERED = 8
"""A host that has not shown that it is there keeps this many ports of answered sessions from other
hosts that have not."""

PATIENCE = 10.0
"""Seconds without an answer, after which a session gives up its port when no port is left."""

PROTECTED = 120.0
"""Seconds without a packet for which an answered UDP session keeps its port, whatever happens (RFC
4787 REQ-5)."""


class PortClaim:
    """The claim of a new session of a protocol number for a port of `maddr`.

    `idle` tells for how many seconds an entry has had no packet. `held` is how many ports the host
    of the new session holds, and `is_genuine` whether it has shown that it is there.
    """

    def __init__(
        self,
        protocol: int,
        maddr: int,
        ends: Ends,
        choice: PortChoice,
        hosts: InsideHosts,
        idle: Callable[[IpMasq], float],
    ) -> None:
        saddr, _, *self._outside = ends
        self._protocol, self._maddr = protocol, maddr
        self._ports = choice.ports
        self._few_ports = len(choice.ports.ports) <= FEW_PORTS
        self._shared = choice.shares_ports(protocol)
        self._counts_entries = choice.mapping_shares_ports(protocol)
        self._hosts = hosts
        self._idle = idle
        self.held = held = self._held_by(saddr)
        self.is_genuine = hosts.is_genuine(saddr)
        self._fair = max(2 * held, FEW_PORTS)
        may_have_more = self.is_genuine and held <= FEW_PORTS
        self._most_unanswered = 0 if self.is_genuine else 2 * held
        self._most_answered = 0 if may_have_more else max(2 * held, KEPT_ANSWERED)

    @property
    def may_be_in_vain(self) -> bool:
        """Whether a host that holds more ports finds nothing where this host finds nothing."""
        return not self.is_genuine or self.held > FEW_PORTS

    def takes_unanswered(self, ms: IpMasq) -> bool:
        """Say whether a session that waits for its answer gives way."""
        if self._is_beyond(ms, self._most_unanswered) or self._is_unfair(ms):
            return True
        return not self._few_ports and self._idle(ms) > PATIENCE

    def takes_answered(self, ms: IpMasq) -> bool:
        """Say whether an answered UDP session gives way."""
        return self._is_beyond(ms, self._most_answered) or self._idle(ms) > PROTECTED

    def is_on_right_port(self, ms: IpMasq) -> bool:
        """Say whether a port of an entry may be given to sessions like the new session."""
        is_right = ms.protocol == self._protocol and ms.maddr == self._maddr
        return is_right and ms.mport in self._ports

    def may_share(self, ms: IpMasq) -> bool:
        """Say whether ports are shared, and an entry alone keeps the new session from its port."""
        return self._shared and [ms.daddr, ms.dport] == self._outside

    def rank(self, ms: IpMasq) -> tuple[bool, int]:
        """Rank the entries that may give way: the highest rank does."""
        return not self._hosts.is_genuine(ms.saddr), self._held_by(ms.saddr)

    def _is_unfair(self, ms: IpMasq) -> bool:
        """Say whether the host of an entry holds far more ports than the host of the new session.

        A host that may be forged has no claim to what a host has that is there.
        """
        is_equal = self.is_genuine or not self._hosts.is_genuine(ms.saddr)
        return is_equal and self._held_by(ms.saddr) > self._fair

    def _held_by(self, saddr: int) -> int:
        if self._counts_entries:
            return self._hosts.entries_of(saddr)
        return self._hosts.ports_of_protocol(self._protocol, saddr)

    def _is_beyond(self, ms: IpMasq, most: int) -> bool:
        """Say whether the host of an entry holds more than `most` ports and may be forged.

        Where there are but few ports, nobody's sessions go at once.
        """
        if self._few_ports or self._held_by(ms.saddr) <= most:
            return False
        return not self._hosts.is_genuine(ms.saddr)
