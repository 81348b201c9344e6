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

from collections.abc import Callable
from typing import Any

from nfmasq.engine import icmp, mapping
from nfmasq.engine.checksum import with_checksum
from nfmasq.engine.counters import ICMP, PROTOCOLS, TCP, Traffic, protocol_name
from nfmasq.engine.entry import (
    DLOOSE,
    HASHED,
    NO_DADDR,
    NO_DPORT,
    NO_REPLY,
    NO_SPORT,
    IpMasq,
)
from nfmasq.engine.fastpath import known_flow_in, known_flow_out
from nfmasq.engine.header import (
    ICMP_ERRORS,
    ICMP_QUERIES,
    ICMP_REPLIES,
    Header,
    Refused,
    read_header,
    records_addresses,
)
from nfmasq.engine.rewrite import rewrite_destination, rewrite_source
from nfmasq.engine.sequence import fix_sequence
from nfmasq.engine.sessions import Sessions
from nfmasq.engine.states import ACK, RST, SYN, state_after_in, state_after_out

_ICMP = bytes((ICMP,))
_OURS = frozenset(bytes((number,)) for number in PROTOCOLS)


def _plain_way_only(*_: object) -> None:
    """In place of the fast path: there is none."""


class Masquerade(Sessions):
    """All sessions of one masquerade, and the packets' ways through them.

    Packets are whole IPv4 packets, bytes in network order; addresses are ints in host order;
    `now` is in seconds, on one clock that never goes back. A packet may be `unsummed`: its TCP or
    UDP checksum was left to the network card (`checksum.py`). Settings are those of `Sessions`;
    without `fast` every packet takes the plain way.
    """

    def __init__(self, *, fast: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self._known_flow_out = known_flow_out(self) if fast else _plain_way_only
        self._known_flow_in = known_flow_in(self) if fast else _plain_way_only

    def ip_fw_masquerade(
        self, packet: bytes, maddr: int, now: float, unsummed: bool = False
    ) -> bytes | None:
        """A packet from the inside to the outside; `maddr` is what a new session is put on."""
        sent = self._known_flow_out(packet, maddr, now, unsummed)
        if sent is not None:
            return sent
        if unsummed:
            packet = with_checksum(packet)
        return self._judge(self.counters.outbound, now, self._masquerade, packet, maddr)

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
        header = read_header(packet)
        if records_addresses(packet, header):
            raise Refused("ip_option")
        daddr, dport = header.daddr, header.dport
        if header.protocol == ICMP:
            if header.kind in ICMP_ERRORS:
                return icmp.masquerade_error(self.tables, packet, header)
            if header.kind not in ICMP_QUERIES:
                raise Refused("unknown")
            dport = 0
        ms = self.ip_masq_out_get(header.protocol, header.saddr, header.sport, daddr, dport)
        if ms is None:
            ms = self.ip_masq_new(
                header.protocol, maddr, 0, header.saddr, header.sport, daddr, dport, NO_REPLY
            )
        if ms is None:
            return None
        try:
            if ms.maddr != maddr and ms.flags & NO_REPLY and not self.ip_masq_move(ms, maddr):
                return None
            self._complete_out(ms, header.sport, daddr, dport)
            return self._send_out(ms, packet, header)
        finally:
            self.ip_masq_put(ms)

    def _complete_out(self, ms: IpMasq, sport: int, daddr: int, dport: int) -> None:
        """Learn from a packet from the inside what the entry leaves open."""
        if ms.flags & NO_SPORT:
            self._rehash(ms, sport=sport, flags=ms.flags & ~NO_SPORT)
        if ms.flags & (NO_DADDR | NO_DPORT):
            known = ms.flags & ~(NO_DADDR | NO_DPORT)
            self._rehash(ms, daddr=daddr, dport=dport, flags=known)
        elif ms.flags & DLOOSE:
            ms.daddr, ms.dport = daddr, dport

    def _send_out(self, ms: IpMasq, packet: bytes, header: Header) -> bytes:
        rewritten = rewrite_source(packet, header, ms.maddr, ms.mport)
        if ms.app is not None:
            rewritten = bytearray(ms.app.packet_out(ms, bytes(rewritten)))
        if header.protocol == TCP:
            if ms.out_seq is not None or ms.in_seq is not None:
                fix_sequence(rewritten, header, ms.out_seq, ms.in_seq)
            ms.enter(state_after_out(ms.state, header.kind))
        ms.packets_out += 1
        ms.bytes_out += len(rewritten)
        return bytes(rewritten)

    # -- outside to inside ---------------------------------------------------------

    def _demasquerade(self, packet: bytes) -> bytes | None:
        if packet[9:10] not in _OURS:
            return packet
        header = read_header(packet)
        sport = header.sport
        if header.protocol == ICMP:
            if header.kind in ICMP_ERRORS:
                return icmp.demasquerade_error(self.tables, packet, header)
            if header.kind not in ICMP_REPLIES:
                return packet
            sport = 0
        ms = self.ip_masq_in_get(header.protocol, header.saddr, sport, header.daddr, header.dport)
        if ms is None:
            ms = self._admit(header)
        if ms is None:
            return packet
        try:
            if ms.flags & NO_SPORT:
                return packet  # whither is not known before the inside has sent
            self._complete_in(ms, header.saddr, sport)
            return self._send_in(ms, packet, header)
        finally:
            self.ip_masq_put(ms)

    def _admit(self, header: Header) -> IpMasq | None:
        """A new session that a packet of none may make, as the filtering has it, or None.

        Over TCP only a connection's first segment makes one.
        """
        if header.protocol == ICMP:
            return None
        if header.protocol == TCP and header.kind & (SYN | ACK | RST) != SYN:
            return None
        like = mapping.session_that_admits(
            self.tables, self.filtering, header.protocol, header.saddr, header.daddr, header.dport
        )
        if like is None or self._is_elsewhere(like, header) or self._is_half_full():
            return None
        return self.ip_masq_new(
            header.protocol,
            like.maddr,
            like.mport,
            like.saddr,
            like.sport,
            header.saddr,
            header.sport,
            0,
        )

    def _is_elsewhere(self, like: IpMasq, header: Header) -> bool:
        """Whether the inside endpoint has its session with this outside endpoint on another port.

        A packet from the outside must not move it.
        """
        ms = self.tables.ip_masq_out_get_unlocked(
            header.protocol, like.saddr, like.sport, header.saddr, header.sport
        )
        if ms is not None:
            self.tables.ip_masq_put_unlocked(ms)
        return ms is not None

    def _is_half_full(self) -> bool:
        """Whether sessions made from outside would take the room that the inside needs."""
        return sum(map(self.entry_count, PROTOCOLS)) * 2 >= self.max_entries

    def _complete_in(self, ms: IpMasq, saddr: int, sport: int) -> None:
        """Learn from a packet from the outside what the entry leaves open."""
        ms.flags &= ~NO_REPLY
        if ms.flags & (NO_DADDR | NO_DPORT):
            known = ms.flags & ~(NO_DADDR | NO_DPORT)
            self._rehash(ms, daddr=saddr, dport=sport, flags=known)
        elif ms.flags & DLOOSE:
            ms.daddr, ms.dport = saddr, sport

    def _send_in(self, ms: IpMasq, packet: bytes, header: Header) -> bytes:
        rewritten = rewrite_destination(packet, header, ms.saddr, ms.sport)
        if ms.app is not None:
            rewritten = bytearray(ms.app.packet_in(ms, bytes(rewritten)))
        if header.protocol == TCP:
            if ms.out_seq is not None or ms.in_seq is not None:
                fix_sequence(rewritten, header, ms.in_seq, ms.out_seq)
            ms.enter(state_after_in(ms.state, header.kind))
        ms.packets_in += 1
        ms.bytes_in += len(rewritten)
        return bytes(rewritten)

    # -- the gateway's own -----------------------------------------------------------

    def _own_error(self, packet: bytes) -> bytes | None:
        if packet[9:10] != _ICMP:
            return packet
        header = read_header(packet)
        if header.kind not in ICMP_ERRORS:
            return packet
        return icmp.mend_own_error(self.tables, packet, header)

    def _rehash(self, ms: IpMasq, **changes: int) -> None:
        """Change what the tables know an entry by: unhash, change, hash."""
        self.tables.ip_masq_unhash(ms)
        for name, value in changes.items():
            setattr(ms, name, value & ~HASHED if name == "flags" else value)
        self.tables.ip_masq_hash(ms)
