"""Which flows a flow cache carries, and what is known here of flows that it carries.

Theory of operation. A flow cache rewrites the packets of flows it is given, elsewhere and faster:
in the kernel (`nfmasq/flowcache/`), or in a dictionary of a test. Its packets do not come here. But
everything is decided here: which flows it is given, and when it has to give them back.

A flow is entered when it has shown that it lasts, since to enter a flow costs more than to rewrite
some packets. Each direction is entered by itself, after every `after` packets that came here in
this direction. Only an established TCP connection, or a UDP session that was answered, can be
entered, and only if its packets need nothing but a rewrite. The fast path notes such a flow in
`lasting`. Whoever hands the packets over says by which interface the packet leaves (`lasts`), and
has the flow entered (`enter`) when all packets that came before are on their way: packets that the
cache carries would overtake them.

A flow leaves the cache before anything happens to its entry: before it ends, moves, gets a helper,
another server or another state. The gate tells that (`watch.py`, `withdrawn`). What the cache has
counted meanwhile is added to the entry then. Until then it is asked for, when somebody wants to
know: a list, or the timer of the entry, or a segment that has to fit the newest numbers
(`table/numbers.py`). So the entry of a flow that is in use in the cache does not
expire, and the entry of a silent flow expires at its time.

The cache holds a reference to each entry whose flow it carries.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple, Protocol

from nfmasq.engine.table.entry import (
    CACHED,
    CACHED_IN,
    CACHED_OUT,
    HASHED,
    NO_REPLY,
    OPEN_ENDED,
    OWN,
    UNCONFIRMED,
    IpMasq,
)
from nfmasq.engine.table.keys import session_key
from nfmasq.engine.table.states import ESTABLISHED, STATE_UDP
from nfmasq.engine.table.tables import Tables
from nfmasq.engine.watch import Watcher
from nfmasq.engine.wire.protocols import TCP, UDP


class Usage(NamedTuple):
    """What the cache has done for an entry's flow since the flow was entered.

    Times are those of the newest packets, in seconds on the packets' clock; 0: there was none.
    `told_out` and `told_in` are ACK number and window (not scaled) of TCP's newest segments; None
    where the cache does not carry the direction, and over UDP.
    """

    packets_out: int = 0
    bytes_out: int = 0
    last_out: float = 0.0
    packets_in: int = 0
    bytes_in: int = 0
    last_in: float = 0.0
    told_out: tuple[int, int] | None = None
    told_in: tuple[int, int] | None = None


UNUSED = Usage()


class FlowCache(Protocol):
    """What the engine asks of a flow cache. It is called with the lock held, and raises nothing.

    Which directions of an entry's flow are in the cache, the flags of the entry say.
    """

    def put(self, ms: IpMasq, outward: bool, interface: int) -> bool:
        """Carry one direction of a flow from now on; False where that cannot be.

        `interface` is the index of the interface by which the packets leave, where they go out. A
        direction that is carried already is put anew where it is out of date.
        """

    def drop(self, ms: IpMasq) -> Usage:
        """Carry a flow no longer, from this moment on; returns its last usage."""

    def usage(self, ms: IpMasq) -> Usage:
        """Return what has been done for a flow that is carried."""


class CachedFlows(Watcher):
    """Enters flows into a cache, withdraws them, and knows what has become of them meanwhile.

    `lasting` has the flow of the packet in hand, where it may be entered: its entry, and whether
    the packet goes out. `due` has the flows to enter. Both are always the same lists. `flows` is
    how many entries have their flow in the cache. While it `is_paused` no flow is entered.
    """

    def __init__(self, tables: Tables) -> None:
        self.cache: FlowCache | None = None
        self.lasting: list[tuple[IpMasq, bool]] = []
        self.due: list[tuple[IpMasq, bool, int]] = []
        self.after = 16
        self.flows = 0
        self.entered = 0
        self.not_taken = 0
        self.is_paused = False
        self._tables = tables
        self._inbound_refresh = True

    def use(self, cache: FlowCache | None) -> None:
        """Use a cache from now on, in which nothing may be yet; all flows leave the former cache.

        The caller holds the lock.
        """
        self._withdraw_all()
        self.cache = cache
        self.lasting.clear()
        self.due.clear()

    @property
    def inbound_refresh(self) -> bool:
        """Whether a packet from the outside restarts its entry's timer.

        When that changes all flows leave the cache: packets that came before count as before.
        """
        return self._inbound_refresh

    @inbound_refresh.setter
    def inbound_refresh(self, refreshes: bool) -> None:
        if refreshes is not self._inbound_refresh:
            self._withdraw_all()
            self._inbound_refresh = refreshes

    def lasts(self, interface: int) -> None:
        """Note that the flow of the packet in hand is to be entered.

        `interface` is the index of the interface by which the packet leaves, if it goes out.
        """
        while self.lasting:
            self.due.append((*self.lasting.pop(), interface))

    def enter(self) -> None:
        """Enter the flows that are due; the caller holds the lock."""
        while self.due:
            ms, outward, interface = self.due.pop()
            if self.cache is None or self.is_paused or not self._can_be_cached(ms):
                continue
            if not self.cache.put(ms, outward, interface):
                self.not_taken += 1
                continue
            half = CACHED_OUT if outward else CACHED_IN
            if not ms.flags & half:
                if not ms.flags & CACHED:
                    ms.refcnt += 1
                    self.flows += 1
                    self.entered += 1
                ms.flags |= half

    def withdrawn(self, ms: IpMasq) -> None:
        """Take a flow out of the cache, and add what the cache has counted to its entry."""
        if self.cache is None or not ms.flags & CACHED:
            return
        usage = self.cache.drop(ms)
        ms.flags &= ~CACHED
        ms.refcnt -= 1
        self.flows -= 1
        ms.packets_out += usage.packets_out
        ms.bytes_out += usage.bytes_out
        ms.packets_in += usage.packets_in
        ms.bytes_in += usage.bytes_in
        _note_told(ms, usage)
        if ms.timer is not None:
            ms.timer = max(ms.timer, self.last_of(usage) + ms.timeout)

    def _withdraw_all(self) -> None:
        """Take all flows out of the cache, at one stroke; the caller holds the lock."""
        chains = self._tables.s_table
        for key in chains.heads if self.flows else ():
            for ms in chains.chain(key):
                self.withdrawn(ms)

    def usage(self, ms: IpMasq) -> Usage:
        """Return what the cache has done for an entry so far; the caller holds the lock."""
        if self.cache is None or not ms.flags & CACHED:
            return UNUSED
        return self.cache.usage(ms)

    def catch_up(self, ms: IpMasq) -> None:
        """Note on an entry what the newest segments in the cache say; the caller holds the lock."""
        _note_told(ms, self.usage(ms))

    def last_used(self, ms: IpMasq) -> float:
        """Return when the last packet passed in the cache that restarts the entry's timer.

        In seconds on the packets' clock; -inf where none has. The caller holds the lock.
        """
        return self.last_of(self.usage(ms))

    def last_of(self, usage: Usage) -> float:
        """Return when the last packet of a usage came that restarts a timer; -inf: none has."""
        last = max(usage.last_out, usage.last_in) if self._inbound_refresh else usage.last_out
        return last or -inf

    def _can_be_cached(self, ms: IpMasq) -> bool:
        """Say whether the packets of an entry need nothing but a rewrite, as long as it stays so.

        A UDP session by a forwarded port may begin anew with each of its packets.
        """
        if ms.flags & (HASHED | OPEN_ENDED | OWN | NO_REPLY | UNCONFIRMED) != HASHED:
            return False
        if ms.app is not None or ms.out_seq is not None or ms.in_seq is not None:
            return False
        if ms.protocol == UDP:
            steady = ms.state == STATE_UDP and ms.server is None
        else:
            both_acknowledge = ms.window_out is not None and ms.window_in is not None
            steady = ms.protocol == TCP and ms.state == ESTABLISHED and both_acknowledge
        return steady and self._is_the_newest(ms)

    def _is_the_newest(self, ms: IpMasq) -> bool:
        """Say whether packets in both directions find this entry, and no namesake of it."""
        tables, protocol = self._tables, ms.protocol
        out_key = session_key(ms.saddr, ms.daddr, ms.sport, ms.dport)
        in_key = session_key(ms.daddr, ms.maddr, ms.dport, ms.mport)
        return (
            tables.out_index[protocol].get(out_key) is ms
            and tables.in_index[protocol].get(in_key) is ms
        )


def _note_told(ms: IpMasq, usage: Usage) -> None:
    # The number of the newest segment itself is not known then, and nobody asks for it.
    if usage.told_out is not None:
        ms.numbers_out, ms.window_out = usage.told_out
    if usage.told_in is not None:
        ms.numbers_in, ms.window_in = usage.told_in
