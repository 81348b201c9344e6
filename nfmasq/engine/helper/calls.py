"""Calls of PPTP: PPP in GRE, by call IDs that both ends have told each other (RFC 2637).

Theory of operation. Each end gives a call an ID of its own, and a packet has only the ID of its
receiver (`gre.py`). So the two directions of a call are known by two numbers. Each direction has an
entry of its own, beside the control connection's entry, which controls both:

               sport     mport     dport
    inward     own ID    ours      PPP         what comes for our ID goes on for the host's own ID
    outward    PPP       PPP       peer's ID   what goes out for the peer's ID comes from us

Our ID is an ID that no other call with the same outside host has, so inside hosts may have picked
the same ID. The outside host's IDs stay: the outside host sees the calls of all inside hosts as
calls of one host, and gives each call an ID of its own. (If it does not, the later call has no
outward entry.)

The entries end with the call or with its control connection. Each packet of the control connection,
which is never silent for more than a minute, refreshes them. So a control connection has a few
calls at most, and no packet has much to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import SystemRandom

from nfmasq.engine.helper.powers import Powers
from nfmasq.engine.table.endings import HELPER
from nfmasq.engine.table.entry import HASHED, NO_REPLY, IpMasq
from nfmasq.engine.table.keys import key_of, session_key
from nfmasq.engine.wire.gre import GRE, PPP
from nfmasq.engine.wire.header import Header

MOST_BEGUN = 8
"""The most calls of one control connection that may be unanswered at a time."""

MOST_CALLS = 64
"""The most calls of one control connection at a time; of more, none gets an ID."""

NEIGHBOURS, DRAWS = 16, 64
"""How many IDs are looked at to find a free ID: the host's own ID and the IDs after it, and then
IDs drawn at random. Where half of all IDs are taken, the search is in vain once in 2^64 times."""

_random = SystemRandom()


class Calls:
    """Holds the calls of one control connection, by the inside host's own IDs."""

    def __init__(self, control: IpMasq, powers: Powers) -> None:
        self._control = control
        self._powers = powers
        self._inward: dict[int, IpMasq] = {}
        self._outward: dict[int, IpMasq] = {}

    def begin(self, own: int) -> int:
        """Let the packets of a call in; return our ID for the call, 0 where no ID can be had.

        A call that is begun again before it is connected keeps our ID. No call is begun where there
        are MOST_CALLS.
        """
        self._forget_ended()
        if own in self._inward and own not in self._outward:
            return self._inward[own].mport
        self.end(own)
        unanswered = [begun for begun in self._inward if begun not in self._outward]
        if len(unanswered) >= MOST_BEGUN:
            self.end(unanswered[0])
        ours = self._free(own) if len(self._inward) < MOST_CALLS else 0
        inward = self._entry(ours, own, PPP, NO_REPLY) if ours else None
        if inward is None:
            return 0
        self._inward[own] = inward
        return ours

    def connect(self, own: int, peers: int) -> None:
        """Let the packets of a call out, to the peer's ID, if the call was begun."""
        self._forget_ended()
        if own not in self._inward:
            return
        if own in self._outward:
            self._powers.remove(self._outward.pop(own), HELPER)
        outward = self._entry(PPP, PPP, peers, 0)
        if outward is not None:
            self._outward[own] = outward

    def end(self, own: int) -> None:
        """End a call: let none of its packets through any more."""
        for entries in (self._inward, self._outward):
            if own in entries:
                self._powers.remove(entries.pop(own), HELPER)

    def end_all(self) -> None:
        """End all calls."""
        for own in list(self._inward):
            self.end(own)

    def refresh(self) -> None:
        """Start the timers of the calls' entries anew."""
        self._forget_ended()
        for entries in (self._inward, self._outward):
            for ms in entries.values():
                self._powers.ip_masq_refresh(ms, self._powers.now)

    def ours(self, own: int) -> int | None:
        """Return our ID for a call, or None."""
        ms = self._inward.get(own)
        return None if ms is None else ms.mport

    def own(self, ours: int) -> int | None:
        """Return the inside host's own ID for a call, by our ID, or None."""
        return next((own for own, ms in self._inward.items() if ms.mport == ours), None)

    def own_by_peers(self, peers: int) -> int | None:
        """Return the inside host's own ID for a connected call, by the peer's ID, or None."""
        return next((own for own, ms in self._outward.items() if ms.dport == peers), None)

    def _free(self, own: int) -> int:
        """Return an ID that no call with the outside host has, the host's own at best; or 0."""
        daddr, maddr = self._control.daddr, self._control.maddr
        index = self._powers.tables.in_index[GRE]
        for ours in _candidates(own):
            if ours not in (0, PPP) and session_key(daddr, maddr, PPP, ours) not in index:
                return ours
        return 0

    def _entry(self, mport: int, sport: int, dport: int, flags: int) -> IpMasq | None:
        """Make an entry for one direction of a call; None where its packets have an entry already.

        The entry that is there belongs to a call of the same ID. (Or it belongs to the other
        direction, where the number PPP is the own ID of one call and the peer's ID of another.)
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
        """End each call of which an entry has ended, without us or to make room for another.

        A call that has lost one direction is over: a packet may not bring back half of the call.
        """
        for own, ms in list(self._inward.items()):
            outward = self._outward.get(own, ms)
            if not ms.flags & outward.flags & HASHED:
                self.end(own)


def _candidates(own: int) -> Iterator[int]:
    """Yield the IDs to look at for a call that has the ID `own` inside."""
    for neighbour in range(own, own + NEIGHBOURS):
        yield neighbour % 65536
    for _ in range(DRAWS):
        yield _random.randrange(65536)


def without_unknown_call(
    header: Header, index: Mapping[int, Mapping[bytes, IpMasq]], by_address: bool
) -> Header | None:
    """Return the header of a packet, without its call where no helper knows of the call.

    `index` has the entries by protocol and key (`tables.key_of`). A packet of an unknown call goes
    by its addresses; None where nothing does.
    """
    if not header.is_of_call or key_of(header) in index[GRE]:
        return header
    return header.without_call() if by_address else None
