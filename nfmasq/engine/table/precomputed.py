"""The rewrite of a mapping, computed once: all that its packets need, in both directions.

A mapping (RFC 4787) puts (maddr, mport) in the place of (saddr, sport), as the source of packets
that go out. It puts (saddr, sport) back, as the destination of packets that come in. The checksums
of the packets move by a fixed amount, up in one direction and down in the other. All this is the
same for every session of the mapping. So its sessions share one `Rewrite`, which does not depend on
who carries it out.
"""

from __future__ import annotations

from nfmasq.engine.wire.checksum import difference


class Rewrite:
    """The rewrite of the packets of one mapping; addresses and ports are ints in host order.

    When a packet goes out, `address_change` is added to the checksum of its IP header, and
    `transport_change` to the checksum of TCP or UDP. When a packet comes in, they are subtracted
    (see `checksum.difference`).
    """

    __slots__ = ("address_change", "maddr", "mport", "saddr", "sport", "transport_change")

    def __init__(self, saddr: int, sport: int, maddr: int, mport: int) -> None:
        self.saddr = saddr
        self.sport = sport
        self.maddr = maddr
        self.mport = mport
        self.address_change = difference(saddr, maddr)
        self.transport_change = difference(saddr + sport, maddr + mport)
