"""The two tables in which entries are found, and the counts of who refers to them.

The m-table has a chain of entries for each (protocol, maddr, mport), what the outside sends
to; the s-table one for each (protocol, saddr, sport), what the inside sends from; the newest
entry is at the head of its chain. One endpoint may have thousands of sessions, so no look-up
walks a chain of them: an index by all five values leads straight to the entry. Entries whose
five values are not all fixed (`OPEN_ENDED`) cannot stand in an index; they have chains
of their own, which are short, and are asked after the index: what is known precedes what is open.

The design document tells a bare look-up from one under the lock by two leading
underscores, to which Python gives another meaning. Here, as in the C library's stdio, the bare one
ends in `_unlocked`: the caller holds the lock.
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
"""Source and destination address, source and destination port, as a packet without IP
options has them in its bytes 12 to 23: the key of the indexes."""

TABLE_REFERENCES = 2
"""References of an entry that nobody but the tables holds."""


def endpoint_key(protocol: int, address: int, port: int) -> int:
    """One whole number for a protocol, an address and a port."""
    return protocol << 48 | address << 16 | port


def address_of(key: int) -> int:
    """The address in an endpoint's key."""
    return key >> 16 & 0xFFFFFFFF


def endpoint_of(key: int) -> tuple[int, int, int]:
    """The protocol, the address and the port of an endpoint's key."""
    return key >> 48, address_of(key), key & 0xFFFF


def key_of(header: Header) -> bytes:
    """The key of a packet in the index of its direction."""
    return session_key(header.saddr, header.daddr, header.sport, header.dport)


LONG = 2048
"""Entries from which on a chain has an index of outside addresses, asked for or not: to make one of
so many takes some milliseconds, in which no packet moves."""


class Chains:
    """Chains of entries by endpoint, linked through two fields of the entries themselves.

    Asking a chain for the sessions with one outside address (`newest_with`) would be a walk; a
    chain asked so gets an index by that address, kept until the chain is empty. So does one that
    gets `LONG`, before it is so long that to make the index would be felt. Chains of `open_ended`
    entries, whose outside address may change, are never asked.
    """

    def __init__(self, link: str, back: str, *, open_ended: bool = False) -> None:
        self.heads: dict[int, IpMasq] = {}
        self._link = link
        self._back = back
        self._open_ended = open_ended
        self._lengths: dict[int, int] = {}  # of chains of two entries and more without an index
        self._peers: dict[int, dict[int, dict[IpMasq, None]]] = {}

    def insert(self, key: int, ms: IpMasq) -> bool:
        """Put `ms` at the head of its chain; true where it is alone there."""
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
        """Take `ms` out of its chain; true where that leaves none."""
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
        """The entries under `key`, newest first."""
        ms = self.heads.get(key)
        while ms is not None:
            yield ms
            ms = getattr(ms, self._link)

    def newest_with(self, key: int, daddr: int) -> IpMasq | None:
        """The newest entry under `key` whose outside address is `daddr`."""
        if key not in self.heads:
            return None
        peers = self._peers.get(key)
        if peers is None:
            peers = self._index_peers(key)
        return next(reversed(peers.get(daddr, {})), None)

    def _index_peers(self, key: int) -> dict[int, dict[IpMasq, None]]:
        """Make the index of a chain, which counts the chain's length no more."""
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

    `port_taken` is called with the key of a (protocol, maddr, mport) and the first entry that comes
    to stand under it, and `port_free` with the last one that goes: a port is taken just as long as
    the m-table has an entry under it.
    """

    def __init__(
        self,
        port_taken: Callable[[int, IpMasq], None],
        port_free: Callable[[int, IpMasq], None],
    ) -> None:
        self._port_taken = port_taken
        self._port_free = port_free
        self.m_table = Chains("m_link", "m_back")
        self.s_table = Chains("s_link", "s_back")
        self.m_open = Chains("m_link", "m_back", open_ended=True)
        self.s_open = Chains("s_link", "s_back", open_ended=True)
        # Of each protocol an index, which is made when it is first asked for, and stays.
        self.in_index: dict[int, dict[bytes, IpMasq]] = defaultdict(dict)
        self.out_index: dict[int, dict[bytes, IpMasq]] = defaultdict(dict)
        self._namesakes = 0

    # -- linking ---------------------------------------------------------------

    def ip_masq_hash(self, ms: IpMasq) -> int:
        """Link `ms` into both tables, counting a reference for each; 0 if it is there already."""
        if ms.flags & HASHED:
            return 0
        m_key = endpoint_key(ms.protocol, ms.maddr, ms.mport)
        s_key = endpoint_key(ms.protocol, ms.saddr, ms.sport)
        if ms.flags & OPEN_ENDED:
            alone = self.m_open.insert(m_key, ms) and m_key not in self.m_table.heads
            self.s_open.insert(s_key, ms)
        else:
            alone = self.m_table.insert(m_key, ms) and m_key not in self.m_open.heads
            self.s_table.insert(s_key, ms)
            self._index(ms)
        if alone:
            self._port_taken(m_key, ms)
        ms.refcnt += TABLE_REFERENCES
        ms.flags |= HASHED
        return 1

    def ip_masq_unhash(self, ms: IpMasq) -> int:
        """Unlink `ms` from both tables and drop their references; 0 where it is in neither."""
        if not ms.flags & HASHED:
            return 0
        m_key = endpoint_key(ms.protocol, ms.maddr, ms.mport)
        s_key = endpoint_key(ms.protocol, ms.saddr, ms.sport)
        if ms.flags & OPEN_ENDED:
            last = self.m_open.remove(m_key, ms) and m_key not in self.m_table.heads
            self.s_open.remove(s_key, ms)
        else:
            last = self.m_table.remove(m_key, ms) and m_key not in self.m_open.heads
            self.s_table.remove(s_key, ms)
            self._unindex(ms, m_key, s_key)
        if last:
            self._port_free(m_key, ms)
        ms.refcnt -= TABLE_REFERENCES
        ms.flags &= ~HASHED
        return 1

    def _index(self, ms: IpMasq) -> None:
        in_key = session_key(ms.daddr, ms.maddr, ms.dport, ms.mport)
        if self.in_index[ms.protocol].setdefault(in_key, ms) is not ms:
            self.in_index[ms.protocol][in_key] = ms
            self._namesakes += 1
        out_key = session_key(ms.saddr, ms.daddr, ms.sport, ms.dport)
        if self.out_index[ms.protocol].setdefault(out_key, ms) is not ms:
            self.out_index[ms.protocol][out_key] = ms
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
        """Take an entry out of an index, and leave its place to a namesake in the chain."""
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
        """Outside to inside: the entry of a packet from s to d, its reference counted, or None."""
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
        """Inside to outside: the entry of a packet from s to d, its reference counted, or None.

        A port of 0 is an unknown one, save with ICMP, where it is an identifier like any other, and
        with protocols that are masqueraded by address alone, where there is no other.
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
        """The newest entry that holds a masquerade address and port, with a reference counted."""
        key = endpoint_key(protocol, m_addr, m_port)
        ms = self.m_table.heads.get(key) or self.m_open.heads.get(key)
        if ms is not None:
            ms.refcnt += 1
        return ms

    def is_held(self, protocol: int, maddr: int, mport: int) -> bool:
        """Whether any entry holds a masquerade address and port."""
        key = endpoint_key(protocol, maddr, mport)
        return key in self.m_table.heads or key in self.m_open.heads

    def may_have_mapping(self, protocol: int, saddr: int, sport: int) -> bool:
        """Say whether an inside endpoint may hold a masquerade port already; false: it does not.

        An entry whose inside port is not known yet may be of any port of its host.
        """
        key = endpoint_key(protocol, saddr, sport)
        if key in self.s_table.heads:
            return True
        is_open = self.s_open.heads
        return bool(is_open) and (key in is_open or endpoint_key(protocol, saddr, 0) in is_open)

    def maddr_of(self, header: Header) -> int | None:
        """The masquerade address of a packet's session, or else of its sender's newest one."""
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
        """The keys of all (protocol, maddr, mport) that have entries."""
        return self.m_table.heads.keys() | self.m_open.heads.keys()

    def entries(self) -> Iterator[IpMasq]:
        """Every entry in the tables; the lock is held while this is read."""
        for chains in (self.s_table, self.s_open):
            for key in chains.heads:
                yield from chains.chain(key)


def _first_matching(chain: Iterator[IpMasq], address: int, port: int) -> IpMasq | None:
    """The first entry of a chain whose destination is, or may be, this address and port."""
    for ms in chain:
        if (ms.daddr == address or ms.flags & MASQ_DADDR_PASS) and (
            ms.dport == port or ms.flags & MASQ_DPORT_PASS
        ):
            return ms
    return None
