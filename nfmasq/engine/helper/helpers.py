"""The helpers that are on, and the entries that they are bound to.

A helper is bound to the entries that the inside makes to a server port of the helper, and to the
entries made on a person's behalf (a forwarded port) that lead to an inside server on a port of the
helper. Any other entry that the outside makes has no helper. A bound entry holds the helper (`app`)
and the helper's view of the entry (`app_data`, a `Session`); both go with the entry.
"""

from __future__ import annotations

from nfmasq.engine.helper.app import Apps, Session
from nfmasq.engine.helper.payload import is_damaged, read_payload, write_payload
from nfmasq.engine.helper.powers import Powers
from nfmasq.engine.table.endings import HELPER
from nfmasq.engine.table.entry import NO_REPLY, USER, IpMasq
from nfmasq.engine.table.states import CLOSE, TIME_WAIT
from nfmasq.engine.wire.header import Header, Refused

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
        if app is None:
            return
        ms.app_data = session = Session(ms, app, self._powers)
        try:
            app.bind(session)
        except Exception:
            ms.app_data = session.data = None
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
    ) -> bytearray:
        """Show a packet to its entry's helper; return the packet as the helper leaves it.

        `packet` is the packet as it came, `rewritten` the packet with its new addresses and ports.
        Raises Refused: malformed, out_of_order.
        """
        if is_damaged(packet, header):
            raise Refused("malformed")
        seen = read_payload(rewritten, header)
        if header.is_first_segment and outbound != ms.app_data.inside_serves:
            self._begin(ms, seen.seq)
        session: Session = ms.app_data
        before = seen.payload, seen.seq, seen.flags
        look = session.app.packet_out if outbound else session.app.packet_in
        look(session, seen)
        if (seen.payload, seen.seq, seen.flags) == before:
            return rewritten
        return write_payload(rewritten, header, seen)

    def state_entered(self, ms: IpMasq) -> None:
        """Expect nothing any more where an entry's state says that the connection is over."""
        if ms.app is not None and ms.state in _NOTHING_TO_EXPECT:
            ms.app_data.expect_nothing()

    def _begin(self, ms: IpMasq, first_seq: int) -> None:
        """Have the helper begin anew where a SYN begins another connection of the entry.

        The first SYN, and a SYN that is sent again, begin no other connection. Where the helper
        raises, the entry ends.
        """
        session: Session = ms.app_data
        if session.first_seq in (None, first_seq):
            session.first_seq = first_seq
            return
        session.expect_nothing()
        _unbind(session)
        ms.out_seq = ms.in_seq = None
        ms.app_data = begun = Session(ms, session.app, self._powers)
        begun.first_seq = first_seq
        try:
            session.app.bind(begun)
        except Exception:
            ms.app = ms.app_data = begun.data = None
            self._powers.remove(ms, HELPER)
            raise
        self._powers.ip_masq_helped(ms)


def _unbind(session: Session) -> None:
    try:
        session.app.unbind(session)
    finally:
        session.data = None
