"""The helpers that are on, and the entries that they are bound to.

A helper is bound to the entries that the inside makes to a server port of the helper, and to the
entries made on a person's behalf (a forwarded port) that lead to an inside server on a port of the
helper. Any other entry that the outside makes has no helper. A bound entry holds the helper (`app`)
and the helper's view of the entry (`app_data`, a `Session`); both go with the entry.

A reset or a SYN that is not believed (`connection.py`) is passed on without the helper seeing it,
and without its payload. So is what is sent before both sides have confirmed their connection.
"""

from __future__ import annotations

from nfmasq.engine.helper.app import App, Apps, Packet, Session
from nfmasq.engine.helper.payload import (
    as_probe,
    is_damaged,
    read_payload,
    without_payload,
    write_payload,
)
from nfmasq.engine.helper.powers import Powers
from nfmasq.engine.table.endings import HELPER
from nfmasq.engine.table.entry import NO_REPLY, USER, IpMasq
from nfmasq.engine.table.states import (
    CLOSE,
    NONE,
    OPENING,
    OVER,
    TIME_WAIT,
    state_after_in,
    state_after_out,
)
from nfmasq.engine.wire.header import Header, Refused
from nfmasq.engine.wire.protocols import FIN, RST, SYN, TCP
from nfmasq.engine.wire.segment import Segment, read_ack, read_segment
from nfmasq.engine.wire.sequence import fix_sequence

_NOTHING_TO_EXPECT = frozenset({TIME_WAIT, CLOSE})
"""States of a helper's connection in which nothing is expected of it any more: the states of
`OVER`, except LAST_ACK, in which an acknowledgement is still to come."""


class Helpers:
    """Binds helpers, and shows them packets. `apps` are the helpers that are on."""

    def __init__(self, powers: Powers) -> None:
        self.apps: Apps = {}
        self._powers = powers

    def bind(self, ms: IpMasq) -> None:
        """Bind the helper of a new entry's server port, where there is a helper.

        The server is inside where a person has asked for the entry, and outside where the inside
        has made the entry. Where the helper raises, the entry has no helper.
        """
        if ms.flags & USER:
            port = ms.sport
        elif ms.flags & NO_REPLY:
            port = ms.dport
        else:
            return
        app = self.apps.get((ms.protocol, port))
        if app is not None:
            self._bind(ms, app)

    def _bind(self, ms: IpMasq, app: App) -> None:
        ms.app_data = session = Session(ms, app, self._powers)
        try:
            app.bind(session)
        except Exception:
            ms.app = ms.app_data = session.data = None
            raise
        ms.app = app
        self._powers.ip_masq_helped(ms)

    def unbind(self, ms: IpMasq) -> None:
        """Take the helper from an entry that has ended, where it has a helper.

        From then on the entry and the helper's view of it do not refer to each other in a circle:
        their memory is free with the last reference, and waits for no garbage collection.
        """
        if ms.app is not None:
            session: Session = ms.app_data
            ms.app = ms.app_data = None
            _unbind(session)

    def show(
        self, ms: IpMasq, packet: bytes, rewritten: bytearray, header: Header, outbound: bool
    ) -> tuple[bytearray, bool]:
        """Show a packet to its entry's helper; return the packet as it is to leave.

        `packet` is the packet as it came, `rewritten` the packet with its new addresses and ports.
        The second value tells whether the packet is believed; if it is not, the entry has to keep
        its state and its timer. Raises Refused: malformed, out_of_order.
        """
        if is_damaged(packet, header):
            raise Refused("malformed")
        if header.protocol != TCP:
            return self._seen(ms, rewritten, header, outbound), True
        segment = read_segment(packet, header.transport)
        if header.kind & (SYN | RST):
            believed = self._believed_unseen(ms, header, segment, outbound)
            if believed is not None:
                return without_payload(rewritten, header), believed
        elif segment.length and not ms.app_data.connection.may_be_shown(segment, outbound):
            return self._unseen(ms, rewritten, header, segment, outbound)
        seen = self._seen(ms, rewritten, header, outbound)
        if outbound:
            fix_sequence(seen, header, ms.out_seq, ms.in_seq)
        else:
            fix_sequence(seen, header, ms.in_seq, ms.out_seq)
        told = read_ack(seen, header.transport, header.kind)
        ms.app_data.connection.passes(segment, told, outbound)
        return seen, True

    def _unseen(
        self, ms: IpMasq, rewritten: bytearray, header: Header, segment: Segment, outbound: bool
    ) -> tuple[bytearray, bool]:
        """Return a packet whose payload may not be shown yet, as it is to leave.

        It asks its receiver for an acknowledgement, which may confirm its sender.
        """
        ms.app_data.connection.passes(
            segment._replace(length=0, flags=segment.flags & ~FIN), segment.ack, outbound
        )
        return as_probe(rewritten, header), not header.kind & FIN

    def _seen(self, ms: IpMasq, rewritten: bytearray, header: Header, outbound: bool) -> bytearray:
        """Return a packet as the helper leaves it."""
        seen = read_payload(rewritten, header)
        before = seen.payload, seen.seq, seen.flags
        _look(ms.app_data, seen, outbound)
        if (seen.payload, seen.seq, seen.flags) == before:
            return rewritten
        return write_payload(rewritten, header, seen)

    def state_entered(self, ms: IpMasq) -> None:
        """Expect nothing any more where an entry's state says that the connection is over."""
        if ms.app is not None and ms.state in _NOTHING_TO_EXPECT:
            ms.app_data.expect_nothing()

    # -- another connection of the same entry --------------------------------------------------

    def _believed_unseen(
        self, ms: IpMasq, header: Header, segment: Segment, outbound: bool
    ) -> bool | None:
        """Say whether a reset or SYN that the helper must not see is believed all the same.

        None where the helper has to see it; where it begins another connection of the entry, the
        helper has begun anew.
        """
        session: Session = ms.app_data
        connection, is_clients = session.connection, outbound != session.inside_serves
        answers_offered = not is_clients and connection.answers_offered(segment)
        if header.is_reset:
            if answers_offered:
                return True
            return None if connection.believes_reset(segment, outbound) else False
        begins_anew = header.is_second_segment and connection.begins_anew(segment, outbound)
        if answers_offered and begins_anew:
            self._begin_offered(ms)
        elif connection.is_open(outbound):
            is_another = segment.seq != session.first_seq or ms.state in OVER
            if is_clients and header.is_first_segment and is_another:
                connection.offered = segment.seq
            return ms.state in OVER or ms.state in OPENING
        elif is_clients and header.is_first_segment:
            if session.first_seq not in (None, segment.seq):
                self._begin_anew(ms)
            ms.app_data.first_seq = segment.seq
        return None

    def _begin_offered(self, ms: IpMasq) -> None:
        """Begin anew with the SYN that was offered, which the helper has not seen yet."""
        first_seq = ms.app_data.connection.offered
        self._begin_anew(ms)
        session: Session = ms.app_data
        session.first_seq = first_seq
        outbound = not session.inside_serves
        _look(session, Packet(b"", first_seq, SYN), outbound)
        session.connection.passes(Segment(first_seq, None, SYN, 0), None, outbound)
        state = state_after_out(NONE, SYN) if outbound else state_after_in(NONE, SYN)
        self._powers.ip_masq_enter(ms, state, self._powers.now)

    def _begin_anew(self, ms: IpMasq) -> None:
        """Have the helper begin anew with an entry; where the helper raises, the entry ends."""
        session: Session = ms.app_data
        session.expect_nothing()
        ms.out_seq = ms.in_seq = None
        try:
            _unbind(session)
            self._bind(ms, session.app)
        except Exception:
            ms.app = ms.app_data = None
            self._powers.remove(ms, HELPER)
            raise


def _look(session: Session, packet: Packet, outbound: bool) -> None:
    (session.app.packet_out if outbound else session.app.packet_in)(session, packet)


def _unbind(session: Session) -> None:
    try:
        session.app.unbind(session)
    finally:
        session.data = None
