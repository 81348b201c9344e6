"""What both ends of a TCP connection say, for helpers that rewrite it in both directions.

A helper makes a `Dialogue` for each of its sessions, from the units (`Units`,
`engine/helper/stream.py`) into which the helper divides the stream of each direction: lines, for
example.
"""

from __future__ import annotations

from nfmasq.engine.helper.app import Packet, Session
from nfmasq.engine.helper.stream import Units
from nfmasq.engine.wire.protocols import TCP


class Dialogue:
    """The two streams of a session: `out` from the inside, `into` from the outside."""

    def __init__(self, session: Session, units_out: Units, units_in: Units) -> None:
        self.out = session.stream_out(units_out)
        self.into = session.stream_in(units_in)

    def end(self) -> None:
        """Let go of everything: as a rule the units of the streams refer back to this object."""
        vars(self).clear()

    def leave_alone(self) -> None:
        """Rewrite neither direction any more."""
        self.out.leave_alone()
        self.into.leave_alone()


class TcpApp:
    """A helper over TCP, without its name, its ports and `bind`.

    `bind` has to set the session's data to a `Dialogue`.
    """

    protocol = TCP

    def unbind(self, session: Session) -> None:
        session.data.end()

    def packet_out(self, session: Session, packet: Packet) -> None:
        session.data.out.rewrite(packet)

    def packet_in(self, session: Session, packet: Packet) -> None:
        session.data.into.rewrite(packet)
