"""Port triggering: a session from the inside opens ports to its host.

A game or a messenger talks to an outside server, which has other hosts call back on other ports.
Nobody forwards these ports for good: they are for whichever inside host plays, as long as it plays.
So they are forwarded for a time, and their server is the inside host that triggered them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.entry import HASHED, IpMasq

MOST_TRIGGERING = 16
"""How many sessions, the newest, may keep the ports open; a single session is enough."""


class Trigger(Forward):
    """A forward whose ports are open to one inside host at a time.

    A new session with a protocol and an outside port in `fired_by` opens the ports to its inside
    host. They are open for `seconds`, and as long as this session, or another session of the host
    that opens them, lasts. Until then no other host gets the ports. Sessions that came in through
    the ports are like any other sessions, and may last longer. What the host itself sends from one
    of the ports leaves by this port, until another host gets the ports.
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
        """Where the trigger listens: protocol, None (its address changes), first port."""
        return self.protocol, None, self.ports[0]

    def stay_open_as(self, before: Trigger) -> None:
        """Stay open to the inside host that `before` is open to, and for as long."""
        self.servers, self.listen = before.servers, before.listen
        self._until, self._sessions = before._until, before._sessions

    def is_fired_by(self, ms: IpMasq) -> bool:
        """Say whether a new session opens the ports, by its protocol and outside port."""
        protocol, ranges = self.fired_by
        return protocol == ms.protocol and any(ms.dport in ports for ports in ranges)

    def fire(self, ms: IpMasq, now: float) -> None:
        """Open the ports to the inside host of a session, unless they are open to another host.

        `now` is in seconds.
        """
        if self._is_open(now) and ms.saddr != self.servers[0].address:
            return
        if not self.servers or ms.saddr != self.servers[0].address:
            self.servers = (Server(ms.saddr, self.ports[0]),)
            self._sessions.clear()
        self.listen = ms.maddr
        self._until = now + self.seconds
        self._sessions.append(ms)

    def server_ports(self) -> set[int]:
        """Return the triggered ports, which are the inside host's own ports, too."""
        return set(self.ports)

    def gives_up(self, ms: IpMasq) -> bool:
        """Say no: a session stays with its inside host, whoever has the ports by now."""
        return False

    def choose(self, client: int, now: float) -> Server | None:
        """Choose the inside host, as long as the ports are open to it; else None."""
        return self.servers[0] if self._is_open(now) else None

    def _is_open(self, now: float) -> bool:
        return now < self._until or any(ms.flags & HASHED for ms in self._sessions)
