"""The masquerade: a packet and a time in, the packet to send on out.

A packet from the inside (`ip_fw_masquerade`) is put on the masquerade address and a port of
it, in the name of its session, which is made if there is none. A packet from the outside
(`ip_fw_demasquerade`) that belongs to a session goes on to the inside machine; one that belongs to
none is not ours and is left alone. From the inside nothing passes that was not rewritten:
what is malformed, of an unsupported kind, or cannot get a port is dropped and counted.

A verdict is the packet to send on: the same object where it passes untouched, another where it
was rewritten, None where it is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nfmasq.engine import hairpin, icmp
from nfmasq.engine.counters import Traffic
from nfmasq.engine.fastpath import known_flow_in, known_flow_out
from nfmasq.engine.helper.payload import is_damaged, read_payload, write_payload
from nfmasq.engine.opening import OpeningSessions
from nfmasq.engine.table.entry import (
    DLOOSE,
    HASHED,
    NO_DADDR,
    NO_DPORT,
    NO_REPLY,
    NO_SPORT,
    IpMasq,
)
from nfmasq.engine.table.states import CLOSE, TIME_WAIT, state_after_in, state_after_out
from nfmasq.engine.table.tables import key_of
from nfmasq.engine.unsolicited import DROP, Unsolicited
from nfmasq.engine.wire.by_address import REFUSED, may_go_out
from nfmasq.engine.wire.checksum import with_checksum
from nfmasq.engine.wire.gre import GRE
from nfmasq.engine.wire.header import (
    ICMP_ERRORS,
    ICMP_QUERIES,
    ICMP_REPLIES,
    Header,
    Refused,
    is_of_call,
    read_header,
    records_addresses,
)
from nfmasq.engine.wire.identification import Identification
from nfmasq.engine.wire.messages import PORT_UNREACHABLE, may_be_told, unreachable
from nfmasq.engine.wire.protocols import ICMP, PROTOCOLS, TCP, WITH_PORTS, protocol_name
from nfmasq.engine.wire.rewrite import DADDR, rewrite_destination, rewrite_source
from nfmasq.engine.wire.sequence import fix_sequence

_NOTHING_TO_EXPECT = frozenset({TIME_WAIT, CLOSE})
"""States of a helper's connection in which nothing is expected of it any more: those of `OVER` but
LAST_ACK, in which an acknowledgement is still to come."""

_ICMP = bytes((ICMP,))


def _plain_way_only(*_: object) -> None:
    """In place of the fast path: there is none."""


class Masquerade(OpeningSessions):
    """All sessions of one masquerade, and the packets' ways through them.

    Packets are whole IPv4 packets, bytes in network order; addresses are ints in host order;
    `now` is in seconds, on one clock that never goes back. A packet may be `unsummed`: its TCP or
    UDP checksum was left to the network card (`checksum.py`); one of another protocol raises
    UnknownChecksum, and is to come again when the kernel has filled it in.

    Settings are those of `configure`; without `fast` every packet takes the plain way.

    `maddrs`, kept current by whoever uses this, are the masquerade addresses: only
    there is a SYN unsolicited. `outbox` collects the packets that the masquerade itself has to say,
    to be sent by whoever uses this; a source address of 0 is to be filled in.
    """

    def __init__(self, *, fast: bool = True, **settings: Any) -> None:
        self._fast = fast
        self._unsolicited: Unsolicited | None = None
        self.identification = Identification()
        super().__init__(**settings)
        known = known_flow_out(self, self.open_flow, self.identification.renewed)
        self._known_flow_out = known if fast else _plain_way_only

    def configure(
        self,
        *,
        inbound_refresh: bool = True,
        unsolicited: str = DROP,
        **settings: Any,
    ) -> None:
        """Take on settings: those of `OpeningSessions.configure`, and these.

        With `inbound_refresh` a packet from outside restarts its entry's timer, as one from inside
        always does (RFC 4787 REQ-6); `unsolicited` is what becomes of such a SYN
        (`unsolicited.py`).
        """
        with self.lock:
            super().configure(**settings)
            self._inbound_refresh = inbound_refresh
            held = self._unsolicited or Unsolicited()
            self._unsolicited = held if unsolicited == DROP else None
            known = known_flow_in(self, inbound_refresh) if self._fast else _plain_way_only
            self._known_flow_in = known

    def ip_fw_masquerade(
        self, packet: bytes, maddr: int, now: float, unsummed: bool = False
    ) -> bytes | None:
        """A packet from the inside to the outside; `maddr` is what a new session is put on."""
        sent = self._known_flow_out(packet, maddr, now, unsummed)
        if sent is not None:
            return sent
        if unsummed:
            packet = with_checksum(packet)
        sent = self._judge(self.counters.outbound, now, self._masquerade, packet, maddr)
        return sent and self.identification.renewed(sent)

    def ip_fw_demasquerade(self, packet: bytes, now: float, unsummed: bool = False) -> bytes | None:
        """A packet from the outside, for the gateway or, if it belongs to a session, the inside."""
        sent = self._known_flow_in(packet, now, unsummed)
        if sent is not None:
            return sent
        if not unsummed:
            return self._judge(self.counters.inbound, now, self._demasquerade, packet)
        summed = with_checksum(packet)
        sent = self._judge(self.counters.inbound, now, self._demasquerade, summed)
        return packet if sent is summed else sent

    def ip_fw_own_error(self, packet: bytes, now: float) -> bytes | None:
        """A packet of the gateway's own; an ICMP error among them may be about a rewritten one."""
        return self._judge(self.counters.outbound, now, self._own_error, packet)

    def _judge(
        self,
        traffic: dict[str, Traffic],
        now: float,
        way: Callable[..., bytes | None],
        packet: bytes,
        *maddr: int,
    ) -> bytes | None:
        """Send a packet its way, and count what becomes of it."""
        with self.lock:
            self.now = now
            try:
                sent = way(packet, *maddr)
            except Refused as refusal:
                self.counters.errors[refusal.reason] += 1
                sent = None
            traffic[protocol_name(packet)].count(sent)
        return sent

    # -- inside to outside ---------------------------------------------------------

    def _masquerade(self, packet: bytes, maddr: int) -> bytes | None:
        header = self._read_header(packet, self.tables.out_index)
        if header is None:
            raise Refused("unsupported")
        if records_addresses(packet, header):
            raise Refused("ip_option")
        if not (header.protocol in PROTOCOLS or may_go_out(header.protocol, header.daddr)):
            raise Refused("unsupported")
        daddr, dport = header.daddr, header.dport
        if header.protocol == ICMP:
            if header.kind in ICMP_ERRORS:
                return icmp.masquerade_error(self.tables, packet, header)
            if header.kind not in ICMP_QUERIES:
                raise Refused("unknown")
            dport = 0
        ms = self.tables.ip_masq_out_get_unlocked(
            header.protocol, header.saddr, header.sport, daddr, dport
        ) or self._new_from_inside(packet, header, maddr, dport)
        if ms is None:
            self._tell_prohibited(packet, header)
            return None
        state, refreshed = ms.state, True
        try:
            if ms.maddr != maddr and ms.flags & NO_REPLY and not self.ip_masq_move(ms, maddr):
                self._tell_prohibited(packet, header)
                return None
            if ms.flags & NO_SPORT:
                self._rehash(ms, sport=header.sport, flags=ms.flags & ~NO_SPORT)
            self._complete(ms, daddr, dport)
            sent = self._send_out(ms, packet, header)
            refreshed = ms.state != state or not header.is_reset
            return sent
        finally:
            self._give_back(ms, refreshed)

    def _send_out(self, ms: IpMasq, packet: bytes, header: Header) -> bytes:
        rewritten = rewrite_source(packet, header, ms.maddr, ms.mport)
        if ms.app is not None:
            rewritten = self._helped(ms, packet, rewritten, header, outbound=True)
        if header.protocol == TCP:
            if ms.out_seq is not None or ms.in_seq is not None:
                fix_sequence(rewritten, header, ms.out_seq, ms.in_seq)
            self._enter(ms, state_after_out(ms.state, header.kind))
        ms.packets_out += 1
        ms.bytes_out += len(rewritten)
        return bytes(rewritten)

    # -- outside to inside ---------------------------------------------------------

    def _demasquerade(self, packet: bytes, sender: int = 0) -> bytes | None:
        """`sender` is the inside host that a hairpin comes from."""
        if not self._may_be_ours(packet):
            return packet
        header = self._read_header(packet, self.tables.in_index)
        if header is None:
            return packet
        sport = header.sport
        if header.protocol == ICMP:
            if header.kind in ICMP_ERRORS:
                return icmp.demasquerade_error(self.tables, packet, header)
            if header.kind not in ICMP_REPLIES:
                return packet
            sport = 0
        ms = self.tables.ip_masq_in_get_unlocked(
            header.protocol, header.saddr, sport, header.daddr, header.dport
        )
        if ms is not None and ms.server is not None and header.is_first_segment:
            ms = self._unless_given_up(ms, ms.server)
        ms = ms or self._admit(header, sender)
        if ms is None:
            self._refuse_unsolicited(packet, header)
            return packet
        state, refreshed = ms.state, self._inbound_refresh
        try:
            if ms.flags & NO_SPORT or _cannot_complete(ms, header):
                refreshed = False
                return packet
            ms.flags &= ~NO_REPLY
            self._complete(ms, header.saddr, sport)
            sent = self._send_in(ms, packet, header)
            refreshed = ms.state != state or (refreshed and not header.is_reset)
            return sent
        finally:
            self._give_back(ms, refreshed)

    def _refuse_unsolicited(self, packet: bytes, header: Header) -> None:
        """Hold, and refuse, a SYN that nobody asked for, unless the gateway is to have it."""
        if self._unsolicited is None or not header.is_first_segment:
            return
        if header.daddr in self.maddrs and header.dport in self.ports:
            if may_be_told(header):
                self._unsolicited.hold(key_of(header), packet, self.now)
            raise Refused("unsolicited")

    def _may_be_ours(self, packet: bytes) -> bool:
        """Whether a packet is of a protocol that can have entries."""
        if len(packet) < 10:
            return False
        protocol = packet[9]
        if protocol in PROTOCOLS or (self.by_address and protocol not in REFUSED):
            return True
        return protocol == GRE and bool(self.tables.in_index[GRE]) and is_of_call(packet)

    def _send_in(self, ms: IpMasq, packet: bytes, header: Header) -> bytes:
        rewritten = rewrite_destination(packet, header, ms.saddr, ms.sport)
        if ms.app is not None:
            rewritten = self._helped(ms, packet, rewritten, header, outbound=False)
        if header.protocol == TCP:
            if ms.out_seq is not None or ms.in_seq is not None:
                fix_sequence(rewritten, header, ms.in_seq, ms.out_seq)
            self._enter(ms, state_after_in(ms.state, header.kind))
        ms.packets_in += 1
        ms.bytes_in += len(rewritten)
        return bytes(rewritten)

    # -- either way ----------------------------------------------------------------

    def _read_header(
        self, packet: bytes, index: Mapping[int, Mapping[bytes, IpMasq]]
    ) -> Header | None:
        """The headers of a packet; one of a call that no helper knows of goes by address.

        None where nothing goes by address. Refused: as `header.read_header` does.
        """
        header = read_header(packet, self.by_address)
        if not header.is_of_call or key_of(header) in index[GRE]:
            return header
        return header.without_call() if self.by_address else None

    def _complete(self, ms: IpMasq, daddr: int, dport: int) -> None:
        """Learn what the entry leaves open of its outside endpoint from that of a packet."""
        if ms.flags & (NO_DADDR | NO_DPORT):
            known = ms.flags & ~(NO_DADDR | NO_DPORT)
            self._rehash(ms, daddr=daddr, dport=dport, flags=known)
        elif ms.flags & DLOOSE:
            ms.daddr, ms.dport = daddr, dport

    def _rehash(self, ms: IpMasq, **changes: int) -> None:
        """Change what the tables know an entry by: unhash, change, hash."""
        self.tables.ip_masq_unhash(ms)
        for name, value in changes.items():
            setattr(ms, name, value & ~HASHED if name == "flags" else value)
        self.tables.ip_masq_hash(ms)

    def _helped(
        self, ms: IpMasq, packet: bytes, rewritten: bytearray, header: Header, outbound: bool
    ) -> bytearray:
        """A rewritten packet as the entry's helper leaves it. Refused: malformed, out_of_order."""
        if is_damaged(packet, header):
            raise Refused("malformed")
        seen = read_payload(rewritten, header)
        if header.is_first_segment and outbound != ms.app_data.inside_serves:
            self.rebind_app(ms, seen.seq)
        before = seen.payload, seen.seq, seen.flags
        assert ms.app is not None
        look = ms.app.packet_out if outbound else ms.app.packet_in
        look(ms.app_data, seen)
        if (seen.payload, seen.seq, seen.flags) == before:
            return rewritten
        return write_payload(rewritten, header, seen)

    def _enter(self, ms: IpMasq, state: int) -> None:
        """Take on a TCP state; when a connection is over, nothing is expected of it any more."""
        ms.enter(state)
        if ms.app is not None and state in _NOTHING_TO_EXPECT:
            ms.app_data.expect_nothing()

    def _give_back(self, ms: IpMasq, refreshed: bool) -> None:
        """Give a reference back; unless `refreshed`, the timer goes on as it was."""
        if refreshed or ms.timer is None:
            self.ip_masq_put(ms)
        else:
            self.tables.ip_masq_put_unlocked(ms)

    # -- inside to inside, by an outside address (hairpin.py) --------------------------

    def ip_fw_hairpin(
        self, packet: bytes, maddr: int, now: float, unsummed: bool = False
    ) -> bytes | None:
        """A packet from the inside to an address of the gateway: the first step of a hairpin.

        It goes on to the inside machine that has the port, or, as the same object, to the gateway.
        `maddr` is what a new session is put on, unless its endpoint is on one of `maddrs` already.
        """
        summed = with_checksum(packet) if unsummed else packet
        sent = self._judge(self.counters.outbound, now, self._hairpin, summed, maddr)
        return packet if sent is summed else sent

    def ip_fw_hairpin_source(
        self, packet: bytes, now: float, unsummed: bool = False
    ) -> bytes | None:
        """The same packet on its way out to the inside machine: the second step.

        It was counted in the first one; only its loss is counted here.
        """
        if unsummed:
            packet = with_checksum(packet)
        with self.lock:
            try:
                sent = hairpin.from_inside_form(self.hairpins, packet)
                return self.identification.renewed(sent)
            except Refused as refusal:
                self.counters.errors[refusal.reason] += 1
                self.counters.outbound[protocol_name(packet)].count(None)
                return None

    def ip_fw_hairpin_own_error(self, packet: bytes, now: float) -> bytes | None:
        """A packet of the gateway's own to the inside; it may be an error about a hairpin."""
        return self._judge(self.counters.outbound, now, self._hairpin_own_error, packet)

    def _hairpin(self, packet: bytes, maddr: int) -> bytes | None:
        """It goes out and comes in again, as two other packets would."""
        if len(packet) < 10 or packet[9] not in PROTOCOLS:
            return packet
        header = read_header(packet)
        if header.protocol == ICMP and header.kind in ICMP_ERRORS:
            return hairpin.error_to_inside_form(self.tables, self.hairpins, packet, header)
        if header.protocol not in WITH_PORTS or not self._leads_inside(header):
            return packet
        held = self.tables.maddr_of(header)
        sent = self._masquerade(packet, held if held and held in self.maddrs else maddr)
        if sent is None:
            return None
        arrived = self._demasquerade(sent, header.saddr)
        if arrived is None or arrived is sent:
            raise Refused("filtered")
        return hairpin.to_inside_form(self.tables, self.hairpins, header, arrived)

    def _leads_inside(self, header: Header) -> bool:
        """Whether a session holds a packet's destination, or it is forwarded."""
        is_held = self.tables.is_held(header.protocol, header.daddr, header.dport)
        return is_held or self._forward_of(header) is not None

    def _hairpin_own_error(self, packet: bytes) -> bytes:
        return hairpin.own_error_from_inside_form(self.hairpins, packet)

    # -- in time ---------------------------------------------------------------------

    def sweep(self, now: float, limit: int) -> bool:
        """Expire what is due, as `Sessions.sweep`; and say what the masquerade itself has to.

        That is to tell senders of SYNs that were held, and to send unanswered probes again.
        """
        with self.lock:
            held = self._refuse_held(now, limit)
            probes = self._resets.due(now, limit) if self._resets else []
            self.outbox.extend(probes)
            return super().sweep(now, limit) or limit in (held, len(probes))

    def _refuse_held(self, now: float, limit: int) -> int:
        """Tell senders of SYNs that no session was made for; how many are held no more."""
        due = self._unsolicited.due(now, limit) if self._unsolicited else {}
        for key, syn in due.items():
            if key not in self.tables.in_index[TCP]:
                maddr = int.from_bytes(syn[DADDR : DADDR + 4], "big")
                self._send_of_our_own(unreachable(syn, PORT_UNREACHABLE, maddr))
        return len(due)

    def masq_address_gone(self, ms: IpMasq, now: float) -> bool:
        """End an entry whose masquerade address the gateway has no more; whether it was ended.

        One that nothing came back for stays, and moves with its next packet.
        """
        with self.lock:
            if ms.flags & NO_REPLY:
                return False
            ended = self.remove(ms)
            if ended and self._resets:
                self._send_of_our_own(self._resets.ended(ms, now))
            self.counters.ended["address"] += ended
            return ended > 0

    # -- the gateway's own -----------------------------------------------------------

    def _own_error(self, packet: bytes) -> bytes | None:
        if packet[9:10] != _ICMP:
            return packet
        header = read_header(packet)
        if header.kind not in ICMP_ERRORS:
            return packet
        inside_form = hairpin.error_to_inside_form(self.tables, self.hairpins, packet, header)
        if inside_form is not packet:
            return inside_form
        return icmp.mend_own_error(self.tables, packet, header)


def _cannot_complete(ms: IpMasq, header: Header) -> bool:
    """Whether an entry that is still open-ended has to wait for the first segment of TCP."""
    is_open = ms.flags & (NO_DADDR | NO_DPORT)
    return is_open != 0 and header.protocol == TCP and not header.is_first_segment
