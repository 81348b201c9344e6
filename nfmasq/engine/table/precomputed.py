"""The rewrite of a mapping, computed once: all that its packets need, in both directions.

A mapping (RFC 4787) puts (maddr, mport) in the place of (saddr, sport): as the source of what goes
out, and the reverse as the destination of what comes in. Its packets' checksums move by a
fixed amount, in one direction up, in the other down. All that is alike for every session of the
mapping, which therefore share one `Rewrite`, and it is independent of who carries it out.
"""

from __future__ import annotations

from nfmasq.engine.wire.checksum import difference


class Rewrite:
    """The rewrite of the packets of one mapping; addresses and ports are ints in host order.

    `address_change` moves the IP header's checksum, `transport_change` that of TCP or UDP, of
    packets going out; of packets coming in, subtract them (see `checksum.difference`).
    """

    __slots__ = ("address_change", "maddr", "mport", "saddr", "sport", "transport_change")

    def __init__(self, saddr: int, sport: int, maddr: int, mport: int) -> None:
        self.saddr = saddr
        self.sport = sport
        self.maddr = maddr
        self.mport = mport
        self.address_change = difference(saddr, maddr)
        self.transport_change = difference(saddr + sport, maddr + mport)
