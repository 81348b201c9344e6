"""The way of a packet from the outside to the inside, and which packets begin a session.

A packet that belongs to a session goes on to the session's inside host. A packet that belongs to no
session may begin a session (RFC 4787 section 5): at an mport in use, where the filtering admits the
packet, it begins a session with the inside endpoint that holds the mport; at a forwarded port, it
begins a session with a server of the forward. A packet for nobody inside is for the gateway itself,
and is left alone. There is one exception: a SYN to a masquerade port that nobody asked for is held,
and refused late (`unsolicited.py`).

A packet that is refused changes nothing, as on the way out (`outbound.py`). So an entry in whose
place a packet begins another entry ends when it is clear that the packet may begin the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from nfmasq.engine import icmp
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.helper.calls import without_unknown_call
from nfmasq.engine.helper.payload import is_damaged
from nfmasq.engine.sessions import Sessions
from nfmasq.engine.settings import Settings
from nfmasq.engine.table import mapping
from nfmasq.engine.table.endings import REPLACED, SERVER
from nfmasq.engine.table.entry import (
    NO_DADDR,
    NO_DPORT,
    NO_REPLY,
    NO_SPORT,
    OPEN_ENDED,
    OUTSIDE,
    OWN,
    UNCONFIRMED,
    USER,
    IpMasq,
)
from nfmasq.engine.table.keys import address_of, endpoint_key, key_of
from nfmasq.engine.table.limits import TokenBucket
from nfmasq.engine.table.states import OVER
from nfmasq.engine.unsolicited import DROP, TOLD_PER_SECOND, Unsolicited
from nfmasq.engine.watch import Identity
from nfmasq.engine.wire.by_address import BY_ADDRESS, REFUSED
from nfmasq.engine.wire.gre import GRE
from nfmasq.engine.wire.header import (
    ICMP_ERRORS,
    ICMP_REPLIES,
    FiveTuple,
    Header,
    Refused,
    SessionRefused,
    is_of_call,
    read_header,
)
from nfmasq.engine.wire.messages import PORT_UNREACHABLE, may_be_told, unreachable
from nfmasq.engine.wire.protocols import ICMP, PROTOCOLS, TCP, UDP, WITH_PORTS
from nfmasq.engine.wire.rewrite import DADDR, rewrite_destination
from nfmasq.engine.wire.segment import read_segment
from nfmasq.engine.wire.sequence import fix_sequence


class Inbound:
    """Sends packets from the outside on to the inside.

    `outbox` collects the packets that the masquerade itself sends to outside hosts. `maddrs` are
    the masquerade addresses that the gateway has, ints in host order; whoever uses this object
    keeps them current.
    """

    def __init__(self, sessions: Sessions, outbox: deque[bytes], settings: Settings) -> None:
        self.maddrs: Collection[int] = ()
        self._sessions = sessions
        self._outbox = outbox
        self._unsolicited: Unsolicited | None = None
        self._errors_to_outside = TokenBucket(TOLD_PER_SECOND, TOLD_PER_SECOND)
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Use other settings from now on."""
        self._by_address = settings.other_protocols == BY_ADDRESS
        self._refresh = settings.inbound_refresh
        self._filtering = settings.filtering
        held = self._unsolicited or Unsolicited()
        self._unsolicited = held if settings.unsolicited == DROP else None

    # -- the plain way ---------------------------------------------------------------

    def demasquerade(self, packet: bytes, sender: int = 0) -> bytes:
        """Rewrite a packet from the outside; return the same object where it is for nobody inside.

        `sender` is the address, in host order, of the inside host that a hairpin comes from, else
        0. The caller holds the lock. Raises Refused, for any reason.
        """
        sessions = self._sessions
        header = self._read(packet)
        if header is None:
            return packet
        sport = header.sport
        if header.protocol == ICMP:
            if header.kind in ICMP_ERRORS:
                return icmp.demasquerade_error(sessions.tables, packet, header)
            if header.kind not in ICMP_REPLIES:
                return packet
            sport = 0
        ms = sessions.tables.ip_masq_in_get_unlocked(
            header.protocol, header.saddr, sport, header.daddr, header.dport
        )
        former = None
        if ms is not None and ms.server is not None and self._is_in_the_way(ms, header):
            sessions.tables.ip_masq_put_unlocked(ms)
            former, ms = ms, None
        found = ms
        ms = found or self._admit(packet, header, sender, former)
        if ms is None:
            self._refuse_unsolicited(packet, header)
            self._end_former(former)
            return packet
        if found is not None and (ms.flags & NO_SPORT or _must_wait(ms, header)):
            sessions.give_back(ms, refreshed=False)
            return packet
        before = Identity.of(ms) if ms.app is not None else None
        try:
            sessions.learn_destination(ms, header.saddr, sport)
            sent, refreshed = self._send(ms, packet, header)
        except Exception:
            sessions.take_back(ms, before, made=found is None)
            raise
        sessions.give_back(ms, refreshed)
        return sent

    def _read(self, packet: bytes) -> Header | None:
        """Read the headers of a packet; None where it can have no entry.

        Raises Refused as `read_header` does.
        """
        if not self._may_be_ours(packet):
            return None
        header = read_header(packet, self._by_address)
        return without_unknown_call(header, self._sessions.tables.in_index, self._by_address)

    def _may_be_ours(self, packet: bytes) -> bool:
        """Say whether a packet is of a protocol that can have entries."""
        if len(packet) < 10:
            return False
        protocol = packet[9]
        if protocol in PROTOCOLS or (self._by_address and protocol not in REFUSED):
            return True
        has_calls = bool(self._sessions.tables.in_index[GRE])
        return protocol == GRE and has_calls and is_of_call(packet)

    def _send(self, ms: IpMasq, packet: bytes, header: Header) -> tuple[bytes, bool]:
        """Return a packet as it goes on, and whether it restarts its entry's timer.

        Raises Refused: malformed, out_of_order; nothing has changed then.
        """
        rewritten = rewrite_destination(packet, header, ms.saddr, ms.sport)
        helpers, state, believed = self._sessions.helpers, ms.state, True
        if ms.app is not None:
            rewritten, believed = helpers.show(ms, packet, rewritten, header, outbound=False)
        elif ms.out_seq is not None or ms.in_seq is not None:
            fix_sequence(rewritten, header, ms.in_seq, ms.out_seq)
        if header.protocol == TCP and believed:
            segment = read_segment(packet, header.transport, rewritten)
            believed = self._sessions.follow(ms, segment, outbound=False)
            helpers.state_entered(ms)
        elif believed:
            self._sessions.ip_masq_heard(ms)
        ms.packets_in += 1
        ms.bytes_in += len(rewritten)
        refreshed = ms.state != state or (self._refresh and not header.is_reset)
        sent = packet if is_untouched_own(ms) else bytes(rewritten)
        return sent, believed and refreshed

    # -- new sessions ------------------------------------------------------------------

    def leads_inside(self, header: Header) -> bool:
        """Say whether an inside endpoint holds what a packet is sent to, or it is forwarded.

        The gateway itself may hold it, too (`own_flows.py`); this does not lead inside.
        """
        key = endpoint_key(header.protocol, header.daddr, header.dport)
        holder = self._sessions.tables.holders.get(key)
        is_held = holder is not None and address_of(holder) != header.daddr
        return is_held or self._forward_of(header) is not None

    def _admit(
        self, packet: bytes, header: Header, sender: int, former: IpMasq | None
    ) -> IpMasq | None:
        """Make the entry of a packet that has none; None where the packet may not make an entry.

        The filtering has to admit the packet, unless its destination is forwarded. Over TCP only a
        connection's first segment makes an entry. `sender` is the inside host that a hairpin comes
        from, else 0. A host's packet to the host itself is not filtered: by this the host finds out
        that there is hairpinning (RFC 5780 section 4.5). The new entry comes in the place of
        `former`, which may be None. Raises Refused as `_admit_to_server` does.
        """
        if header.protocol not in WITH_PORTS:
            return None
        if header.protocol == TCP and not header.is_first_segment:
            return None
        forward = self._forward_of(header)
        if forward is not None:
            return self._admit_to_server(forward, packet, header, sender or header.saddr, former)
        like = self._session_that_admits(header, sender)
        # A port that was a server's, and is forwarded no more, gets no new sessions.
        if like is None or like.server is not None:
            return None
        if self._session_with_sender(like.saddr, like.sport, header) not in (None, former):
            return None
        self._end_former(former)
        if not self._sessions.make_room_from_outside(like.saddr):
            self._refuse(header, like.saddr, like.sport, "no_room")
            return None
        return self._sessions.ip_masq_new(
            header.protocol,
            like.maddr,
            like.mport,
            like.saddr,
            like.sport,
            header.saddr,
            header.sport,
            OUTSIDE | UNCONFIRMED,
        )

    def _session_that_admits(self, header: Header, sender: int) -> IpMasq | None:
        """Return a session that lets a new packet in; None where the packet is filtered."""
        tables = self._sessions.tables
        sent = (header.protocol, header.saddr, header.daddr, header.dport)
        like = mapping.session_that_admits(tables, self._filtering[header.protocol], *sent)
        if like is None and sender:
            anybody = mapping.session_that_admits(tables, mapping.ENDPOINT_INDEPENDENT, *sent)
            return anybody if anybody is not None and anybody.saddr == sender else None
        return like

    def _forward_of(self, header: Header) -> Forward | None:
        """Return the forward that a packet is for; None where there is none.

        A forward that listens on any address listens on the masquerade addresses that the gateway
        has.
        """
        forward = self._sessions.forwards.find(header.protocol, header.daddr, header.dport)
        if forward is None:
            return None
        is_here = forward.listen is not None or header.daddr in self.maddrs
        return forward if is_here else None

    def _admit_to_server(
        self, forward: Forward, packet: bytes, header: Header, client: int, former: IpMasq | None
    ) -> IpMasq:
        """Make the entry of a client's session with a server of a forward.

        Raises Refused: malformed, no_server; SessionRefused: no_room, no_port, host_entries.
        """
        sessions = self._sessions
        if self._may_have_helper(forward, header) and is_damaged(packet, header):
            raise Refused("malformed")
        server = forward.choose(client, sessions.now)
        if server is None:
            raise Refused("no_server")
        port = forward.server_port(server, header.dport)
        elsewhere = self._session_with_sender(server.address, port, header)
        ends_for = self._gives_way(elsewhere) if elsewhere is not None else None
        if elsewhere is not None and ends_for is None:
            raise self._refuse(header, server.address, port, "no_port")
        self._end_former(former)
        if not sessions.make_room_from_outside(server.address):
            raise self._refuse(header, server.address, port, "no_room")
        if elsewhere is not None and ends_for is not None:
            sessions.remove(elsewhere, ends_for)
        ms = sessions.ip_masq_new(
            header.protocol,
            header.daddr,
            header.dport,
            server.address,
            port,
            header.saddr,
            header.sport,
            OUTSIDE | USER | UNCONFIRMED,
            server,
        )
        if ms is None:
            raise SessionRefused("no_port")
        server.total += 1
        return ms

    def _may_have_helper(self, forward: Forward, header: Header) -> bool:
        """Say whether a session with a server of a forward may have a helper."""
        ports = (forward.server_port(server, header.dport) for server in forward.servers)
        apps = self._sessions.helpers.apps
        return any((header.protocol, port) in apps for port in ports)

    def _refuse(self, header: Header, saddr: int, sport: int, reason: str) -> SessionRefused:
        """Count a session of an inside endpoint with a packet's sender that cannot be had.

        Returns the exception for the packet that would have begun the session.
        """
        session = FiveTuple(header.protocol, saddr, sport, header.saddr, header.sport)
        self._sessions.refuse(session, reason)
        return SessionRefused(reason)

    def _session_with_sender(self, saddr: int, sport: int, header: Header) -> IpMasq | None:
        """Return the session that an inside endpoint has with a packet's sender, or None.

        The session is by another mport, and a packet from the outside must not move it. (An
        exception is `_gives_way`.)
        """
        tables = self._sessions.tables
        ms = tables.ip_masq_out_get_unlocked(
            header.protocol, saddr, sport, header.saddr, header.sport
        )
        if ms is not None:
            tables.ip_masq_put_unlocked(ms)
        return ms

    def _gives_way(self, ms: IpMasq) -> str | None:
        """Return why a server's session ends when its outside end comes by a forward, or None.

        The session is by another mport. It ends where it is over or given up, or nothing has come
        back for it. Over UDP it also ends where the server began it, before the port was forwarded
        or because several servers share the forward. Else the outside endpoint would be kept from
        the forwarded port as long as the server speaks. The server's next packet leaves by the
        forwarded port.
        """
        if ms.flags & OPEN_ENDED:
            return None
        if ms.server is not None:
            return self._is_begun_anew(ms)
        may_end = ms.protocol == UDP or ms.state in OVER or ms.flags & NO_REPLY
        return REPLACED if may_end else None

    def _is_begun_anew(self, ms: IpMasq) -> str | None:
        """Return why a session by a forwarded port ends when the outside begins anew, or None.

        It ends where it is over, since a client may well use a port again, and where it is given up
        (`forward/forward.py`).
        """
        if ms.state in OVER:
            return REPLACED
        return SERVER if self._sessions.forwards.gives_up(ms) else None

    def _is_in_the_way(self, ms: IpMasq, header: Header) -> bool:
        """Say whether a packet of a session by a forwarded port begins another in its place."""
        return _begins(header) and self._is_begun_anew(ms) is not None

    def _end_former(self, former: IpMasq | None) -> None:
        """End the entry of a session by a forwarded port, in whose place another begins."""
        reason = self._is_begun_anew(former) if former is not None else None
        if former is not None and reason is not None:
            self._sessions.remove(former, reason)

    # -- refused late ------------------------------------------------------------------

    def _refuse_unsolicited(self, packet: bytes, header: Header) -> None:
        """Hold and refuse a SYN that nobody asked for, unless the gateway is to have it.

        Raises Refused: unsolicited.
        """
        if self._unsolicited is None or not header.is_first_segment:
            return
        sessions = self._sessions
        if header.daddr in self.maddrs and header.dport in sessions.choice.ports:
            if may_be_told(header):
                self._unsolicited.hold(key_of(header), packet, sessions.now)
            raise Refused("unsolicited")

    def refuse_held(self, now: float, limit: int) -> int:
        """Tell the senders of SYNs that were held for long enough that their session is refused.

        Nobody is told where the connection has got a session meanwhile, or where too many have been
        told. At most `limit` SYNs are looked at; returns how many are held no more.
        """
        due = self._unsolicited.due(now, limit) if self._unsolicited else {}
        begun = self._sessions.tables.in_index[TCP]
        for key, syn in due.items():
            if key not in begun and self._errors_to_outside.take(now):
                maddr = int.from_bytes(syn[DADDR : DADDR + 4], "big")
                self._outbox.append(unreachable(syn, PORT_UNREACHABLE, maddr))
        return len(due)


def is_untouched_own(ms: IpMasq) -> bool:
    """Say whether an entry is of a flow of the gateway itself that keeps its port."""
    return ms.flags & OWN > 0 and ms.sport == ms.mport


def _begins(header: Header) -> bool:
    """Say whether a packet begins a session, or may do so: over UDP every packet may."""
    return header.protocol == UDP or header.is_first_segment


def _must_wait(ms: IpMasq, header: Header) -> bool:
    """Say whether an open-ended entry of TCP waits for a first segment, and this is none."""
    is_open = ms.flags & (NO_DADDR | NO_DPORT)
    return is_open != 0 and header.protocol == TCP and not header.is_first_segment
