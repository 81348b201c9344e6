"""All forwarded and triggered ports: by what the outside sends to, and what servers send from."""

from __future__ import annotations

from collections.abc import Sequence

from nfmasq.engine.forward.forward import Forward, Post
from nfmasq.engine.forward.server import Server
from nfmasq.engine.forward.trigger import Trigger
from nfmasq.engine.table.entry import IpMasq


class Forwards:
    """All forwards and triggers.

    `firing` has the (protocol, outside port) of new sessions that open triggered ports. `hosts` are
    the addresses of all servers, and of inside hosts that have opened ports.
    """

    def __init__(self, forwards: Sequence[Forward] = (), triggers: Sequence[Trigger] = ()) -> None:
        self.all = tuple(forwards)
        self.triggers = tuple(triggers)
        self.firing = {
            (trigger.fired_by[0], port)
            for trigger in triggers
            for ports in trigger.fired_by[1]
            for port in ports
        }
        self.hosts = {server.address for forward in forwards for server in forward.servers}
        # Servers that are gone, but have sessions still.
        self._gone: dict[Post, Server] = {}
        self._by_port: dict[tuple[int, int], list[Forward]] = {}
        self._by_server_port: dict[tuple[int, int], list[Forward]] = {}
        for forward in (*forwards, *triggers):
            for port in forward.ports:
                self._by_port.setdefault((forward.protocol, port), []).append(forward)
            for port in forward.server_ports():
                self._by_server_port.setdefault((forward.protocol, port), []).append(forward)

    def __bool__(self) -> bool:
        return bool(self._by_port)

    def go_on_from(self, before: Forwards) -> None:
        """Take the place of `before`; what listens at the same place goes on as it was there.

        A server that is gone is remembered as long as it has sessions: if it comes back meanwhile,
        they are counted on.
        """
        forwards = {forward.place: forward for forward in before.all}
        for forward in self.all:
            forward.take_back(before._gone)
            if forward.place in forwards:
                forward.go_on_from(forwards[forward.place])
        served, serving = before._gone | before._posts(), self._posts()
        self._gone = {
            post: server
            for post, server in served.items()
            if post not in serving and server.has_sessions
        }
        triggers = {trigger.place: trigger for trigger in before.triggers}
        for trigger in self.triggers:
            if trigger.place in triggers:
                trigger.stay_open_as(triggers[trigger.place])
                self.hosts.update(server.address for server in trigger.servers)

    def _posts(self) -> dict[Post, Server]:
        """Return the servers of all forwards by where they serve."""
        return {forward.post(server): server for forward in self.all for server in forward.servers}

    def fire(self, ms: IpMasq, now: float) -> None:
        """Have a new session from the inside open the ports that it triggers, at `now` seconds."""
        for trigger in self.triggers:
            if trigger.is_fired_by(ms):
                trigger.fire(ms, now)
                self.hosts.add(ms.saddr)

    def find(self, protocol: int, address: int, port: int) -> Forward | None:
        """Return the forward or trigger that listens on an address and a port; None: there is none.

        A forward on this address goes before a forward on any address.
        """
        found = None
        for forward in self._by_port.get((protocol, port), ()):
            if forward.listen == address:
                return forward
            if forward.listen is None:
                found = forward
        return found

    def leaves_by(
        self, protocol: int, maddr: int, saddr: int, sport: int
    ) -> tuple[int, Server] | None:
        """Return the forwarded port by which an inside endpoint's sessions leave, and its server.

        None where the endpoint is not the only server of a forward on the masquerade address
        `maddr`. Of several forwards it is the first.
        """
        if saddr not in self.hosts:
            return None
        for forward in self._by_server_port.get((protocol, sport), ()):
            if len(forward.servers) != 1:
                continue
            server = forward.servers[0]
            port = forward.port_of(server, saddr, sport)
            if port is not None and self.find(protocol, maddr, port) is forward:
                return port, server
        return None

    def is_server(self, protocol: int, saddr: int, sport: int) -> bool:
        """Say whether an inside endpoint is a server of any forward or trigger."""
        return saddr in self.hosts and any(
            forward.port_of(server, saddr, sport) is not None
            for forward in self._by_server_port.get((protocol, sport), ())
            for server in forward.servers
        )

    def serves(self, ms: IpMasq) -> bool:
        """Say quickly whether the server of a session surely serves it; else ask `gives_up`."""
        server = ms.server
        forward = self.find(ms.protocol, ms.maddr, ms.mport)
        return (
            server is not None
            and server.takes_new
            and forward is not None
            and server in forward.servers
        )

    def gives_up(self, ms: IpMasq) -> bool:
        """Say whether a session by a forwarded port ends when its outside endpoint begins anew."""
        forward = self.find(ms.protocol, ms.maddr, ms.mport)
        if forward is not None:
            return forward.gives_up(ms)
        # A trigger may by now listen on another address, for another host.
        return not any(t.protocol == ms.protocol and ms.mport in t.ports for t in self.triggers)
