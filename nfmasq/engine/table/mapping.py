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
    """Return the entry whose mport a new session of the same inside endpoint takes over, or None.

    A forwarded port is not taken over from a session by it: which sessions leave by such a port,
    the forwards say (`forward/forwards.py`).
    `mapping` is one of BEHAVIOURS. Addresses and ports are ints in host order.
    """
    key = endpoint_key(protocol, saddr, sport)
    if mapping == ADDRESS_AND_PORT_DEPENDENT:
        return None
    if mapping == ENDPOINT_INDEPENDENT:
        if key not in tables.s_table.heads and not tables.s_open.heads:
            return None
        held = chain(tables.s_table.chain(key), tables.s_open.chain(key))
        return next((ms for ms in held if ms.maddr == maddr and ms.server is None), None)
    like = tables.s_table.newest_with(key, daddr)
    if like is None or like.maddr != maddr or like.server is not None:
        return None
    return like


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
    if filtering == ENDPOINT_INDEPENDENT:
        on_port = tables.m_table.heads.get(key)
        of_holder = tables.s_table.heads.get(holder)
    else:
        on_port = tables.m_table.newest_with(key, saddr)
        of_holder = tables.s_table.newest_with(holder, saddr) if on_port is not None else None
    if on_port is not None and endpoint_key(protocol, on_port.saddr, on_port.sport) == holder:
        return on_port
    if of_holder is not None and (of_holder.maddr, of_holder.mport) == (maddr, mport):
        return of_holder
    return None
