"""What both ends of a TCP connection say, for helpers that rewrite it in both directions.

Such a helper makes a `Dialogue` for each session: with what it takes the stream of either
direction apart into (`Units`, `engine/stream.py`; lines, say).
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

    def leave_alone(self) -> None:
        """Look at neither direction any more."""
        self.out.leave_alone()
        self.into.leave_alone()


class TcpApp:
    """A helper but for its name, its ports and `bind`: the session's data is to be a `Dialogue`."""

    protocol = TCP

    def unbind(self, session: Session) -> None:
        session.data = None

    def packet_out(self, session: Session, packet: Packet) -> None:
        session.data.out.rewrite(packet)

    def packet_in(self, session: Session, packet: Packet) -> None:
        session.data.into.rewrite(packet)
