"""The IPv4 identification of what goes out (RFC 7857 section 10, RFC 6864 section 5.3.1).

By the identification a receiver tells the fragments of one packet from those of another of the same
source, destination and protocol. Behind a masquerade the packets of many hosts have one source, and
each host counts for itself: with the identifications they chose, fragments of two hosts' packets
would be put together to one that is nobody's. So a packet that may be fragmented gets a new one.

As hosts do, this counts up, in one of many counters, which one the source, the destination and the
protocol decide: a number comes again after 65,536 packets, not earlier. A packet that must not be
fragmented (DF) keeps its identification, which means nothing (RFC 6864 section 4.1). So does what
comes in: its receiver has to do with a part of what its sender has numbered.
"""

from __future__ import annotations

from random import SystemRandom
from struct import Struct

from nfmasq.engine.wire.checksum import adjust

_DF = 0x40
_COUNTERS = 4096
_LONGEST_FRAME = 1500
"""Bytes; what is longer may be a superpacket. Where it is none, nobody misses the numbers it takes;
and of a shorter superpacket the segments are too short to be fragmented anywhere."""

_LEAST_SEGMENT = 512
"""Bytes; where a superpacket's segments are shorter, no link is so narrow that it cuts them."""

# Identification, protocol, checksum, and both addresses as one number.
_read = Struct("!4xH3xBHQ").unpack_from
_head = Struct("!4sH4sH").pack


class Identification:
    """Gives packets their identifications."""

    def __init__(self) -> None:
        # Nobody outside shall guess what comes next, nor which counter it comes from.
        random = SystemRandom()
        self._next = [random.randrange(65536) for _ in range(_COUNTERS)]
        self._factor = random.getrandbits(64) | 1

    def renewed(self, packet: bytes) -> bytes:
        """The packet with a new identification; the same object where it must not be fragmented.

        A superpacket takes one for each of the packets that it will be cut into.
        """
        if packet[6] & _DF:
            return packet
        old, protocol, check, addresses = _read(packet)
        counter = ((addresses + protocol) * self._factor >> 52) % _COUNTERS
        new = self._next[counter]
        taken = 1 if len(packet) <= _LONGEST_FRAME else 1 + len(packet) // _LEAST_SEGMENT
        self._next[counter] = (new + taken) & 0xFFFF
        check = adjust(check, old - new)
        return _head(packet[:4], new, packet[6:10], check) + packet[12:]
