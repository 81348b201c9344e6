"""TFTP (RFC 1350): the server's answer, which comes from another port than the request went to.

A server answers each request from a port of its own choice, to the port that the client asked from.
With the filtering set to let in only the endpoints that were asked (address-and-port-dependent) the
answer would be nobody's. So the answer is expected, on the masquerade port that the request left
by. A server inside needs nothing: its answers open sessions of their own.
"""

from __future__ import annotations

from nfmasq.engine.helper.app import Packet, Session
from nfmasq.engine.wire.protocols import UDP

_REQUESTS = (b"\0\1", b"\0\2")
"""The first two bytes of a request to read, and of one to write."""


class Tftp:
    """The helper for TFTP."""

    name = "tftp"
    protocol = UDP
    ports: tuple[int, ...] = (69,)

    def bind(self, session: Session) -> None:
        """Do nothing: there is nothing to remember."""

    def unbind(self, session: Session) -> None:
        """Do nothing: there is nothing to forget."""

    def packet_out(self, session: Session, packet: Packet) -> None:
        if packet.payload[:2] in _REQUESTS and not session.inside_serves:
            session.expect(UDP, session.sport, mport=session.mport)

    def packet_in(self, session: Session, packet: Packet) -> None:
        """Do nothing: what comes from the request's own port is not the answer."""
