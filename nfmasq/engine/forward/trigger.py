"""Port triggering: a session from the inside opens ports to its host.

A game or a messenger talks to a server outside, which has others call back on ports of their own.
Nobody forwards these for good: they are for whichever inside host plays, as long as it does. So
they are forwarded ports, whose server is the host that triggered them, for a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.entry import HASHED, IpMasq

MOST_TRIGGERING = 16
"""Sessions that keep ports open, of which one is enough: the newest."""


class Trigger(Forward):
    """Ports of one inside host at a time.

    A new session with a protocol and an outside port in `fired_by` opens them to its host: for
    `seconds`, and as long as it, or another such session of the host, lasts. Until then no other
    host gets them. Sessions that came in by them are like any other, and may last longer.
    """

    def __init__(
        self,
        fired_by: tuple[int, Sequence[range]],
        protocol: int,
        ports: range,
        seconds: float,
    ) -> None:
        super().__init__(protocol, ports, ())
        self.fired_by = fired_by
        self.seconds = seconds
        self._until = float("-inf")
        self._sessions: deque[IpMasq] = deque(maxlen=MOST_TRIGGERING)

    @property
    def place(self) -> tuple[int, int | None, int]:
        """Where it listens, on whichever address that is at the moment."""
        return self.protocol, None, self.ports[0]

    def stay_open_as(self, before: Trigger) -> None:
        """Be open to whom `before` is, and for as long."""
        self.servers, self.listen = before.servers, before.listen
        self._until, self._sessions = before._until, before._sessions

    def is_fired_by(self, ms: IpMasq) -> bool:
        """Whether such a session opens the ports."""
        protocol, ranges = self.fired_by
        return protocol == ms.protocol and any(ms.dport in ports for ports in ranges)

    def fire(self, ms: IpMasq, now: float) -> None:
        """Open the ports to the inside host of a session, unless they are another's."""
        if self._is_open(now) and ms.saddr != self.servers[0].address:
            return
        if not self.servers or ms.saddr != self.servers[0].address:
            self.servers = (Server(ms.saddr, self.ports[0]),)
            self._sessions.clear()
        self.listen = ms.maddr
        self._until = now + self.seconds
        self._sessions.append(ms)

    def choose(self, client: int, now: float) -> Server | None:
        """The inside host, as long as the ports are open to it."""
        return self.servers[0] if self._is_open(now) else None

    def _is_open(self, now: float) -> bool:
        return now < self._until or any(ms.flags & HASHED for ms in self._sessions)
