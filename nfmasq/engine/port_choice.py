"""The choice of a masquerade port (mport) for a session: which it gets, and which it may have.

A session gets the mport that the mapping gives: the forwarded port of the only server of a forward
(`forward/forwards.py`), else the mport of another session of its inside endpoint
(`table/mapping.py`). Where the mapping gives none, the session gets a free mport, by the port
selection (`table/ports.py`). Where no mport is free, sessions that are over give their mports up
(`room.py`). Where all mports are taken by what is alive, mports overlap: the session gets an mport
of another inside endpoint, on which there is no session with the same outside endpoint (RFC 7857
section 3). With address-and-port-dependent mapping mports may overlap anyway; otherwise it is a
choice, `when_ports_run_out`.

An mport is held by the inside endpoint that took it. Other endpoints that have sessions on it are
its guests. What the outside sends without being asked goes to the holder (`table/mapping.py`).

An mport that is asked for must be unused, or held by the session's own inside endpoint, or shared:
by the mapping, or because it is forwarded. The gateway itself may be a guest anywhere (`OWN`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.port_reuse import PortReuse
from nfmasq.engine.settings import OVERLAP, Settings
from nfmasq.engine.table import mapping
from nfmasq.engine.table.entry import OPEN_ENDED, OWN, IpMasq
from nfmasq.engine.table.keys import endpoint_key, session_key
from nfmasq.engine.table.limits import InsideHosts, TokenBucket
from nfmasq.engine.table.ports import DRAWS, PORT_SELECTIONS, MasqueradePorts
from nfmasq.engine.table.tables import Tables
from nfmasq.engine.wire.protocols import PROTOCOLS

MAX_SHARED_LOOK_UPS = 256
"""The most ports that are looked at, for one packet, to find a port that its session can share."""

SEARCH_AGAIN = 0.05
"""Seconds after a search in vain for a port to share, until a port is searched for again for the
same outside endpoint: a flood toward one endpoint must not cause a search for each of its
packets."""

MOST_SEARCHED = 1024
"""The most outside endpoints that a search in vain is remembered of."""

VAIN_SEARCHES = 64
"""The most searches in vain in a second, for all outside endpoints together."""

Ends: TypeAlias = "tuple[int, int, int, int]"
"""(saddr, sport, daddr, dport): the inside and the outside endpoint of a session, in host order."""

Outside: TypeAlias = "tuple[int, int]"
"""(daddr, dport): the outside endpoint of a session, in host order."""

GivesWay: TypeAlias = "Callable[[IpMasq], bool]"


class PortChoice:
    """Chooses mports, from the configured `ports`."""

    def __init__(
        self, tables: Tables, hosts: InsideHosts, reuse: PortReuse, settings: Settings
    ) -> None:
        self.ports = MasqueradePorts(settings.ports)
        self._tables = tables
        self._hosts = hosts
        self._reuse = reuse
        # By (protocol, maddr, daddr, dport): when a port to share may be looked for again.
        self._searched: dict[tuple[int, int, int, int], float] = {}
        self._in_vain = TokenBucket(VAIN_SEARCHES, VAIN_SEARCHES)
        self.configure(settings, Forwards())

    def configure(self, settings: Settings, forwards: Forwards) -> None:
        """Use other settings from now on; entries keep their mports, whatever ports there are."""
        self._mapping = settings.mapping
        self._overlaps = settings.when_ports_run_out == OVERLAP
        self._forwards = forwards
        if settings.ports != self.ports.ports:
            self.ports = MasqueradePorts(settings.ports, self.ports)
            self._searched.clear()
        self._free_mport = partial(PORT_SELECTIONS[settings.port_selection], self.ports)

    def begin_anew(self) -> None:
        """Have all ports free: no entry has any."""
        self.ports.give_all_back()
        self._searched.clear()

    def choose(self, protocol: int, maddr: int, ends: Ends, flags: int) -> int | None:
        """Return the mport that is mapped or free; None where there is none.

        `flags` are the flags of the session's entry. For a protocol without ports the mport is 0.
        """
        if protocol not in PROTOCOLS:
            return 0 if self.may_use(protocol, maddr, 0, ends, flags) else None
        saddr, sport, daddr, _ = ends
        mapped = self.mapped(protocol, maddr, saddr, sport, daddr)
        if mapped is not None and (
            self.may_use(protocol, maddr, mapped, ends, flags)
            or self.may_be_guest(protocol, maddr, mapped, ends, flags)
        ):
            return mapped
        if self._hosts.may_take_port(saddr):
            return self.free_mport(protocol, maddr, sport, ends[2:])
        return None

    def free_mport(self, protocol: int, maddr: int, sport: int, outside: Outside) -> int | None:
        """Return a free mport for a session with an outside endpoint, by the port selection.

        None where no mport is free. It tries a few mports to find an mport from which the outside
        endpoint does not remember another connection (`port_reuse.py`).
        """
        mport = self._free_mport(protocol, maddr, sport)
        for _ in range(DRAWS if self._reuse.until else 0):
            if mport is None or not self._reuse.is_remembered(protocol, maddr, mport, outside):
                break
            other = self._free_mport(protocol, maddr, sport)
            if other == mport:
                break
            mport = other
        return mport

    def may_use(self, protocol: int, maddr: int, mport: int, ends: Ends, flags: int) -> bool:
        """Say whether an mport is a session's to have, and the session is not taken for another."""
        saddr, sport, daddr, dport = ends
        if protocol not in PROTOCOLS:
            return session_key(daddr, maddr, dport, mport) not in self._tables.in_index[protocol]
        key = endpoint_key(protocol, maddr, mport)
        holder = self._tables.holders.get(key)
        if holder is None:
            return True
        if not flags & OPEN_ENDED and key not in self._tables.open_ended.by_m:
            if session_key(daddr, maddr, dport, mport) in self._tables.in_index[protocol]:
                return False
            if self.mapping_shares_ports(protocol) or flags & OWN:
                return True
            if self._forwards.find(protocol, maddr, mport):
                return True
        return holder == endpoint_key(protocol, saddr, sport)

    def may_be_guest(self, protocol: int, maddr: int, mport: int, ends: Ends, flags: int) -> bool:
        """Say whether a session on an mport of another endpoint is not taken for another session.

        An open-ended session might be, and so might any session beside it.
        """
        _, _, daddr, dport = ends
        key = endpoint_key(protocol, maddr, mport)
        if flags & OPEN_ENDED or key in self._tables.open_ended.by_m:
            return False
        return session_key(daddr, maddr, dport, mport) not in self._tables.in_index[protocol]

    def mapped(self, protocol: int, maddr: int, saddr: int, sport: int, daddr: int) -> int | None:
        """Return the mport that the mapping gives to an inside endpoint's session, or None."""
        if protocol not in PROTOCOLS:
            return None
        leaves_by = self._forwards.leaves_by(protocol, maddr, saddr, sport)
        if leaves_by is not None:
            return leaves_by[0]
        like = mapping.session_to_map_like(
            self._tables, self._mapping[protocol], protocol, maddr, saddr, sport, daddr
        )
        return like.mport if like is not None else None

    def mapping_shares_ports(self, protocol: int) -> bool:
        """Say whether the mapping lets one mport serve sessions of several inside endpoints."""
        return self._mapping[protocol] == mapping.ADDRESS_AND_PORT_DEPENDENT

    def shares_ports(self, protocol: int) -> bool:
        """Say whether one mport may serve several inside endpoints when all are taken."""
        return self._overlaps or self.mapping_shares_ports(protocol)

    def select_pair(self, protocol: int, ms: IpMasq, sport: int) -> int:
        """Return an even mport, free with the next mport, for a port of an entry's inside host.

        0 where no pair was found near the mports that the port selection gave, or the port has an
        mport already.
        """
        for _ in range(DRAWS):
            mport = self._free_mport(protocol, ms.maddr, sport) or 0
            for even in (mport & ~1, mport + 1 & ~1):
                if self.may_select(protocol, ms, sport, even) and self.ports.unused(
                    protocol, ms.maddr, even + 1
                ):
                    return even
        return 0

    def may_select(self, protocol: int, ms: IpMasq, sport: int, mport: int) -> bool:
        """Say whether an mport is free to be chosen for a port of an entry's inside host."""
        return (
            0 < mport <= 65535
            and self.ports.unused(protocol, ms.maddr, mport)
            and self._hosts.may_take_port(ms.saddr)
            and self.mapped(protocol, ms.maddr, ms.saddr, sport, ms.daddr) is None
        )

    def why_none(self, protocol: int, saddr: int) -> str:
        """Name the reason why an inside host gets no mport: host_ports (its limit) or no_port."""
        at_its_limit = protocol in PROTOCOLS and not self._hosts.may_take_port(saddr)
        return "host_ports" if at_its_limit else "no_port"

    def shared(
        self, protocol: int, maddr: int, ends: Ends, now: float, gives_way: GivesWay
    ) -> tuple[int, IpMasq | None] | None:
        """Return the next taken mport that the session's outside endpoint leaves free, or None.

        Where the mport has a session with the outside endpoint that gives way, this is the second
        value, and has to be ended first.

        At most MAX_SHARED_LOOK_UPS mports are looked at. Otherwise a packet to an endpoint that has
        a session on each of 65,000 mports would hold up other packets for tens of milliseconds.
        After SEARCH_AGAIN the next mports are looked at, where there have not been VAIN_SEARCHES.
        """
        _, _, daddr, dport = ends
        target = (protocol, maddr, daddr, dport)
        if self._searched.get(target, now) > now or not self._in_vain.has_one(now):
            return None
        index = self._tables.in_index[protocol]
        remembered: tuple[int, IpMasq | None] | None = None
        for _ in range(min(len(self.ports.ports), MAX_SHARED_LOOK_UPS)):
            mport = self.ports.get_next_mport()
            key = endpoint_key(protocol, maddr, mport)
            if key in self._tables.open_ended.by_m or key not in self._tables.m_table.heads:
                continue  # a free mport is not for a host that has reached its limit
            ms = index.get(session_key(daddr, maddr, dport, mport))
            if ms is not None and not gives_way(ms):
                continue
            if not self._reuse.is_remembered(protocol, maddr, mport, (daddr, dport)):
                return mport, ms
            remembered = remembered or (mport, ms)
        if remembered:
            return remembered
        if len(self._searched) >= MOST_SEARCHED:
            self._searched.clear()
        self._searched[target] = now + SEARCH_AGAIN
        self._in_vain.take(now)
        return None
