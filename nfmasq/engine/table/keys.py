"""The keys under which the tables have entries: whole numbers, which are fast to make and to find.

An endpoint is a protocol, an address and a port: 8, 32 and 16 bits. A mapping is an inside endpoint
on a masquerade address: the inside endpoint, 32 bits of address, and a bit that is 1 where a server
of a forwarded port has the session. Sessions that go by a forwarded port say nothing of the port by
which other sessions of the endpoint go, so they are kept apart (`mapping.py`).
"""

from __future__ import annotations

from struct import Struct

from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.wire.header import Header

session_key = Struct("!IIHH").pack
"""Makes the key of the indexes: source and destination address, source and destination port, as a
packet without IP options has them in its bytes 12 to 23."""


def key_of(header: Header) -> bytes:
    """Return the key of a packet in the index of its direction."""
    return session_key(header.saddr, header.daddr, header.sport, header.dport)


def endpoint_key(protocol: int, address: int, port: int) -> int:
    """Return the key of an endpoint, from a protocol number, an address and a port."""
    return protocol << 48 | address << 16 | port


def address_of(key: int) -> int:
    """Return the address in an endpoint's key, in host order."""
    return key >> 16 & 0xFFFFFFFF


def masquerade_key(ms: IpMasq) -> int:
    """Return the key of an entry's masquerade endpoint."""
    return endpoint_key(ms.protocol, ms.maddr, ms.mport)


def inside_key(ms: IpMasq) -> int:
    """Return the key of an entry's inside endpoint."""
    return endpoint_key(ms.protocol, ms.saddr, ms.sport)


def mapping_key(ms: IpMasq) -> int:
    """Return the key of an entry's mapping."""
    return inside_key(ms) << 33 | ms.maddr << 1 | (ms.server is not None)


def unserved_key(inside: int, maddr: int) -> int:
    """Return the key of a mapping without a server, from the inside endpoint's key."""
    return inside << 33 | maddr << 1
