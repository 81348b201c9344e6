"""Connections from the outside in: forwarded ports, and the servers that share one.

A `Forward` listens on a port, or a range of ports, of every masquerade address or of one, and
has servers inside. The first packet of a session chooses one by the scheduler; the session is an
entry like any other, whose mport is the port listened on. All that belongs to it follows the
entry, whatever becomes of the server: a server that is dead, or has weight 0, gets no new sessions,
and keeps those it has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nfmasq.engine.forward.schedulers import SCHEDULERS
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.wire.address import dotted
from nfmasq.engine.wire.protocols import PROTOCOLS

if TYPE_CHECKING:
    from nfmasq.engine.forward.trigger import Trigger

MOST_REMEMBERED = 65_536
"""Clients whose server is remembered, for each forward."""


class Forward:
    """A forwarded port, or range of them: `listen` None is any masquerade address.

    `scheduler` is a name of SCHEDULERS; `persistence` is for how many seconds after its
    last new session a client keeps its server, 0 for not at all.
    """

    def __init__(
        self,
        protocol: int,
        ports: range,
        servers: Sequence[Server],
        listen: int | None = None,
        scheduler: str = "rr",
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
        """What people call it: tcp:8080, udp:198.51.100.2:5000-5009."""
        first, last = self.ports[0], self.ports[-1]
        ports = f"{first}" if first == last else f"{first}-{last}"
        listen = "" if self.listen is None else f"{dotted(self.listen)}:"
        return f"{PROTOCOLS[self.protocol]}:{listen}{ports}"

    @property
    def place(self) -> tuple[int, int | None, int]:
        """Where it listens: no two do at the same place."""
        return self.protocol, self.listen, self.ports[0]

    def go_on_from(self, before: Forward) -> None:
        """Have the servers that stay, their clients and whose turn it is from `before`."""
        staying = {(server.address, server.port): server for server in before.servers}
        for server in self.servers:
            staying.setdefault((server.address, server.port), server).configure(server.weight)
        self.servers = [staying[server.address, server.port] for server in self.servers]
        if self.scheduler == before.scheduler:
            self._schedule = before._schedule
        if self.persistence:
            self._kept = before._kept

    def choose(self, client: int, now: float) -> Server | None:
        """The server for a client's new session; None where no server takes any."""
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
        """The server's port for a port of this forward."""
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


class Forwards:
    """All forwards, the triggered ones included, found by what a packet is sent to."""

    def __init__(self, forwards: Sequence[Forward] = (), triggers: Sequence[Trigger] = ()) -> None:
        self.all = tuple(forwards)
        self.triggers = tuple(triggers)
        self._by_port: dict[tuple[int, int], list[Forward]] = {}
        for forward in (*forwards, *triggers):
            for port in forward.ports:
                self._by_port.setdefault((forward.protocol, port), []).append(forward)

    def __bool__(self) -> bool:
        return bool(self._by_port)

    def go_on_from(self, before: Forwards) -> None:
        """Take the place of `before`: what listens where something did goes on from that."""
        forwards = {forward.place: forward for forward in before.all}
        for forward in self.all:
            if forward.place in forwards:
                forward.go_on_from(forwards[forward.place])
        triggers = {trigger.place: trigger for trigger in before.triggers}
        for trigger in self.triggers:
            if trigger.place in triggers:
                trigger.stay_open_as(triggers[trigger.place])

    def fire(self, ms: IpMasq, now: float) -> None:
        """Have a new session from the inside open the ports that it triggers."""
        for trigger in self.triggers:
            if trigger.is_fired_by(ms):
                trigger.fire(ms, now)

    def find(self, protocol: int, address: int, port: int) -> Forward | None:
        """The forward that listens there; one on that address before one on any."""
        found = None
        for forward in self._by_port.get((protocol, port), ()):
            if forward.listen == address:
                return forward
            if forward.listen is None:
                found = forward
        return found
