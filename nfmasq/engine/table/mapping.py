"""Which mport a new session takes, and which packets from outside may make one (RFC 4787).

Mapping (section 4.1): with endpoint-independent mapping a session of an inside endpoint takes the
mport that the endpoint holds already; with address-dependent mapping only that of a
session with the same outside address; with address-and-port-dependent mapping each session takes
its own, and one mport serves sessions of many inside endpoints, since only all five
values together have to be unique.

Filtering (section 5): a packet for an mport in use, but of no session, makes one with
endpoint-independent filtering always, with address-dependent filtering if the inside endpoint
has a session with that outside address, with address-and-port-dependent filtering never.
"""

from __future__ import annotations

from itertools import chain

from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.table.tables import Tables, endpoint_key

ENDPOINT_INDEPENDENT = "endpoint-independent"
ADDRESS_DEPENDENT = "address-dependent"
ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"

BEHAVIOURS = (ENDPOINT_INDEPENDENT, ADDRESS_DEPENDENT, ADDRESS_AND_PORT_DEPENDENT)
"""The choices of `--mapping` and of `--filtering`."""


def session_to_map_like(
    tables: Tables, mapping: str, protocol: int, maddr: int, saddr: int, sport: int, daddr: int
) -> IpMasq | None:
    """The session whose mport a new one of the same inside endpoint takes over, or None."""
    key = endpoint_key(protocol, saddr, sport)
    if mapping == ADDRESS_AND_PORT_DEPENDENT:
        return None
    if mapping == ENDPOINT_INDEPENDENT:
        if key not in tables.s_table.heads and not tables.s_open.heads:
            return None
        held = chain(tables.s_table.chain(key), tables.s_open.chain(key))
        return next((ms for ms in held if ms.maddr == maddr), None)
    like = tables.s_table.newest_with(key, daddr)
    return like if like is not None and like.maddr == maddr else None


def session_that_admits(
    tables: Tables, filtering: str, protocol: int, saddr: int, maddr: int, mport: int
) -> IpMasq | None:
    """The session that lets a packet of no session in from `saddr` to an mport, or None."""
    key = endpoint_key(protocol, maddr, mport)
    if filtering == ADDRESS_AND_PORT_DEPENDENT:
        return None
    if filtering == ENDPOINT_INDEPENDENT:
        return tables.m_table.heads.get(key)
    return tables.m_table.newest_with(key, saddr)
