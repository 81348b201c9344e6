"""What helpers may have done to the table of entries: a handful of things.

`Sessions` (`engine/sessions.py`) has these powers. Helpers know this list alone, and so can be
read, and tested, without it.
"""

from __future__ import annotations

from typing import Protocol

from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.table.tables import Tables


class PortPairs(Protocol):
    """The choice of masquerade ports next to each other (`engine/port_choice.py`)."""

    def select_pair(self, protocol: int, ms: IpMasq, sport: int) -> int:
        """Return an even mport for a port of an entry's inside host, free with the next; or 0."""

    def may_select(self, protocol: int, ms: IpMasq, sport: int, mport: int) -> bool:
        """Say whether an mport may be chosen for a port of an entry's inside host."""


class Powers(Protocol):
    """What a helper may do. Addresses and ports are ints in host order; the lock is held."""

    @property
    def tables(self) -> Tables:
        """The tables, to look things up."""

    @property
    def choice(self) -> PortPairs:
        """The choice of masquerade ports."""

    @property
    def now(self) -> float:
        """The time of the packet in hand, in seconds."""

    def ip_masq_new(
        self,
        proto: int,
        maddr: int,
        mport: int,
        saddr: int,
        sport: int,
        daddr: int,
        dport: int,
        mflags: int,
    ) -> IpMasq | None:
        """Make an entry, with a reference for the caller; None where it cannot be had."""

    def ip_masq_put(self, ms: IpMasq) -> None:
        """Give a reference back, and start the entry's timer where it was the last."""

    def ip_masq_control(self, ms: IpMasq, control: IpMasq) -> bool:
        """Let one entry control another: it will not expire before that does."""

    def ip_masq_enter(self, ms: IpMasq, state: int, now: float) -> None:
        """Have an entry take on a state, and start its timer anew."""

    def ip_masq_refresh(self, ms: IpMasq, now: float) -> None:
        """Start an entry's timer anew."""

    def ip_masq_helped(self, ms: IpMasq) -> None:
        """Have it known that a helper was bound to an entry, or begins anew with it."""

    def remove(self, ms: IpMasq, reason: str) -> int:
        """End an entry and those it controls, for a reason of `endings.py`; returns how many."""
