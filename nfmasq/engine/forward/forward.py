"""A forward: a forwarded port, or a range of ports, and the servers that share it.

A `Forward` listens on its ports, of every masquerade address or of one address, and has servers
inside. For the first packet of a session the scheduler chooses a server. The session has an entry
like any other session; the mport of the entry is the port that is listened on. All packets of the
session follow the entry. A server that is dead, or has weight 0, gets no new sessions.

A session is given up where its server does not serve it any more, or where another server would do
better. Its entry ends when the outside begins anew: over TCP with another first segment, over UDP,
where nothing shows a beginning, with the next packet. A dead server gives up all its sessions to
the servers that take new ones. A server of weight 0 gives up those over UDP: a client that always
uses the same port would never leave it. Where no server takes new sessions, each server keeps what
it has.

What the only server of a forward sends from its port leaves by the forwarded port, wherever the
session begins: the outside knows the server by this port, and sends to it. Where several servers
share the port, their own sessions leave by other ports: two servers may speak to one outside
endpoint, and what it sends to the port they share goes to whichever server is next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from nfmasq.engine.forward.schedulers import DEFAULT_SCHEDULER, SCHEDULERS
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.wire.address import dotted
from nfmasq.engine.wire.protocols import PROTOCOLS, TCP

MOST_REMEMBERED = 65_536
"""For how many clients, at most, a forward remembers the server."""


Post: TypeAlias = "tuple[tuple[int, int | None, int], int, int]"
"""Where a server serves: the place of its forward, and its address and port."""


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

    def post(self, server: Server) -> Post:
        """Return where a server of this forward serves."""
        return self.place, server.address, server.port

    def take_back(self, gone: Mapping[Post, Server]) -> None:
        """Put servers that served here before in the place of new servers of the same endpoints.

        They come back alive, and with the weights of the new servers.
        """
        for server in self.servers:
            if self.post(server) in gone:
                gone[self.post(server)].come_back(server.weight)
        self.servers = [gone.get(self.post(server), server) for server in self.servers]

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

    def server_ports(self) -> set[int]:
        """Return the ports of all servers."""
        return {self.server_port(server, port) for server in self.servers for port in self.ports}

    def port_of(self, server: Server, saddr: int, sport: int) -> int | None:
        """Return the port of this forward that leads to an endpoint of a server; else None."""
        port = self.ports[0] + sport - server.port
        return port if server.address == saddr and port in self.ports else None

    def gives_up(self, ms: IpMasq) -> bool:
        """Say whether a session on a port of this forward is no longer with its server."""
        port_of = self.port_of
        servers = (s for s in self.servers if port_of(s, ms.saddr, ms.sport) == ms.mport)
        server = next(servers, None)
        if server is None:
            return True
        keeps = server.takes_new or (server.alive and ms.protocol == TCP)
        return not keeps and any(other.takes_new for other in self.servers)

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
