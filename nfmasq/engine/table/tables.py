"""The two tables in which entries are found, and the counts of references to entries.

The m-table has a chain (a linked list) of entries for each (protocol, maddr, mport): the endpoint
to which the outside sends. The s-table has a chain for each (protocol, saddr, sport), the endpoint
from which the inside sends, on each masquerade address (`keys.mapping_key`). The newest entry is at
the head of its chain.

An endpoint may have thousands of sessions, so no look-up walks their chain: an index by all five
values leads straight to the entry. Entries whose five values are not all fixed (`OPEN_ENDED`)
cannot stand in an index, and are found by what is known of them (`open_ended.py`). A look-up turns
to these entries after the index: an entry that is wholly known goes before an open-ended entry.

In the design document the names of bare look-ups, whose caller holds the lock, begin with two
underscores; other look-ups take the lock themselves. Python gives two leading underscores another
meaning. So the names of bare look-ups end in `_unlocked` here, as in the C library's stdio.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any

from nfmasq.engine.table.entry import CACHED, HASHED, OPEN_ENDED, IpMasq
from nfmasq.engine.table.keys import (
    address_of,
    endpoint_key,
    masquerade_key,
    session_key,
    unserved_key,
)
from nfmasq.engine.table.newest import Newest
from nfmasq.engine.table.open_ended import OpenEnded
from nfmasq.engine.table.remains import Kept
from nfmasq.engine.wire.header import Header
from nfmasq.engine.wire.protocols import WITH_PORTS

TABLE_REFERENCES = 2
"""How many references an entry has that nobody but the tables holds."""


def is_in_use(ms: IpMasq) -> bool:
    """Say whether a packet, or whoever looked an entry up, holds the entry.

    Beside the tables' references that of a flow cache is not counted: whether its flow is in use is
    asked of the cache.
    """
    return ms.refcnt > TABLE_REFERENCES + (ms.flags & CACHED > 0)


LONG = 2048
"""With so many entries a chain gets an index by outside address, asked for or not. To make an index
of so many entries takes some milliseconds, in which no packet moves."""


class Chains:
    """Chains of entries by endpoint, linked through two fields of the entries themselves.

    `heads` are the newest entries, by the key of the endpoint (`endpoint_key`).

    To find the entries with one outside address (`newest_with`) a chain would have to be walked. So
    a chain that is asked for them gets an index by outside address, and keeps it until the chain is
    empty. A chain that becomes `LONG` gets the index unasked, before the chain is so long that
    making the index would be felt.
    """

    def __init__(self, link: str, back: str) -> None:
        self._link = link
        self._back = back
        self._begin()

    def _begin(self) -> None:
        self.heads: dict[int, IpMasq] = {}
        self._lengths: dict[int, int] = {}  # of chains that have two entries or more, and no index
        self._indexed: set[int] = set()
        self._peers: Newest[int] = Newest()  # by chain and outside address: `_with`

    def begin_anew(self) -> list[Kept]:
        """Forget all entries, at once; returns what had them."""
        former: list[Kept] = [*self.dictionaries(), self._indexed]
        self._begin()
        return former

    def insert(self, key: int, ms: IpMasq) -> None:
        """Put `ms` at the head of its chain."""
        head = self.heads.get(key)
        self.heads[key] = ms
        if head is None:
            return
        setattr(ms, self._link, head)
        setattr(head, self._back, ms)
        if key in self._indexed:
            self._peers.add(_with(key, ms.daddr), ms)
            return
        length = self._lengths[key] = self._lengths.get(key, 1) + 1
        if length >= LONG:
            self._index_peers(key)

    def remove(self, key: int, ms: IpMasq) -> bool:
        """Take `ms` out of its chain; returns whether the chain is empty then."""
        following: IpMasq | None = getattr(ms, self._link)
        before: IpMasq | None = getattr(ms, self._back)
        if following is None and before is None:
            del self.heads[key]
            if self._lengths.pop(key, None) is None and key in self._indexed:
                self._indexed.remove(key)
                self._peers.remove(_with(key, ms.daddr), ms)
            return True
        if key in self._indexed:
            self._peers.remove(_with(key, ms.daddr), ms)
        else:
            self._lengths[key] -= 1
        if following is not None:
            setattr(following, self._back, before)
            setattr(ms, self._link, None)
        if before is not None:
            setattr(before, self._link, following)
            setattr(ms, self._back, None)
        elif following is not None:
            self.heads[key] = following
        return False

    def chain(self, key: int) -> Iterator[IpMasq]:
        """Yield the entries under `key`, newest first."""
        ms = self.heads.get(key)
        while ms is not None:
            yield ms
            ms = getattr(ms, self._link)

    def newest_with(self, key: int, daddr: int) -> IpMasq | None:
        """Return the newest entry under `key` whose outside address is `daddr`, or None."""
        if key not in self.heads:
            return None
        if key not in self._indexed:
            self._index_peers(key)
        return self._peers.get(_with(key, daddr))

    def _index_peers(self, key: int) -> None:
        """Make the index of a chain, whose length is not counted any more."""
        self._indexed.add(key)
        self._lengths.pop(key, None)
        for ms in reversed(list(self.chain(key))):
            self._peers.add(_with(key, ms.daddr), ms)

    def dictionaries(self) -> Iterator[dict[Any, Any]]:
        """Yield what may become sparse (`memory.py`)."""
        yield from (self.heads, self._lengths, self._peers.piles)


def _with(key: int, daddr: int) -> int:
    """Make one key of a chain's key and an outside address."""
    return key << 32 | daddr


class Tables:
    """The m-table and the s-table.

    A port is taken just as long as the m-table has an entry under it. Its holder is the inside
    endpoint that took it. `port_taken` is called with the first entry that comes to stand under the
    (protocol, maddr, mport), `port_free` with the last entry that goes and the address of the
    port's holder. `hides` is called with an entry that an entry of the same values is about to hide
    from the packets.
    """

    def __init__(
        self,
        port_taken: Callable[[IpMasq], None],
        port_free: Callable[[IpMasq, int], None],
        hides: Callable[[IpMasq], None] = lambda ms: None,
    ) -> None:
        self._port_taken = port_taken
        self._port_free = port_free
        self._hides = hides
        self.m_table = Chains("m_link", "m_back")
        self.s_table = Chains("s_link", "s_back")
        # By protocol number. An index is made when it is first asked for, and stays.
        self.in_index: dict[int, dict[bytes, IpMasq]] = defaultdict(dict)
        self.out_index: dict[int, dict[bytes, IpMasq]] = defaultdict(dict)
        self._begin()

    def _begin(self) -> None:
        self.open_ended = OpenEnded()
        # By key of a masquerade endpoint in use: the key of the inside endpoint that took it.
        self.holders: dict[int, int] = {}
        self._in_namesakes: Newest[tuple[int, bytes]] = Newest()
        self._out_namesakes: Newest[tuple[int, bytes]] = Newest()

    def begin_anew(self) -> list[Kept]:
        """Forget all entries, at once; returns what had them.

        Each index is another dictionary then.
        """
        former = [*self.m_table.begin_anew(), *self.s_table.begin_anew(), self.holders]
        former += self.open_ended.dictionaries()
        former += (self._in_namesakes.piles, self._out_namesakes.piles)
        for index in (self.in_index, self.out_index):
            former += index.values()
            index.update({protocol: {} for protocol in index})
        self._begin()
        return former

    # -- linking ---------------------------------------------------------------

    def ip_masq_hash(self, ms: IpMasq) -> int:
        """Link `ms` into both tables, and count a reference for each.

        Returns 1, or 0 where it is in the tables already.
        """
        if ms.flags & HASHED:
            return 0
        # As `masquerade_key` and `mapping_key`, without the time for the calls.
        maddr, protocol = ms.maddr, ms.protocol << 48
        m_key = protocol | maddr << 16 | ms.mport
        s_key = (protocol | ms.saddr << 16 | ms.sport) << 33 | maddr << 1 | (ms.server is not None)
        if ms.flags & OPEN_ENDED:
            self.open_ended.add(ms)
        else:
            self.m_table.insert(m_key, ms)
            self.s_table.insert(s_key, ms)
            self._index(ms)
        if m_key not in self.holders:
            self.holders[m_key] = s_key >> 33
            self._port_taken(ms)
        ms.refcnt += TABLE_REFERENCES
        ms.flags |= HASHED
        return 1

    def ip_masq_unhash(self, ms: IpMasq) -> int:
        """Unlink `ms` from both tables, and give their references back.

        Returns 1, or 0 where it is in neither table.
        """
        if not ms.flags & HASHED:
            return 0
        # As `masquerade_key` and `mapping_key`, without the time for the calls.
        maddr, protocol = ms.maddr, ms.protocol << 48
        m_key = protocol | maddr << 16 | ms.mport
        s_key = (protocol | ms.saddr << 16 | ms.sport) << 33 | maddr << 1 | (ms.server is not None)
        if ms.flags & OPEN_ENDED:
            self.open_ended.remove(ms)
            last = m_key not in self.open_ended.by_m and m_key not in self.m_table.heads
        else:
            last = self.m_table.remove(m_key, ms) and m_key not in self.open_ended.by_m.piles
            self.s_table.remove(s_key, ms)
            self._unindex(ms)
        if last:
            self._port_free(ms, address_of(self.holders.pop(m_key)))
        ms.refcnt -= TABLE_REFERENCES
        ms.flags &= ~HASHED
        return 1

    def _index(self, ms: IpMasq) -> None:
        protocol = ms.protocol
        in_key = session_key(ms.daddr, ms.maddr, ms.dport, ms.mport)
        out_key = session_key(ms.saddr, ms.daddr, ms.sport, ms.dport)
        in_index, out_index = self.in_index[protocol], self.out_index[protocol]
        namesake = in_index.setdefault(in_key, ms)
        if namesake is not ms:
            self._hides(namesake)
            in_index[in_key] = ms
            self._in_namesakes.add((protocol, in_key), namesake)
        namesake = out_index.setdefault(out_key, ms)
        if namesake is not ms:
            self._hides(namesake)
            out_index[out_key] = ms
            self._out_namesakes.add((protocol, out_key), namesake)

    def _unindex(self, ms: IpMasq) -> None:
        protocol = ms.protocol
        in_key = session_key(ms.daddr, ms.maddr, ms.dport, ms.mport)
        out_key = session_key(ms.saddr, ms.daddr, ms.sport, ms.dport)
        in_index, out_index = self.in_index[protocol], self.out_index[protocol]
        if self._in_namesakes.piles:
            _hand_on(in_index, in_key, ms, self._in_namesakes)
        else:
            del in_index[in_key]
        if self._out_namesakes.piles:
            _hand_on(out_index, out_key, ms, self._out_namesakes)
        else:
            del out_index[out_key]

    def is_alone_on_mport(self, ms: IpMasq) -> bool:
        """Say whether no other entry has the masquerade endpoint of an entry in the tables."""
        if ms.m_link is not None or ms.m_back is not None:
            return False
        open_ended = self.open_ended.by_m
        if not open_ended.piles:
            return True
        key = masquerade_key(ms)
        if open_ended.has_others(key, ms):
            return False
        return not ms.flags & OPEN_ENDED or key not in self.m_table.heads

    # -- look-ups --------------------------------------------------------------

    def ip_masq_in_get_unlocked(
        self, protocol: int, s_addr: int, s_port: int, d_addr: int, d_port: int
    ) -> IpMasq | None:
        """Find the entry of a packet from the outside, or None.

        s is the outside endpoint that sends, d the masquerade endpoint. A reference to the entry is
        counted.
        """
        ms = self.in_index[protocol].get(session_key(s_addr, d_addr, s_port, d_port))
        if ms is None and self.open_ended:
            m_key = endpoint_key(protocol, d_addr, d_port)
            ms = self.open_ended.find_in(m_key, s_addr, s_port)
        if ms is not None:
            ms.refcnt += 1
        return ms

    def ip_masq_out_get_unlocked(
        self, protocol: int, s_addr: int, s_port: int, d_addr: int, d_port: int
    ) -> IpMasq | None:
        """Find the entry of a packet from the inside, or None.

        s is the inside endpoint that sends, d the outside endpoint. A reference to the entry is
        counted. An `s_port` of 0 is not known, except with ICMP, where 0 is an identifier like any
        other, and with protocols that are masqueraded by address alone, where all ports are 0.
        """
        ms = None
        if s_port or protocol not in WITH_PORTS:
            ms = self.out_index[protocol].get(session_key(s_addr, d_addr, s_port, d_port))
            if ms is None and self.open_ended:
                s_key = endpoint_key(protocol, s_addr, s_port)
                ms = self.open_ended.find_out(s_key, False, d_addr, d_port)
        if ms is None and self.open_ended:
            host = endpoint_key(protocol, s_addr, 0)
            ms = self.open_ended.find_out(host, True, d_addr, d_port)
        if ms is not None:
            ms.refcnt += 1
        return ms

    def ip_masq_getbym_unlocked(self, protocol: int, m_addr: int, m_port: int) -> IpMasq | None:
        """Find the newest entry that holds a masquerade address and port, or None.

        A reference to the entry is counted.
        """
        key = endpoint_key(protocol, m_addr, m_port)
        ms = self.m_table.heads.get(key) or self.open_ended.by_m.get(key)
        if ms is not None:
            ms.refcnt += 1
        return ms

    def may_have_mapping(self, protocol: int, saddr: int, sport: int, maddr: int) -> bool:
        """Say whether an inside endpoint may hold a port of `maddr` already; false: it does not.

        An entry whose inside port is not known yet may be of any port of its host.
        """
        # As `unserved_key`, without the time for the calls.
        key = (protocol << 48 | saddr << 16 | sport) << 33 | maddr << 1
        if key in self.s_table.heads:
            return True
        open_ended = self.open_ended
        return bool(open_ended.by_s.piles) and open_ended.may_be_of(protocol, saddr, sport)

    def maddr_of(self, header: Header, maddrs: Collection[int]) -> int | None:
        """Return the masquerade address, of `maddrs`, of a packet from the inside, or None.

        It is the masquerade address of the packet's session, or else of any session of the inside
        endpoint that sends the packet.
        """
        protocol, saddr, sport = header.protocol, header.saddr, header.sport
        ms = self.ip_masq_out_get_unlocked(protocol, saddr, sport, header.daddr, header.dport)
        if ms is not None:
            self.ip_masq_put_unlocked(ms)
            return ms.maddr if ms.maddr in maddrs else None
        for maddr in maddrs:
            key = unserved_key(endpoint_key(protocol, saddr, sport), maddr)
            for mapping in (key, key | 1):
                if mapping in self.s_table.heads or mapping in self.open_ended.by_mapping:
                    return maddr
        return None

    def ip_masq_put_unlocked(self, ms: IpMasq) -> None:
        """Give a reference back; the timer is left as it is."""
        ms.refcnt -= 1

    def dictionaries(self) -> Iterator[dict[Any, Any]]:
        """Yield what may become sparse when many entries have ended (`memory.py`)."""
        yield self.holders
        yield from self.m_table.dictionaries()
        yield from self.s_table.dictionaries()
        for index in (self.in_index, self.out_index):
            yield from list(index.values())


def _hand_on(
    index: dict[bytes, IpMasq], key: bytes, ms: IpMasq, namesakes: Newest[tuple[int, bytes]]
) -> None:
    """Take an entry out of an index, and leave its place to its newest namesake.

    A namesake is another entry of the same values. Nothing but a caller's own ip_masq_new, or a
    packet that fills in what an entry leaves open, can bring it about.
    """
    name = ms.protocol, key
    if index[key] is not ms:
        namesakes.remove(name, ms)
        return
    successor = namesakes.get(name)
    if successor is None:
        del index[key]
    else:
        namesakes.remove(name, successor)
        index[key] = successor
