"""Ending an inside host's TCP connection for it, when the address it went by is gone.

The outside host cannot be reached by that connection any more, and the inside host should
know at once, and not when its patience ends. It believes a reset only with the very sequence number
it expects (RFC 5961), which nobody here keeps: it would cost every packet something. But it tells
the number itself. Asked by a segment that lies outside of its window, a host answers with an
acknowledgement of what it expects (RFC 9293, section 3.10.7.4); and whatever it
sends for an ended connection, that answer included, is answered with a reset of just that number.

     inside                 gateway
       |  <- probe, ACK 0      |   `ended`: when the address has gone
       |  ACK n ->             X   refused by the kernel: there is no default route yet
       |                       |
       |  <- probe, ACK 0      |   `due`: sent again, and again
       |  ACK n ->             |   (or any segment of the connection)
       |  <- RST n             |   `reset_for`

Where an address is replaced, as DHCP does it, the new one often comes some milliseconds before the
default route. An answer that arrives between the two has nowhere to go and never gets
here: so a probe is sent again until it is answered, a few times.
"""

from __future__ import annotations

from collections import OrderedDict
from struct import Struct

from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.table.states import OVER
from nfmasq.engine.table.tables import key_of, session_key
from nfmasq.engine.wire.header import Header
from nfmasq.engine.wire.messages import segment
from nfmasq.engine.wire.protocols import ACK, RST, TCP

REMEMBERED = 300.0
"""Seconds for which an ended connection is answered with resets."""

MOST_REMEMBERED = 65_536

AGAIN = (1.0, 2.0, 6.0)
"""Seconds until an unanswered probe is sent again, each from when it was sent last: so 1, 3 and 9
after the connection ended."""

_u32 = Struct("!I")


class Resets:
    """The TCP connections that were ended, by the key of what the inside host sends in them."""

    def __init__(self) -> None:
        self._ended: OrderedDict[bytes, float] = OrderedDict()
        self._probes = _Probes()

    def ended(self, ms: IpMasq, now: float) -> bytes | None:
        """Remember an entry's connection as ended; returns the probe, None where it was closed."""
        if ms.protocol != TCP or ms.state in OVER:
            return None
        self._forget_old(now)
        probe = segment(ms.daddr, ms.saddr, ms.dport, ms.sport, 0, ACK)
        if len(self._ended) < MOST_REMEMBERED:
            key = session_key(ms.saddr, ms.daddr, ms.sport, ms.dport)
            self._ended[key] = now + REMEMBERED
            self._probes.sent(key, probe, now)
        return probe

    def remembers(self, key: bytes) -> bool:
        """Whether a connection was ended, by its key, however long ago."""
        return key in self._ended

    def is_ended(self, header: Header, now: float) -> bool:
        """Whether a packet from the inside is of an ended connection; a new SYN begins it anew."""
        if not self._ended or header.protocol != TCP:
            return False
        key = key_of(header)
        if header.is_first_segment:
            self._ended.pop(key, None)
            self._probes.forget(key)
        return self._ended.get(key, 0.0) > now

    def reset_for(self, packet: bytes, header: Header) -> bytes | None:
        """The reset that answers a segment as a closed port does; None for one without an ACK.

        An RST needs no reset, and answers the probe too: the inside host has no such connection.
        """
        if header.kind & (ACK | RST):
            self._probes.forget(key_of(header))
        if header.kind & (ACK | RST) != ACK:
            return None
        (expected,) = _u32.unpack_from(packet, header.transport + 8)
        return segment(header.daddr, header.saddr, header.dport, header.sport, expected, RST)

    def due(self, now: float, limit: int) -> list[bytes]:
        """So many at most of the probes that are to be sent again now."""
        return self._probes.due(now, limit)

    def _forget_old(self, now: float) -> None:
        # In the order in which they ended, so the oldest comes first.
        while self._ended and next(iter(self._ended.values())) <= now:
            self._ended.popitem(last=False)


class _Probes:
    """The probes that nobody has answered, by the key of their connection."""

    def __init__(self) -> None:
        # By how often each was sent again: in each of them, what came first is due first.
        # Ordered dicts, as a plain one takes ever longer to find the first of what is left.
        self._waiting = [OrderedDict[bytes, tuple[float, bytes]]() for _ in AGAIN]

    def sent(self, key: bytes, probe: bytes, now: float) -> None:
        """A probe was sent for the first time."""
        self.forget(key)
        self._wait(0, key, probe, now)

    def forget(self, key: bytes) -> None:
        """The probe is answered, or not wanted any more."""
        for waiting in self._waiting:
            waiting.pop(key, None)

    def due(self, now: float, limit: int) -> list[bytes]:
        """So many at most that are to be sent again; each waits for its next time, if any."""
        due: list[bytes] = []
        for times, waiting in enumerate(self._waiting):
            while waiting and len(due) < limit and next(iter(waiting.values()))[0] <= now:
                key, (_, probe) = waiting.popitem(last=False)
                due.append(probe)
                self._wait(times + 1, key, probe, now)
        return due

    def _wait(self, times: int, key: bytes, probe: bytes, now: float) -> None:
        if times < len(AGAIN):
            self._waiting[times][key] = now + AGAIN[times], probe
