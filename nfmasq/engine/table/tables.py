"""The two tables in which entries are found, and the counts of references to entries.

The m-table has a chain (a linked list) of entries for each (protocol, maddr, mport): the endpoint
to which the outside sends. The s-table has a chain for each (protocol, saddr, sport): the endpoint
from which the inside sends. The newest entry is at the head of its chain.

An endpoint may have thousands of sessions, so no look-up walks their chain: an index by all five
values leads straight to the entry. Entries whose five values are not all fixed (`OPEN_ENDED`)
cannot stand in an index. They have chains of their own, which are short. A look-up turns to these
chains after the index: an entry that is wholly known goes before an open-ended entry.

In the design document the names of bare look-ups, whose caller holds the lock, begin with two
underscores; other look-ups take the lock themselves. Python gives two leading underscores another
meaning. So the names of bare look-ups end in `_unlocked` here, as in the C library's stdio.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from struct import Struct

from nfmasq.engine.table.entry import (
    HASHED,
    MASQ_DADDR_PASS,
    MASQ_DPORT_PASS,
    NO_SPORT,
    OPEN_ENDED,
    IpMasq,
)
from nfmasq.engine.wire.header import Header
from nfmasq.engine.wire.protocols import WITH_PORTS

session_key = Struct("!IIHH").pack
"""Makes the key of the indexes: source and destination address, source and destination port, as a
packet without IP options has them in its bytes 12 to 23."""

TABLE_REFERENCES = 2
"""How many references an entry has that nobody but the tables holds."""


def endpoint_key(protocol: int, address: int, port: int) -> int:
    """Make one whole number of a protocol number, an address and a port: the key of an endpoint."""
    return protocol << 48 | address << 16 | port


def address_of(key: int) -> int:
    """Return the address in an endpoint's key, in host order."""
    return key >> 16 & 0xFFFFFFFF


def endpoint_of(key: int) -> tuple[int, int, int]:
    """Return the protocol, the address and the port in an endpoint's key, in host order."""
    return key >> 48, address_of(key), key & 0xFFFF


def key_of(header: Header) -> bytes:
    """Return the key of a packet in the index of its direction."""
    return session_key(header.saddr, header.daddr, header.sport, header.dport)


LONG = 2048
"""With so many entries a chain gets an index by outside address, asked for or not. To make an index
of so many entries takes some milliseconds, in which no packet moves."""


class Chains:
    """Chains of entries by endpoint, linked through two fields of the entries themselves.

    `heads` are the newest entries, by the key of the endpoint (`endpoint_key`).

    To find the entries with one outside address (`newest_with`) a chain would have to be walked. So
    a chain that is asked for them gets an index by outside address, and keeps it until the chain is
    empty. A chain that becomes `LONG` gets the index unasked, before the chain is so long that
    making the index would be felt. Chains of `open_ended` entries, whose outside address may
    change, are never asked.
    """

    def __init__(self, link: str, back: str, *, open_ended: bool = False) -> None:
        self.heads: dict[int, IpMasq] = {}
        self._link = link
        self._back = back
        self._open_ended = open_ended
        self._lengths: dict[int, int] = {}  # of chains that have two entries or more, and no index
        self._peers: dict[int, dict[int, dict[IpMasq, None]]] = {}

    def insert(self, key: int, ms: IpMasq) -> bool:
        """Put `ms` at the head of its chain; returns whether it is alone there."""
        head = self.heads.get(key)
        self.heads[key] = ms
        if head is None:
            return True
        setattr(ms, self._link, head)
        setattr(head, self._back, ms)
        peers = self._peers.get(key)
        if peers is not None:
            peers.setdefault(ms.daddr, {})[ms] = None
            return False
        length = self._lengths[key] = self._lengths.get(key, 1) + 1
        if length >= LONG and not self._open_ended:
            self._index_peers(key)
        return False

    def remove(self, key: int, ms: IpMasq) -> bool:
        """Take `ms` out of its chain; returns whether the chain is empty then."""
        following: IpMasq | None = getattr(ms, self._link)
        before: IpMasq | None = getattr(ms, self._back)
        if following is not None:
            setattr(following, self._back, before)
            setattr(ms, self._link, None)
        if before is not None:
            setattr(before, self._link, following)
            setattr(ms, self._back, None)
        elif following is not None:
            self.heads[key] = following
        else:
            del self.heads[key]
            self._lengths.pop(key, None)
            self._peers.pop(key, None)
            return True
        if key in self._peers:
            self._forget_peer(self._peers[key], ms)
        else:
            self._lengths[key] -= 1
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
        peers = self._peers.get(key)
        if peers is None:
            peers = self._index_peers(key)
        return next(reversed(peers.get(daddr, {})), None)

    def _index_peers(self, key: int) -> dict[int, dict[IpMasq, None]]:
        """Make the index of a chain, whose length is not counted any more."""
        peers = self._peers[key] = {}
        for ms in reversed(list(self.chain(key))):
            peers.setdefault(ms.daddr, {})[ms] = None
        self._lengths.pop(key, None)
        return peers

    @staticmethod
    def _forget_peer(peers: dict[int, dict[IpMasq, None]], ms: IpMasq) -> None:
        del peers[ms.daddr][ms]
        if not peers[ms.daddr]:
            del peers[ms.daddr]


class Tables:
    """The m-table and the s-table.

    A port is taken just as long as the m-table has an entry under it. Its holder is the inside
    endpoint that took it. `port_taken` is called with the first entry that comes to stand under the
    (protocol, maddr, mport), `port_free` with the last entry that goes and the address of the
    port's holder.
    """

    def __init__(
        self,
        port_taken: Callable[[IpMasq], None],
        port_free: Callable[[IpMasq, int], None],
    ) -> None:
        self._port_taken = port_taken
        self._port_free = port_free
        self.m_table = Chains("m_link", "m_back")
        self.s_table = Chains("s_link", "s_back")
        self.m_open = Chains("m_link", "m_back", open_ended=True)
        self.s_open = Chains("s_link", "s_back", open_ended=True)
        # By key of a masquerade endpoint in use: the key of the inside endpoint that took it.
        self.holders: dict[int, int] = {}
        # By protocol number. An index is made when it is first asked for, and stays.
        self.in_index: dict[int, dict[bytes, IpMasq]] = defaultdict(dict)
        self.out_index: dict[int, dict[bytes, IpMasq]] = defaultdict(dict)
        self._namesakes = 0

    # -- linking ---------------------------------------------------------------

    def ip_masq_hash(self, ms: IpMasq) -> int:
        """Link `ms` into both tables, and count a reference for each.

        Returns 1, or 0 where it is in the tables already.
        """
        if ms.flags & HASHED:
            return 0
        protocol = ms.protocol << 48  # as `endpoint_key`, without the time for the calls
        m_key = protocol | ms.maddr << 16 | ms.mport
        s_key = protocol | ms.saddr << 16 | ms.sport
        if ms.flags & OPEN_ENDED:
            alone = self.m_open.insert(m_key, ms) and m_key not in self.m_table.heads
            self.s_open.insert(s_key, ms)
        else:
            alone = self.m_table.insert(m_key, ms) and m_key not in self.m_open.heads
            self.s_table.insert(s_key, ms)
            self._index(ms)
        if alone:
            self.holders[m_key] = s_key
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
        protocol = ms.protocol << 48  # as `endpoint_key`, without the time for the calls
        m_key = protocol | ms.maddr << 16 | ms.mport
        s_key = protocol | ms.saddr << 16 | ms.sport
        if ms.flags & OPEN_ENDED:
            last = self.m_open.remove(m_key, ms) and m_key not in self.m_table.heads
            self.s_open.remove(s_key, ms)
        else:
            last = self.m_table.remove(m_key, ms) and m_key not in self.m_open.heads
            self.s_table.remove(s_key, ms)
            self._unindex(ms, m_key, s_key)
        if last:
            self._port_free(ms, address_of(self.holders.pop(m_key)))
        ms.refcnt -= TABLE_REFERENCES
        ms.flags &= ~HASHED
        return 1

    def _index(self, ms: IpMasq) -> None:
        in_index, out_index = self.in_index[ms.protocol], self.out_index[ms.protocol]
        saddr, sport, daddr, dport = ms.saddr, ms.sport, ms.daddr, ms.dport
        in_key = session_key(daddr, ms.maddr, dport, ms.mport)
        if in_index.setdefault(in_key, ms) is not ms:
            in_index[in_key] = ms
            self._namesakes += 1
        out_key = session_key(saddr, daddr, sport, dport)
        if out_index.setdefault(out_key, ms) is not ms:
            out_index[out_key] = ms
            self._namesakes += 1

    def _unindex(self, ms: IpMasq, m_key: int, s_key: int) -> None:
        in_key = session_key(ms.daddr, ms.maddr, ms.dport, ms.mport)
        out_key = session_key(ms.saddr, ms.daddr, ms.sport, ms.dport)
        in_index, out_index = self.in_index[ms.protocol], self.out_index[ms.protocol]
        # Chains are walked only while two entries share all the values of an index,
        # which nothing but a caller's own ip_masq_new can bring about.
        if self._namesakes:
            self._hand_on(in_index, in_key, ms, self.m_table.chain(m_key))
            self._hand_on(out_index, out_key, ms, self.s_table.chain(s_key))
        else:
            del in_index[in_key], out_index[out_key]

    def _hand_on(
        self, index: dict[bytes, IpMasq], key: bytes, ms: IpMasq, chain: Iterator[IpMasq]
    ) -> None:
        """Take an entry out of an index, and leave its place to a namesake in the chain.

        A namesake is an entry of the same five values.
        """
        mine = index[key] is ms
        if mine:
            del index[key]
        twin = next((e for e in chain if (e.daddr, e.dport) == (ms.daddr, ms.dport)), None)
        if twin is not None:
            index[key] = twin if mine else index[key]
            self._namesakes -= 1

    # -- look-ups --------------------------------------------------------------

    def ip_masq_in_get_unlocked(
        self, protocol: int, s_addr: int, s_port: int, d_addr: int, d_port: int
    ) -> IpMasq | None:
        """Find the entry of a packet from the outside, or None.

        s is the outside endpoint that sends, d the masquerade endpoint. A reference to the entry is
        counted.
        """
        ms = self.in_index[protocol].get(session_key(s_addr, d_addr, s_port, d_port))
        if ms is None and self.m_open.heads:
            chain = self.m_open.chain(endpoint_key(protocol, d_addr, d_port))
            ms = _first_matching(chain, s_addr, s_port)
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
            if ms is None and self.s_open.heads:
                chain = self.s_open.chain(endpoint_key(protocol, s_addr, s_port))
                ms = _first_matching(chain, d_addr, d_port)
        if ms is None and self.s_open.heads:
            chain = self.s_open.chain(endpoint_key(protocol, s_addr, 0))
            ms = _first_matching((e for e in chain if e.flags & NO_SPORT), d_addr, d_port)
        if ms is not None:
            ms.refcnt += 1
        return ms

    def ip_masq_getbym_unlocked(self, protocol: int, m_addr: int, m_port: int) -> IpMasq | None:
        """Find the newest entry that holds a masquerade address and port, or None.

        A reference to the entry is counted.
        """
        key = endpoint_key(protocol, m_addr, m_port)
        ms = self.m_table.heads.get(key) or self.m_open.heads.get(key)
        if ms is not None:
            ms.refcnt += 1
        return ms

    def may_have_mapping(self, protocol: int, saddr: int, sport: int) -> bool:
        """Say whether an inside endpoint may hold a masquerade port already; false: it does not.

        An entry whose inside port is not known yet may be of any port of its host.
        """
        key = protocol << 48 | saddr << 16 | sport
        if key in self.s_table.heads:
            return True
        is_open = self.s_open.heads
        return bool(is_open) and (key in is_open or endpoint_key(protocol, saddr, 0) in is_open)

    def maddr_of(self, header: Header) -> int | None:
        """Return the masquerade address of a packet from the inside; None where it has none.

        It is the masquerade address of the packet's session, or else of the newest session of the
        inside endpoint that sends the packet.
        """
        protocol, saddr, sport = header.protocol, header.saddr, header.sport
        ms = self.ip_masq_out_get_unlocked(protocol, saddr, sport, header.daddr, header.dport)
        if ms is not None:
            self.ip_masq_put_unlocked(ms)
        else:
            key = endpoint_key(protocol, saddr, sport)
            ms = self.s_table.heads.get(key) or self.s_open.heads.get(key)
        return ms.maddr if ms is not None else None

    def ip_masq_put_unlocked(self, ms: IpMasq) -> None:
        """Give a reference back; the timer is left as it is."""
        ms.refcnt -= 1

    def masquerade_endpoints(self) -> Set[int]:
        """Return the keys (`endpoint_key`) of all (protocol, maddr, mport) that have entries."""
        return self.m_table.heads.keys() | self.m_open.heads.keys()

    def entries(self) -> Iterator[IpMasq]:
        """Yield every entry in the tables; the caller holds the lock until it has read them."""
        for chains in (self.s_table, self.s_open):
            for key in chains.heads:
                yield from chains.chain(key)


def _first_matching(chain: Iterator[IpMasq], address: int, port: int) -> IpMasq | None:
    """Return the first entry of a chain whose outside endpoint is, or may be, this; or None."""
    for ms in chain:
        if (ms.daddr == address or ms.flags & MASQ_DADDR_PASS) and (
            ms.dport == port or ms.flags & MASQ_DPORT_PASS
        ):
            return ms
    return None
