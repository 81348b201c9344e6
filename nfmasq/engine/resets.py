"""How an inside host's TCP connection is ended when its masquerade address is of no use any more.

Theory of operation. The gateway has lost the address, or the connection's packets leave by another
interface now. The outside host cannot be reached by the connection any more. The inside host
should know at once, and not only when its patience ends. The inside host believes a reset only if
the reset has exactly the sequence number that it expects (RFC 5961). Nothing here keeps this
number, because to keep it would cost every packet something. But the inside host tells the number
itself. Asked by a segment that lies outside of its window, a host answers with an acknowledgement
of the number it expects (RFC 9293, section 3.10.7.4). Whatever the inside host sends for an ended
connection, this answer included, is answered with a reset of exactly the acknowledged number.

     inside                 gateway
       |  <- probe, ACK 0      |   `ended`: when the address has gone
       |  ACK n ->             X   lost in the kernel: there is no default route yet
       |                       |
       |  <- probe, ACK 0      |   `due`: sent again, and again
       |  ACK n ->             |   (or any segment of the connection)
       |  <- RST n             |   `reset_for`

Where an address is replaced, as DHCP does it, the new address often comes some milliseconds before
the default route. An answer that arrives between the two has nowhere to go and never gets here. So
a probe is sent again, a few times, until it is answered.

What is sent is bounded. A connection that ends causes four probes at most, and whoever ends many
entries pauses in between (`daemon/renumbering.py`). A segment causes a reset at most, and there are
RESETS_PER_SECOND of them at most.
"""

from __future__ import annotations

from collections import OrderedDict
from struct import Struct

from nfmasq.engine.table.entry import NO_REPLY, IpMasq
from nfmasq.engine.table.keys import key_of, session_key
from nfmasq.engine.table.limits import TokenBucket
from nfmasq.engine.table.states import OVER
from nfmasq.engine.wire.header import Header
from nfmasq.engine.wire.messages import segment
from nfmasq.engine.wire.protocols import ACK, RST, TCP

REMEMBERED = 300.0
"""Seconds for which an ended connection is answered with resets."""

MOST_REMEMBERED = 65_536

AGAIN = (1.0, 2.0, 6.0)
"""Seconds until an unanswered probe is sent again, each counted from the time before: so it is sent
again 1, 3 and 9 seconds after the connection ended."""

RESETS_PER_SECOND = 1000
"""The most segments a second that are answered with a reset. A host whose segment is not answered
sends it again."""

_u32 = Struct("!I")


class Resets:
    """Remembers ended TCP connections, by the key of their packets from the inside."""

    def __init__(self) -> None:
        self._ended: OrderedDict[bytes, float] = OrderedDict()
        self._probes = _Probes()
        self._answers = TokenBucket(RESETS_PER_SECOND, RESETS_PER_SECOND)

    def ended(self, ms: IpMasq, now: float) -> bytes | None:
        """Remember an entry's connection as ended; return the probe to send.

        None where the entry is not of TCP, or there is no connection: nothing came back yet, or
        the connection was closed already. `now` is in seconds.
        """
        if ms.protocol != TCP or ms.flags & NO_REPLY or ms.state in OVER:
            return None
        self._forget_old(now)
        probe = segment(ms.daddr, ms.saddr, ms.dport, ms.sport, 0, ACK)
        if len(self._ended) < MOST_REMEMBERED:
            key = session_key(ms.saddr, ms.daddr, ms.sport, ms.dport)
            self._ended[key] = now + REMEMBERED
            self._probes.sent(key, probe, now)
        return probe

    def remembers(self, key: bytes) -> bool:
        """Say whether a connection was ended, however long ago, by the key of its packets."""
        return key in self._ended

    def is_ended(self, header: Header, now: float) -> bool:
        """Say whether a packet from the inside is of an ended connection.

        A new SYN begins the connection anew.
        """
        if not self._ended or header.protocol != TCP:
            return False
        key = key_of(header)
        if header.is_first_segment:
            self._ended.pop(key, None)
            self._probes.forget(key)
        return self._ended.get(key, 0.0) > now

    def reset_for(self, packet: bytes, header: Header, now: float) -> bytes | None:
        """Return the reset that answers a segment as a closed port does; None where none is due.

        A segment without an ACK gets no reset. An RST gets none either, and answers the probe too:
        the inside host has no such connection. `now` is in seconds.
        """
        if header.is_reset:
            self._probes.forget(key_of(header))
            return None
        if not header.kind & ACK or not self._answers.take(now):
            return None
        self._probes.forget(key_of(header))
        (expected,) = _u32.unpack_from(packet, header.transport + 8)
        return segment(header.daddr, header.saddr, header.dport, header.sport, expected, RST)

    def due(self, now: float, limit: int) -> list[bytes]:
        """Return the probes that are to be sent again now, `limit` at most."""
        return self._probes.due(now, limit)

    def _forget_old(self, now: float) -> None:
        """Forget two connections whose time is over, so that they grow fewer with each new one."""
        # They stand in the order in which they ended, so the oldest comes first.
        for _ in (1, 2):
            if self._ended and next(iter(self._ended.values())) <= now:
                key, _ = self._ended.popitem(last=False)
                self._probes.forget(key)


class _Probes:
    """Keeps the probes that nobody has answered, by the key of their connection."""

    def __init__(self) -> None:
        # A dict for each number of times a probe was sent again: its first probe is due first.
        # Ordered dicts, as a plain dict takes ever longer to find the first of what is left.
        self._waiting = [OrderedDict[bytes, tuple[float, bytes]]() for _ in AGAIN]

    def sent(self, key: bytes, probe: bytes, now: float) -> None:
        """Note that a probe was sent for the first time."""
        self.forget(key)
        self._wait(0, key, probe, now)

    def forget(self, key: bytes) -> None:
        """Forget a probe that is answered, or not wanted any more."""
        for waiting in self._waiting:
            waiting.pop(key, None)

    def due(self, now: float, limit: int) -> list[bytes]:
        """Return the probes to send again, `limit` at most; each then waits for its next time."""
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
