"""Which packets from the outside make a session (RFC 4787 section 5), and with whom inside.

Those that the filtering admits, with the endpoint inside that has the masquerade port; and those
to a forwarded port, with a server of it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.server import Server
from nfmasq.engine.sessions import Sessions
from nfmasq.engine.table import mapping
from nfmasq.engine.table.entry import OUTSIDE, USER, IpMasq
from nfmasq.engine.wire.header import Header, Refused
from nfmasq.engine.wire.protocols import TCP, WITH_PORTS


class AdmittingSessions(Sessions):
    """All sessions of one masquerade, some of which the outside may make.

    `maddrs` are the masquerade addresses: a forward on any address is on these.
    """

    def __init__(self, **settings: Any) -> None:
        self.maddrs: Collection[int] = ()
        super().__init__(**settings)

    def _admit(self, header: Header, sender: int) -> IpMasq | None:
        """A new session that a packet of none may make, as the filtering has it, or None.

        Over TCP only a connection's first segment makes one. `sender` is the inside host that a
        hairpin comes from, else 0. It is not filtered from itself: by that it finds out that there
        is hairpinning (RFC 5780 section 4.5).
        """
        if header.protocol not in WITH_PORTS:
            return None
        if header.protocol == TCP and not header.is_first_segment:
            return None
        forward = self._forward_of(header)
        if forward is not None:
            return self._admit_to_server(forward, header, sender or header.saddr)
        filtering = self.filtering[header.protocol]
        sent = (header.protocol, header.saddr, header.daddr, header.dport)
        like = mapping.session_that_admits(self.tables, filtering, *sent)
        if like is None and sender:
            anybody = mapping.session_that_admits(self.tables, mapping.ENDPOINT_INDEPENDENT, *sent)
            like = anybody if anybody is not None and anybody.saddr == sender else None
        # A port that was a server's, and is forwarded no more, takes nothing new.
        if like is None or like.server is not None:
            return None
        if self._is_elsewhere(like.saddr, like.sport, header):
            return None
        if not self._has_room_from_outside(like.saddr):
            return None
        return self.ip_masq_new(
            header.protocol,
            like.maddr,
            like.mport,
            like.saddr,
            like.sport,
            header.saddr,
            header.sport,
            OUTSIDE,
        )

    def _forward_of(self, header: Header) -> Forward | None:
        """The forward that a packet is for."""
        forward = self.forwards.find(header.protocol, header.daddr, header.dport)
        if forward is None or (forward.listen is None and header.daddr not in self.maddrs):
            return None
        return forward

    def _admit_to_server(self, forward: Forward, header: Header, client: int) -> IpMasq:
        """A new session with a server inside. Refused: no_server, no_room, no_port."""
        server = forward.choose(client, self.now)
        if server is None:
            raise Refused("no_server")
        port = forward.server_port(server, header.dport)
        if self._is_elsewhere(server.address, port, header):
            raise Refused("no_port")
        if not self._has_room_from_outside(server.address):
            raise Refused("no_room")
        ms = self.ip_masq_new(
            header.protocol,
            header.daddr,
            header.dport,
            server.address,
            port,
            header.saddr,
            header.sport,
            OUTSIDE | USER,
        )
        if ms is None:
            raise Refused("no_port")
        ms.server = server
        server.total += 1
        server.entered(ms.state)
        return ms

    def _is_elsewhere(self, saddr: int, sport: int, header: Header) -> bool:
        """Whether an inside endpoint has its session with this outside endpoint on another port.

        A packet from the outside must not move it.
        """
        ms = self.tables.ip_masq_out_get_unlocked(
            header.protocol, saddr, sport, header.saddr, header.sport
        )
        if ms is not None:
            self.tables.ip_masq_put_unlocked(ms)
        return ms is not None

    def _unless_given_up(self, ms: IpMasq, server: Server) -> IpMasq | None:
        """A session with a server, or None where it makes place for a new one."""
        if not server.is_given_up(ms.state):
            return ms
        self.tables.ip_masq_put_unlocked(ms)
        self.remove(ms)
        return None
