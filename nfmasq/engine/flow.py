"""The rewrite of a flow, computed once: all that its packets need, in both directions.

What it says is independent of who carries it out: put (maddr, mport) in place of (saddr, sport) as
the source of what goes out, the reverse as the destination of what comes in, and move the
checksums by a fixed amount, in one direction up, in the other down.
"""

from __future__ import annotations

from nfmasq.engine.checksum import difference
from nfmasq.engine.counters import ICMP
from nfmasq.engine.entry import IpMasq


class Rewrite:
    """What the packets of an entry need beside its own addresses and ports.

    `address_change` moves the IP header's checksum, `transport_change` that of TCP or UDP, of
    packets going out; of packets coming in, subtract them (see `checksum.difference`).
    """

    __slots__ = ("address_change", "transport_change")

    def __init__(self, ms: IpMasq) -> None:
        self.address_change = difference(ms.saddr, ms.maddr)
        ports = difference(ms.sport, ms.mport)
        self.transport_change = (self.address_change + ports) % 65535


def precompute(ms: IpMasq) -> Rewrite | None:
    """Give an entry its rewrite, and return it; None where its packets need more than that.

    To be made for an entry's second packet: what never has one, a scan, say, stays without.
    """
    if ms.protocol == ICMP or ms.app is not None or ms.out_seq is not None or ms.in_seq is not None:
        return None
    ms.rewrite = Rewrite(ms)
    return ms.rewrite
