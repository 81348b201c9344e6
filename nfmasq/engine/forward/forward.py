"""A forward: a forwarded port, or a range of ports, and the servers that share it.

A `Forward` listens on its ports, of every masquerade address or of one address, and has servers
inside. For the first packet of a session the scheduler chooses a server. The session has an entry
like any other session; the mport of the entry is the port that is listened on. All packets of the
session follow the entry, whatever becomes of the server: a server that is dead, or has weight 0,
gets no new sessions, and keeps the sessions that it has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from nfmasq.engine.forward.schedulers import DEFAULT_SCHEDULER, SCHEDULERS
from nfmasq.engine.forward.server import Server
from nfmasq.engine.wire.address import dotted
from nfmasq.engine.wire.protocols import PROTOCOLS

MOST_REMEMBERED = 65_536
"""For how many clients, at most, a forward remembers the server."""


class Forward:
    """A forwarded port, or a range of ports, with its servers.

    It listens on the address `listen`, in host order; None is any masquerade address. `scheduler`
    is a name of SCHEDULERS. `persistence` is for how many seconds after its last new session a
    client keeps its server; 0: not at all.
    """

    def __init__(
        self,
        protocol: int,
        ports: range,
        servers: Sequence[Server],
        listen: int | None = None,
        scheduler: str = DEFAULT_SCHEDULER,
        persistence: float = 0,
    ) -> None:
        self.protocol = protocol
        self.ports = ports
        self.servers = servers
        self.listen = listen
        self.scheduler = scheduler
        self.persistence = persistence
        self._schedule = SCHEDULERS[scheduler]()
        self._kept: OrderedDict[int, tuple[Server, float]] = OrderedDict()

    def __str__(self) -> str:
        """Return what people call the forward: tcp:8080, udp:198.51.100.2:5000-5009."""
        first, last = self.ports[0], self.ports[-1]
        ports = f"{first}" if first == last else f"{first}-{last}"
        listen = "" if self.listen is None else f"{dotted(self.listen)}:"
        return f"{PROTOCOLS[self.protocol]}:{listen}{ports}"

    @property
    def place(self) -> tuple[int, int | None, int]:
        """Where the forward listens: protocol, address, first port. No two listen at one place."""
        return self.protocol, self.listen, self.ports[0]

    def go_on_from(self, before: Forward) -> None:
        """Take over from `before` the servers that stay, their clients, and whose turn it is."""
        staying = {(server.address, server.port): server for server in before.servers}
        for server in self.servers:
            staying.setdefault((server.address, server.port), server).configure(server.weight)
        self.servers = [staying[server.address, server.port] for server in self.servers]
        if self.scheduler == before.scheduler:
            self._schedule = before._schedule
        if self.persistence:
            self._kept = before._kept

    def choose(self, client: int, now: float) -> Server | None:
        """Choose the server for a client's new session; None where no server takes new sessions.

        `client` is an address in host order, `now` is in seconds.
        """
        server = self._kept_by(client, now)
        if server is None:
            candidates = [server for server in self.servers if server.takes_new]
            if not candidates:
                return None
            server = self._schedule(candidates, client)
        if self.persistence:
            self._keep(client, server, now)
        return server

    def server_port(self, server: Server, port: int) -> int:
        """Return the server's port for a port of this forward."""
        return server.port + port - self.ports[0]

    def _kept_by(self, client: int, now: float) -> Server | None:
        server, until = self._kept.get(client, (None, 0.0))
        if server is None or until <= now or not server.takes_new or server not in self.servers:
            return None
        return server

    def _keep(self, client: int, server: Server, now: float) -> None:
        self._kept[client] = (server, now + self.persistence)
        self._kept.move_to_end(client)
        _, until = next(iter(self._kept.values()))
        if until <= now or len(self._kept) > MOST_REMEMBERED:
            self._kept.popitem(last=False)
