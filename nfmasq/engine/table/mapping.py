"""Which mport a new session takes, and which packets from the outside may begin a session.

Mapping (RFC 4787 section 4.1). With endpoint-independent mapping a session takes the mport that its
inside endpoint holds already. With address-dependent mapping a session takes the mport that its
inside endpoint holds in a session with the same outside address. With address-and-port-dependent
mapping each session takes an mport of its own. Then an mport may serve sessions of many inside
endpoints, since only all five values together have to be unique.

Filtering (RFC 4787 section 5) is for a packet that comes to an mport in use but belongs to no
session. With endpoint-independent filtering the packet always begins a session. With
address-dependent filtering it does if the inside endpoint has a session with the packet's outside
address. With address-and-port-dependent filtering it never does. Where several inside endpoints
have sessions on the mport, the packet can only be for the endpoint that holds it.
"""

from __future__ import annotations

from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.table.keys import endpoint_key, inside_key, unserved_key
from nfmasq.engine.table.tables import Tables

ENDPOINT_INDEPENDENT = "endpoint-independent"
ADDRESS_DEPENDENT = "address-dependent"
ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"

BEHAVIOURS = (ENDPOINT_INDEPENDENT, ADDRESS_DEPENDENT, ADDRESS_AND_PORT_DEPENDENT)
"""The choices of `--mapping` and of `--filtering`."""


def session_to_map_like(
    tables: Tables, mapping: str, protocol: int, maddr: int, saddr: int, sport: int, daddr: int
) -> IpMasq | None:
    """Return the entry whose mport a new session of the same inside endpoint takes over, or None.

    A forwarded port is not taken over from a session by it: which sessions leave by such a port,
    the forwards say (`forward/forwards.py`).
    `mapping` is one of BEHAVIOURS. Addresses and ports are ints in host order.
    """
    if mapping == ADDRESS_AND_PORT_DEPENDENT:
        return None
    key = unserved_key(endpoint_key(protocol, saddr, sport), maddr)
    if mapping == ENDPOINT_INDEPENDENT:
        return tables.s_table.heads.get(key) or tables.open_ended.by_mapping.get(key)
    return tables.s_table.newest_with(key, daddr)


def session_that_admits(
    tables: Tables, filtering: str, protocol: int, saddr: int, maddr: int, mport: int
) -> IpMasq | None:
    """Return the entry that lets a packet of no session in from `saddr` to an mport, or None.

    `filtering` is one of BEHAVIOURS. `saddr` is the outside address from which the packet comes.
    Addresses and ports are ints in host order.
    """
    key = endpoint_key(protocol, maddr, mport)
    holder = tables.holders.get(key)
    if holder is None or filtering == ADDRESS_AND_PORT_DEPENDENT:
        return None
    of_holder = unserved_key(holder, maddr)
    if filtering == ENDPOINT_INDEPENDENT:
        on_port = tables.m_table.heads.get(key)
        like = tables.s_table.heads.get(of_holder)
    else:
        on_port = tables.m_table.newest_with(key, saddr)
        like = tables.s_table.newest_with(of_holder, saddr) if on_port is not None else None
    if on_port is not None and inside_key(on_port) == holder:
        return on_port
    return like if like is not None and like.mport == mport else None
