"""The IPv4 identification of packets that go out (RFC 7857 section 10, RFC 6864 section 5.3.1).

By the identification a receiver tells the fragments of different packets apart, if the packets have
the same source, destination and protocol. Behind a masquerade the packets of many hosts have one
source, but each host counts for itself. With the identifications that the hosts chose, a receiver
would put fragments of two hosts' packets together, to a packet that nobody sent. So a packet that
may be fragmented gets a new identification.

As hosts do, the masquerade counts up. It has many counters; the source, the destination and the
protocol of a packet decide which counter numbers it. A number comes again after 65,536 packets, not
earlier. Where a flow cache numbers packets, too, the masquerade has the even numbers and the cache
has the odd numbers, and a number comes again after 32,768 packets. A packet that must not be
fragmented (DF) keeps its identification, which means nothing (RFC 6864 section 4.1). A packet that
comes in keeps its identification, too: the inside host gets only a part of the packets that the
outside host has numbered.
"""

from __future__ import annotations

from array import array
from random import SystemRandom
from struct import Struct

from nfmasq.engine.wire.checksum import adjust

_DF = 0x40
_COUNTERS = 4096
_LONGEST_FRAME = 1500
"""In bytes. A longer packet may be a superpacket. If it is none, nobody misses the numbers that it
takes. The segments of a shorter superpacket are too short to be fragmented anywhere."""

_LEAST_SEGMENT = 512
"""In bytes. No link is so narrow that it fragments shorter segments of a superpacket."""

# Identification, protocol, checksum, and both addresses as one number.
_read = Struct("!4xH3xBHQ").unpack_from
_head = Struct("!4sH4sH").pack


class Identification:
    """Gives packets their identifications.

    `shared` tells whether a flow cache gives identifications, too, which are odd.
    """

    def __init__(self) -> None:
        self.shared = False
        # Nobody outside should be able to guess the next number, or which counter gives it.
        random = SystemRandom()
        self._next = array("H", (random.randrange(65536) for _ in range(_COUNTERS)))
        self._factor = random.getrandbits(64) | 1

    def renewed(self, packet: bytes) -> bytes:
        """Return a packet with a new identification; the same object where DF is set.

        A superpacket takes a number for each of the packets that it may be cut into.
        """
        if packet[6] & _DF:
            return packet
        old, protocol, checksum, addresses = _read(packet)
        counter = ((addresses + protocol) * self._factor >> 52) % _COUNTERS
        new = self._next[counter]
        taken = 1 if len(packet) <= _LONGEST_FRAME else 1 + len(packet) // _LEAST_SEGMENT
        if self.shared:
            new, taken = new & 0xFFFE, 2 * taken
        self._next[counter] = (new + taken) & 0xFFFF
        checksum = adjust(checksum, old - new)
        return _head(packet[:4], new, packet[6:10], checksum) + packet[12:]
