"""The way of a packet from the inside to the outside, and which packets begin a session.

A packet of TCP or UDP, or an ICMP query, is sent in the name of its entry. Where there is no entry,
a new one is made, if nothing is against it. Then the packet leaves from the entry's masquerade
address and port. An ICMP error belongs to the session of the packet that it quotes (`icmp.py`).
Nothing passes that was not rewritten.

The way out may change while a session lasts: the default route moves to another interface, which
has another masquerade address. From there the session's own address is of no use, for no answer
would come back by it. So the entry ends, and a datagram begins a new session at once. A TCP
connection cannot go on from another address, so its inside end is reset (`resets.py`). A session
that the outside began keeps the address that the outside knows, whatever the way of the answers.

Nearly always nothing is against a new session. The fast path (`fastpath.py`) asks `open_flow` for
the entry of a flow's first packet over TCP or UDP, and then treats the packet like the later
packets of the flow. Where anything might be in the way, `open_flow` makes no entry and changes
nothing. Then the packet takes the plain way, which is here. It comes to `_new_session`, which knows
all reasons to refuse a session, counts the refusal and tells the watchers.
`tests/engine/test_outbound.py` compares the two ways.

A packet that is refused changes nothing. So a packet is judged first, its helper's judgement
included, and the entry changes after that. Where a helper has to know what the packet fills in,
this is taken back if the helper refuses the packet; an entry that the packet has made ends. (What
ended to make way for this entry does not come back.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from struct import Struct

from nfmasq.engine import icmp
from nfmasq.engine.helper.calls import without_unknown_call
from nfmasq.engine.helper.payload import is_damaged
from nfmasq.engine.resets import Resets
from nfmasq.engine.sessions import Sessions
from nfmasq.engine.settings import Settings
from nfmasq.engine.table.endings import ADDRESS, SERVER
from nfmasq.engine.table.entry import HALF_OPEN, NO_REPLY, NO_SPORT, OUTSIDE, Helper, IpMasq
from nfmasq.engine.table.keys import session_key
from nfmasq.engine.table.limits import TokenBucket
from nfmasq.engine.table.precomputed import Rewrite
from nfmasq.engine.table.states import (
    NONE,
    STATE_OF_SERVICE,
    STATE_UDP,
    state_after_out,
)
from nfmasq.engine.watch import Identity, Watcher
from nfmasq.engine.wire.by_address import BY_ADDRESS, may_go_out
from nfmasq.engine.wire.header import (
    ICMP_ERRORS,
    ICMP_QUERIES,
    FiveTuple,
    Header,
    Refused,
    read_header,
    records_addresses,
)
from nfmasq.engine.wire.messages import PROHIBITED, may_be_told, unreachable
from nfmasq.engine.wire.protocols import ACK, ICMP, PROTOCOLS, RST, SYN, TCP, UDP
from nfmasq.engine.wire.rewrite import rewrite_source
from nfmasq.engine.wire.segment import read_segment
from nfmasq.engine.wire.sequence import fix_sequence

ERRORS_PER_SECOND = 100
"""The most refused packets a second that inside hosts are told of."""

_OPENED = {TCP: state_after_out(NONE, SYN), UDP: STATE_UDP}
"""The state that a flow's first packet leads to, by protocol."""

_BEGUN = {TCP: NO_REPLY | HALF_OPEN, UDP: NO_REPLY}
"""The flags of the entry that a flow's first packet makes, by protocol."""

_ends_of = Struct("!IIHH").unpack


class Outbound(Watcher):
    """Sends packets from the inside out.

    `outbox` collects the packets that the masquerade itself sends to inside hosts. `resets`
    remembers the connections that ended with their address; it is None where nobody is told of
    them. `beside` has, by masquerade address, the addresses of the same interface: a session on one
    of them may stay there while new sessions get another. Whoever uses this object keeps it
    current.
    """

    def __init__(self, sessions: Sessions, outbox: deque[bytes], settings: Settings) -> None:
        self.resets: Resets | None = None
        self.beside: Mapping[int, Collection[int]] = {}
        self._sessions = sessions
        self._outbox = outbox
        self._errors_to_inside = TokenBucket(ERRORS_PER_SECOND, ERRORS_PER_SECOND)
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Use other settings from now on."""
        self._by_address = settings.other_protocols == BY_ADDRESS
        remembered = self.resets or Resets()
        self.resets = remembered if settings.reset_on_address_change else None

    # -- the plain way ---------------------------------------------------------------

    def masquerade(self, packet: bytes, maddr: int) -> bytes | None:
        """Rewrite a packet from the inside; return None, counted, where it can have no session.

        `maddr` is the masquerade address for a new session. The caller holds the lock. Raises
        Refused, for any reason.
        """
        sessions = self._sessions
        header = self._read(packet)
        daddr, dport = header.daddr, header.dport
        if header.protocol == ICMP:
            if header.kind in ICMP_ERRORS:
                return icmp.masquerade_error(sessions.tables, packet, header)
            if header.kind not in ICMP_QUERIES:
                raise Refused("unknown")
            dport = 0
        found = self._entry_of(packet, header, dport, maddr)
        ms = found or self._new_session(packet, header, maddr, dport)
        if ms is None:
            self._tell_prohibited(packet, header)
            return None
        before = Identity.of(ms) if ms.app is not None else None
        try:
            if found is None:
                self._fire(ms, header, dport)
            if self._must_move(ms, maddr) and not sessions.ip_masq_move(ms, maddr):
                self._tell_prohibited(packet, header)
                sessions.give_back(ms, refreshed=False)
                return None
            if ms.flags & NO_SPORT:
                sessions.learn_source_port(ms, header.sport)
            sessions.learn_destination(ms, daddr, dport)
            sent, refreshed = self._send(ms, packet, header)
        except Exception:
            sessions.take_back(ms, before, made=found is None)
            raise
        sessions.give_back(ms, refreshed)
        return sent

    def _read(self, packet: bytes) -> Header:
        """Read the headers of a packet. Raises Refused where the packet may not be masqueraded."""
        header = read_header(packet, self._by_address)
        known = without_unknown_call(header, self._sessions.tables.out_index, self._by_address)
        if known is None:
            raise Refused("unsupported")
        if records_addresses(packet, known):
            raise Refused("ip_option")
        if not (known.protocol in PROTOCOLS or may_go_out(known.protocol, known.daddr)):
            raise Refused("unsupported")
        return known

    def _send(self, ms: IpMasq, packet: bytes, header: Header) -> tuple[bytes, bool]:
        """Return a packet as it leaves, and whether it restarts its entry's timer.

        Raises Refused: malformed, out_of_order; nothing has changed then.
        """
        rewritten = rewrite_source(packet, header, ms.maddr, ms.mport)
        sessions, state, believed = self._sessions, ms.state, True
        helpers = sessions.helpers
        if ms.app is not None:
            rewritten, believed = helpers.show(ms, packet, rewritten, header, outbound=True)
        elif ms.out_seq is not None or ms.in_seq is not None:
            fix_sequence(rewritten, header, ms.out_seq, ms.in_seq)
        if header.protocol == TCP and believed:
            segment = read_segment(packet, header.transport, rewritten)
            believed = self._sessions.follow(ms, segment, outbound=True)
            helpers.state_entered(ms)
        ms.packets_out += 1
        ms.bytes_out += len(rewritten)
        return bytes(rewritten), believed and (ms.state != state or not header.is_reset)

    # -- another way out ---------------------------------------------------------------

    def _must_move(self, ms: IpMasq, maddr: int) -> bool:
        """Say whether a packet that would get `maddr` may not go by its entry's own address.

        It may go by another address of the same interface. It must go by the address that the
        outside knows: where the outside began the session, and where the session was announced to
        the outside by the session that controls it.
        """
        if ms.maddr == maddr or ms.flags & OUTSIDE:
            return False
        if ms.control is not None and ms.control.maddr == ms.maddr:
            return False
        return ms.maddr not in self.beside.get(maddr, ())

    def _entry_of(self, packet: bytes, header: Header, dport: int, maddr: int) -> IpMasq | None:
        """Return the entry of a packet that would get `maddr`, or None; a reference is counted.

        Ends an entry that the packet may not go by, unless nothing came back for it: it can move.
        Raises Refused: malformed.
        """
        sessions, ends = self._sessions, (header.saddr, header.sport, header.daddr, dport)
        while True:
            ms = sessions.tables.ip_masq_out_get_unlocked(header.protocol, *ends)
            if ms is None or ms.flags & NO_REPLY or not self._must_move(ms, maddr):
                return ms
            try:
                self._refuse_damaged(packet, header, dport, ms.app)
                sessions.remove(ms, ADDRESS)
            finally:
                sessions.tables.ip_masq_put_unlocked(ms)

    def ended(self, ms: IpMasq, reason: str) -> None:
        """Have an inside host reset its connection that has ended with its masquerade address."""
        if reason != ADDRESS or self.resets is None:
            return
        probe = self.resets.ended(ms, self._sessions.now)
        # The packet in hand has the number that a probe for its entry would ask for.
        if probe is not None and not ms.refcnt:
            self._outbox.append(probe)

    # -- new sessions ------------------------------------------------------------------

    def open_flow(
        self, protocol: int, key: bytes, flags: int, maddr: int, now: float
    ) -> IpMasq | None:
        """Make the entry of a flow's first packet, its timer running, if nothing is in the way.

        Where anything might be in the way, return None and change nothing. The packet is
        well-formed, of TCP or UDP. `key` is the key of its session (see `tables.session_key`), and
        `flags` are the flags of TCP.
        """
        if protocol == TCP and flags & (SYN | ACK | RST) != SYN:
            return None
        saddr, daddr, sport, dport = _ends_of(key)
        service = protocol, dport
        sessions = self._sessions
        room, hosts, forwards = sessions.room, sessions.hosts, sessions.forwards
        with sessions.lock:
            sessions.now = now
            if (
                sessions.tables.may_have_mapping(protocol, saddr, sport, maddr)
                or now > sessions.wheel.late_from
                or room.entries >= room.max_entries
                or service in sessions.helpers.apps
                or service in forwards.firing
                or (saddr in forwards.hosts and forwards.leaves_by(protocol, maddr, saddr, sport))
                or not (sport and dport)
                or (self.resets and self.resets.remembers(key))
                or (hosts.are_limited and not hosts.may_open(saddr, now))
            ):
                return None
            mport = sessions.choice.free_mport(protocol, maddr, sport, (daddr, dport))
            if mport is None:
                mport = sessions.ports.of_what_is_over(protocol, maddr, now, (daddr, dport))
                if mport is None:
                    return None
            state = STATE_OF_SERVICE.get(service) or _OPENED[protocol]
            mflags = _BEGUN[protocol]
            ms = sessions.make(protocol, maddr, mport, saddr, sport, daddr, dport, mflags, state)
            ms.rewrite = Rewrite(saddr, sport, maddr, mport)
            sessions.wheel.set(ms, now, ms.timeout)
            return ms

    def _new_session(self, packet: bytes, header: Header, maddr: int, dport: int) -> IpMasq | None:
        """Make the entry of a packet that has none; None, counted, where it cannot be had.

        Raises Refused: malformed, address_changed, unknown.
        """
        sessions = self._sessions
        self._refuse_damaged(packet, header, dport)
        if self.resets and self.resets.is_ended(header, sessions.now):
            reset = self.resets.reset_for(packet, header, sessions.now)
            if reset is not None:
                self._outbox.append(reset)
            raise Refused("address_changed")
        protocol, saddr, sport, daddr = header.protocol, header.saddr, header.sport, header.daddr
        if header.is_second_segment and sessions.forwards.is_server(protocol, saddr, sport):
            # A server's answer to a SYN whose entry has made room must not begin a session.
            raise Refused("unknown")
        if not sessions.hosts.may_make_entry(saddr, sessions.now):
            sessions.refuse(FiveTuple(protocol, saddr, sport, daddr, dport), "host_rate")
            return None
        if protocol == UDP:
            self._end_of_former_server(maddr, saddr, sport, daddr, dport)
        mflags = NO_REPLY | HALF_OPEN if header.is_first_segment else NO_REPLY
        return sessions.ip_masq_new(protocol, maddr, 0, saddr, sport, daddr, dport, mflags)

    def _refuse_damaged(
        self, packet: bytes, header: Header, dport: int, app: Helper | None = None
    ) -> None:
        """Refuse a damaged packet that `app`, or the helper of a new session, would see.

        Raises Refused: malformed.
        """
        app = app or self._sessions.helpers.apps.get((header.protocol, dport))
        if app is not None and is_damaged(packet, header):
            raise Refused("malformed")

    def _fire(self, ms: IpMasq, header: Header, dport: int) -> None:
        """Fire the triggers of a new session; it may leave by a port that they forward."""
        sessions = self._sessions
        if (header.protocol, dport) in sessions.forwards.firing:
            sessions.forwards.fire(ms, sessions.now)
            sessions.ip_masq_follow_forward(ms)

    def _end_of_former_server(
        self, maddr: int, saddr: int, sport: int, daddr: int, dport: int
    ) -> None:
        """End the session of a former server that has the forwarded port a server leaves by.

        The outside endpoint may wait for the new server to speak first.
        """
        sessions = self._sessions
        leaves_by = sessions.forwards.leaves_by(UDP, maddr, saddr, sport)
        if leaves_by is None:
            return
        key = session_key(daddr, maddr, dport, leaves_by[0])
        former = sessions.tables.in_index[UDP].get(key)
        if former is not None and former.server is not None and sessions.forwards.gives_up(former):
            sessions.remove(former, SERVER)

    def _tell_prohibited(self, packet: bytes, header: Header) -> None:
        """Tell an inside host that its session cannot be had (RFC 5508 REQ-8), not too often."""
        if may_be_told(header) and self._errors_to_inside.take(self._sessions.now):
            self._outbox.append(unreachable(packet, PROHIBITED, 0))
