"""Ending an inside host's TCP connection for it, when the address it went by is gone.

The outside host cannot be reached by that connection any more, and the inside host should
know at once, and not when its patience ends. It believes a reset only with the very sequence number
it expects (RFC 5961), which nobody here keeps: it would cost every packet something. But it tells
the number itself. Asked by a segment that lies outside of its window, a host answers with an
acknowledgement of what it expects (RFC 9293, section 3.10.7.4); and whatever it
sends for an ended connection, that answer included, is answered with a reset of just that number.

     inside                 gateway
       |  <- probe, ACK 0      |   `ended`: when the address has gone
       |  ACK n ->             |   (or any segment of the connection)
       |  <- RST n             |   `reset_for`
"""

from __future__ import annotations

from collections import OrderedDict
from struct import Struct

from nfmasq.engine.checksum import checksum, ones_sum
from nfmasq.engine.counters import TCP
from nfmasq.engine.entry import IpMasq
from nfmasq.engine.header import Header
from nfmasq.engine.rewrite import CHECKSUM_OFFSET, IP_CHECKSUM
from nfmasq.engine.states import ACK, CLOSE, RST, STATES, SYN
from nfmasq.engine.tables import session_key

REMEMBERED = 300.0
"""Seconds for which an ended connection is answered with resets."""

MOST_REMEMBERED = 65_536

HOPS = 64

_CLOSED = frozenset({CLOSE, STATES.index("TIME_WAIT"), STATES.index("LAST_ACK")})

_ip = Struct("!BBHHHBBHII")
_tcp = Struct("!HHIIBBHHH")
_pseudo_header = Struct("!IIHH")
_u16 = Struct("!H")
_u32 = Struct("!I")


class Resets:
    """The TCP connections that were ended, by the key of what the inside host sends in them."""

    def __init__(self) -> None:
        self._ended: OrderedDict[bytes, float] = OrderedDict()

    def ended(self, ms: IpMasq, now: float) -> bytes | None:
        """Remember an entry's connection as ended; returns the probe, None where it was closed."""
        if ms.protocol != TCP or ms.state in _CLOSED:
            return None
        self._forget_old(now)
        if len(self._ended) < MOST_REMEMBERED:
            key = session_key(ms.saddr, ms.daddr, ms.sport, ms.dport)
            self._ended[key] = now + REMEMBERED
        return _segment(ms.daddr, ms.saddr, ms.dport, ms.sport, 0, ACK)

    def is_ended(self, header: Header, now: float) -> bool:
        """Whether a packet from the inside is of an ended connection; a new SYN begins it anew."""
        if not self._ended or header.protocol != TCP:
            return False
        key = session_key(header.saddr, header.daddr, header.sport, header.dport)
        if header.kind & (SYN | ACK | RST) == SYN:
            self._ended.pop(key, None)
        return self._ended.get(key, 0.0) > now

    def _forget_old(self, now: float) -> None:
        # In the order in which they ended, so the oldest comes first.
        while self._ended and next(iter(self._ended.values())) <= now:
            self._ended.popitem(last=False)


def reset_for(packet: bytes, header: Header) -> bytes | None:
    """The reset that answers a segment as a closed port does; None for one without an ACK."""
    if header.kind & (ACK | RST) != ACK:
        return None
    (expected,) = _u32.unpack_from(packet, header.transport + 8)
    return _segment(header.daddr, header.saddr, header.dport, header.sport, expected, RST)


def _segment(saddr: int, daddr: int, sport: int, dport: int, seq: int, flags: int) -> bytes:
    """A whole packet: a TCP segment without data."""
    ip = _ip.pack(0x45, 0, _ip.size + _tcp.size, 0, 0, HOPS, TCP, 0, saddr, daddr)
    tcp = _tcp.pack(sport, dport, seq, 0, _tcp.size << 2, flags, 0, 0, 0)
    check = checksum(tcp, ones_sum(_pseudo_header.pack(saddr, daddr, TCP, _tcp.size)))
    packet = bytearray(ip + tcp)
    _u16.pack_into(packet, IP_CHECKSUM, checksum(ip))
    _u16.pack_into(packet, _ip.size + CHECKSUM_OFFSET[TCP], check)
    return bytes(packet)
