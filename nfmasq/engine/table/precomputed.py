"""The rewrite of a mapping, computed once: all that its packets need, in both directions.

A mapping (RFC 4787) puts (maddr, mport) in the place of (saddr, sport): as the source of what goes
out, and the reverse as the destination of what comes in. Its packets' checksums move by a
fixed amount, in one direction up, in the other down. All that is the same for every session of the
mapping, which therefore share one `Rewrite`, and it is independent of who carries it out.
"""

from __future__ import annotations

from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.table.states import OPENING
from nfmasq.engine.wire.checksum import difference
from nfmasq.engine.wire.protocols import ICMP


class Rewrite:
    """The rewrite of the packets of one mapping; addresses and ports are ints in host order.

    `address_change` moves the IP header's checksum, `transport_change` that of TCP or UDP, of
    packets going out; of packets coming in, subtract them (see `checksum.difference`).
    """

    __slots__ = ("address_change", "maddr", "mport", "saddr", "sport", "transport_change")

    def __init__(self, ms: IpMasq) -> None:
        self.saddr = ms.saddr
        self.sport = ms.sport
        self.maddr = ms.maddr
        self.mport = ms.mport
        self.address_change = difference(ms.saddr, ms.maddr)
        self.transport_change = difference(ms.saddr + ms.sport, ms.maddr + ms.mport)


def precompute(ms: IpMasq) -> Rewrite | None:
    """Give an entry its rewrite, and return it; None where its packets need more than that.

    To be made for an entry's second packet, unless it had one from the first (`opening.py`).
    """
    if ms.protocol == ICMP or ms.app is not None or ms.out_seq is not None or ms.in_seq is not None:
        return None
    if ms.server is not None and ms.state in OPENING:
        return None  # a SYN sent again may have to go to another server
    ms.rewrite = _of_neighbour(ms, ms.s_link) or _of_neighbour(ms, ms.s_back) or Rewrite(ms)
    return ms.rewrite


def _of_neighbour(ms: IpMasq, other: IpMasq | None) -> Rewrite | None:
    """The rewrite of a session of the same inside endpoint, if it has the same mapping."""
    if other is None or (other.maddr, other.mport) != (ms.maddr, ms.mport):
        return None
    return other.rewrite
