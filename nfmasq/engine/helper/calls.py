"""Calls of PPTP: PPP in GRE, by call IDs that both ends have told each other (RFC 2637).

Theory of operation. Each end gives a call an ID of its own, and a packet has only that of its
receiver (`gre.py`). So the two directions of a call are known by two numbers, and are an
entry each, beside the control connection's, which controls both:

               sport     mport     dport
    inward     own ID    ours      PPP         what comes for our ID, goes on for the host's own
    outward    PPP       PPP       peer's ID   what goes out to the peer's ID comes from us

Our ID is one that no other call with the same outside host has, so inside hosts may have
picked the same. The outside host's IDs stay: it sees the calls of all inside hosts as those of one
and gives each another. (If it does not, the later call has no outward entry.)

The entries are let go with the call or its control connection; each packet of the latter, which
is never silent for more than a minute, refreshes them.
"""

from __future__ import annotations

from collections.abc import Mapping

from nfmasq.engine.helper.powers import Powers
from nfmasq.engine.table.endings import HELPER
from nfmasq.engine.table.entry import HASHED, NO_REPLY, IpMasq
from nfmasq.engine.table.tables import key_of, session_key
from nfmasq.engine.wire.gre import GRE, PPP
from nfmasq.engine.wire.header import Header

MOST_BEGUN = 8
"""Calls of one control connection that may be unanswered at a time."""

MOST_LOOK_UPS = 4096
"""IDs that are looked at to find one that is free."""


class Calls:
    """The calls of one control connection, by the inside host's own IDs."""

    def __init__(self, control: IpMasq, powers: Powers) -> None:
        self._control = control
        self._powers = powers
        self._inward: dict[int, IpMasq] = {}
        self._outward: dict[int, IpMasq] = {}

    def begin(self, own: int) -> int:
        """Let a call's packets in; our ID for it, 0 where there is none to be had.

        Begun again before it is connected, it has the same.
        """
        self._forget_ended()
        if own in self._inward and own not in self._outward:
            return self._inward[own].mport
        self.end(own)
        unanswered = [begun for begun in self._inward if begun not in self._outward]
        if len(unanswered) >= MOST_BEGUN:
            self.end(unanswered[0])
        ours = self._free(own)
        inward = self._entry(ours, own, PPP, NO_REPLY) if ours else None
        if inward is None:
            return 0
        self._inward[own] = inward
        return ours

    def connect(self, own: int, peers: int) -> None:
        """Let the packets of a call out, to the peer's ID, where it was begun."""
        self._forget_ended()
        if own not in self._inward:
            return
        if own in self._outward:
            self._powers.remove(self._outward.pop(own), HELPER)
        outward = self._entry(PPP, PPP, peers, 0)
        if outward is not None:
            self._outward[own] = outward

    def end(self, own: int) -> None:
        """Let nothing of a call through any more."""
        for entries in (self._inward, self._outward):
            if own in entries:
                self._powers.remove(entries.pop(own), HELPER)

    def end_all(self) -> None:
        """End all calls."""
        for own in list(self._inward):
            self.end(own)

    def refresh(self) -> None:
        """Start the timers of the calls' entries again."""
        self._forget_ended()
        for entries in (self._inward, self._outward):
            for ms in entries.values():
                self._powers.ip_masq_refresh(ms, self._powers.now)

    def ours(self, own: int) -> int | None:
        """Our ID for a call."""
        ms = self._inward.get(own)
        return None if ms is None else ms.mport

    def own(self, ours: int) -> int | None:
        """The inside host's own ID for a call, by ours."""
        return next((own for own, ms in self._inward.items() if ms.mport == ours), None)

    def own_by_peers(self, peers: int) -> int | None:
        """The inside host's own ID for a call that is connected, by the peer's."""
        return next((own for own, ms in self._outward.items() if ms.dport == peers), None)

    def _free(self, own: int) -> int:
        """The host's own ID, or the next that no call with the same outside host has; or 0."""
        daddr, maddr = self._control.daddr, self._control.maddr
        index = self._powers.tables.in_index[GRE]
        for candidate in range(own, own + MOST_LOOK_UPS):
            ours = candidate % 65536
            if ours not in (0, PPP) and session_key(daddr, maddr, PPP, ours) not in index:
                return ours
        return 0

    def _entry(self, mport: int, sport: int, dport: int, flags: int) -> IpMasq | None:
        """None where there is an entry for the same packets already.

        That is one of a call of the same ID. (Or it is the other direction's, where one ID is the
        number PPP, and the other end's ID of another call as well.)
        """
        control, powers = self._control, self._powers
        out_key = session_key(control.saddr, control.daddr, sport, dport)
        if out_key in powers.tables.out_index[GRE]:
            return None
        ms = powers.ip_masq_new(
            GRE, control.maddr, mport, control.saddr, sport, control.daddr, dport, flags
        )
        if ms is not None:
            powers.ip_masq_control(ms, control)
            powers.ip_masq_put(ms)
        return ms

    def _forget_ended(self) -> None:
        """Entries may have been ended without us, or have made room for others.

        A call of which one way is gone is gone: a packet may not bring back half of it.
        """
        for own, ms in list(self._inward.items()):
            outward = self._outward.get(own, ms)
            if not ms.flags & outward.flags & HASHED:
                self.end(own)


def without_unknown_call(
    header: Header, index: Mapping[int, Mapping[bytes, IpMasq]], by_address: bool
) -> Header | None:
    """Return the header of a packet, without its call where no helper knows of that.

    `index` has the entries by protocol and key (`tables.key_of`). Such a packet goes by its
    addresses then; None where nothing does.
    """
    if not header.is_of_call or key_of(header) in index[GRE]:
        return header
    return header.without_call() if by_address else None
