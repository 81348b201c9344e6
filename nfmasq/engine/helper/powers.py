"""What helpers may do to the table of entries: a handful of things.

`Sessions` (`engine/sessions.py`) has these powers. Helpers know only this list, and so they can be
read and tested without `Sessions`.
"""

from __future__ import annotations

from typing import Protocol

from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.table.tables import Tables


class PortPairs(Protocol):
    """Chooses masquerade ports next to each other (`engine/port_choice.py`)."""

    def select_pair(self, protocol: int, ms: IpMasq, sport: int) -> int:
        """Return an even mport for a port of an entry's inside host, or 0.

        The next mport is free, too.
        """

    def may_select(self, protocol: int, ms: IpMasq, sport: int, mport: int) -> bool:
        """Say whether an mport may be chosen for a port of an entry's inside host."""


class Powers(Protocol):
    """What a helper may do. Addresses and ports are ints in host order. The lock is held."""

    @property
    def tables(self) -> Tables:
        """The tables, for look-ups."""

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
        """Give a reference back; when only the tables' are left, start the timer again."""

    def ip_masq_control(self, ms: IpMasq, control: IpMasq) -> bool:
        """Let `control` control `ms`: `control` will not expire before `ms` does."""

    def ip_masq_enter(self, ms: IpMasq, state: int, now: float) -> None:
        """Put an entry in a state, and start its timer anew."""

    def ip_masq_refresh(self, ms: IpMasq, now: float) -> None:
        """Start an entry's timer anew."""

    def ip_masq_keep(self, ms: IpMasq, until: float) -> None:
        """Have an entry live until a time at least, packets or not; a time that is past: no more.

        The time is in seconds.
        """

    def ip_masq_helped(self, ms: IpMasq) -> None:
        """Tell the watchers that a helper was bound to an entry, or begins anew with it."""

    def remove(self, ms: IpMasq, reason: str) -> int:
        """End an entry and the entries it controls; returns how many ended.

        `reason` is one of `table/endings.py`.
        """
