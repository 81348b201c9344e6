"""The way of a packet whose flow is known: one look-up, and a few bytes put in place.

Nearly all packets go this way: packets of TCP or UDP, without IP options, of an entry that has no
helper and that exists already or can be made at once (`outbound.py`). A packet that is anything
else, or in any way odd, is not judged here: the answer is None, and the packet takes the plain way
(`masquerade.py`). For each packet that is judged here, the plain way has the same result to the
byte.

The bytes 12 to 23 of a header without options, addresses and ports, are the key of the index. What
follows the key is read by one unpacking and written by one packing. The rest of the packet is not
looked at, unless its checksum is still to be computed (`unsummed`, see `checksum.py`).

The packet holds a reference to its entry, which is not counted but in the hand (`table/hand.py`):
so the entry does not expire meanwhile. The lock is taken only where a packet makes an entry, or
changes its entry's flags, or its entry's state and with the state the timer's slot. Nothing else
here changes the tables or the wheel.

Of each segment its numbers and its window are put into the entry, unread. They are read when a
segment comes that is no plain ACK and so may change the state (`table/numbers.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from nfmasq.engine.sessions import Lock, Sessions
from nfmasq.engine.table.entry import HASHED, NO_REPLY, OWN, UNCONFIRMED, IpMasq
from nfmasq.engine.table.numbers import EVENTS
from nfmasq.engine.table.precomputed import Rewrite
from nfmasq.engine.table.states import AFTER_ACK_IN, AFTER_ACK_OUT
from nfmasq.engine.watch import Identity, Watcher
from nfmasq.engine.wire.checksum import ones_sum
from nfmasq.engine.wire.protocols import ACK, ICMP, SYN, TCP, UDP

# Version, length, fragment, checksum, the endpoint that stays as it is, and what follows up to the
# transport checksum: the length of UDP, the bytes of TCP from the sequence number to the window.
_read_udp_out = Struct("!BxHxxHxxH4xI2xHHH").unpack_from
_read_udp_in = Struct("!BxHxxHxxHI4xH2xHH").unpack_from
_read_tcp_out = Struct("!BxHxxHxxH4xI2xHQBBHH").unpack_from
_read_tcp_in = Struct("!BxHxxHxxHI4xH2xQBBHH").unpack_from
_write_udp = Struct("!HIIHHHH").pack
_write_tcp = Struct("!HIIHHQBBHH").pack

_UDP_LEAST, _TCP_LEAST = 28, 40
_PLAIN_HEADER = 0x45
_LARGE = 4096
"""A packet of this many bytes or more is copied by a view, which saves a copy. To make a view takes
a while: for a smaller packet that does not pay."""
_DONT_FRAGMENT, _FRAGMENTED = 0x4000, 0x3FFF
_TO_BE_HEARD = NO_REPLY | UNCONFIRMED
"""Flags of an entry that a packet from the outside may take away."""

Out = Callable[[bytes, int, float, bool], "bytes | None"]
In = Callable[[bytes, float, bool], "bytes | None"]
OpenFlow = Callable[[int, bytes, int, int, float], "IpMasq | None"]


class Invalidation(Watcher):
    """Takes the rewrite from an entry whose identity has changed or to which a helper is bound."""

    def moved(self, ms: IpMasq, before: Identity) -> None:
        """Take the rewrite away, so that it is computed anew."""
        ms.rewrite = None

    def helped(self, ms: IpMasq) -> None:
        """Take the rewrite away, so that packets take the plain way, where the helper sees them."""
        ms.rewrite = None


def precompute(ms: IpMasq, lock: Lock) -> Rewrite | None:
    """Give an entry its rewrite, and return it; None where the packet has to take the plain way.

    The entry may have ended just now, or its packets may need more. An entry that
    `Outbound.open_flow` made has a rewrite from the beginning. Any other entry gets its rewrite
    here, with the next packet.
    """
    if _needs_more(ms):
        return None
    with lock:
        if not ms.flags & HASHED:
            return None
        ms.rewrite = (
            _of_neighbour(ms, ms.s_link)
            or _of_neighbour(ms, ms.s_back)
            or Rewrite(ms.saddr, ms.sport, ms.maddr, ms.mport)
        )
        return ms.rewrite


def _needs_more(ms: IpMasq) -> bool:
    """Say whether the packets of an entry need more than a rewrite, or go on untouched."""
    if ms.protocol == ICMP or ms.app is not None or ms.out_seq is not None or ms.in_seq is not None:
        return True
    return ms.flags & OWN > 0


def _of_neighbour(ms: IpMasq, other: IpMasq | None) -> Rewrite | None:
    """Return the rewrite of a neighbour in the s-table, if it has the mapping of `ms`."""
    if other is None or (other.maddr, other.mport) != (ms.maddr, ms.mport):
        return None
    return other.rewrite


def known_flow_out(
    sessions: Sessions, open_flow: OpenFlow, renewed: Callable[[bytes], bytes]
) -> Out:
    """Make the function that sends a packet from the inside the fast way.

    The function takes (packet, maddr, now, unsummed), as `Masquerade.ip_fw_masquerade` does. It
    returns the rewritten packet, or None where the packet has to take the plain way. `open_flow`
    makes the entry of a flow's first packet (`Outbound.open_flow`). `renewed` gives a new
    identification to a packet that may be fragmented (`identification.py`).
    """
    index, traffic_of = sessions.tables.out_index, sessions.counters.outbound
    udp_entry, tcp_entry = index[UDP].get, index[TCP].get
    udp_traffic, tcp_traffic = traffic_of["udp"], traffic_of["tcp"]
    enter, may_enter = sessions.ip_masq_enter, sessions.ip_masq_may_enter
    hand, lock = sessions.hand, sessions.lock
    cached, passes = sessions.cached, sessions.ip_masq_segment
    lasting, after = cached.lasting if cached.cache else None, cached.after

    def out(packet: bytes, maddr: int, now: float, unsummed: bool) -> bytes | None:
        length = len(packet)
        if length < _UDP_LEAST:
            return None
        protocol = packet[9]
        key = packet[12:24]
        if protocol == UDP:
            version, total, offset, ip_checksum, daddr, dport, size, checksum = _read_udp_out(
                packet
            )
            if version != _PLAIN_HEADER or total != length or offset & _FRAGMENTED:
                return None
            if size < 8 or size > length - 20:
                return None
            ms = udp_entry(key) or open_flow(UDP, key, 0, maddr, now)
            if ms is None:
                return None
            hand.ms = ms
            rewrite = ms.rewrite or precompute(ms, lock)
            if rewrite is None or rewrite.maddr != maddr:
                hand.ms = None
                return None
            if unsummed:
                checksum = 65535 - ones_sum(packet[20:])
            if checksum:
                checksum = (checksum + rewrite.transport_change) % 65535 or 65535
            header = _write_udp(
                (ip_checksum + rewrite.address_change) % 65535,
                maddr,
                daddr,
                rewrite.mport,
                dport,
                size,
                checksum,
            )
            unchanged = 28
            traffic = udp_traffic
        elif protocol == TCP and length >= _TCP_LEAST:
            (
                version,
                total,
                offset,
                ip_checksum,
                daddr,
                dport,
                numbers,
                size,
                flags,
                window,
                checksum,
            ) = _read_tcp_out(packet)
            if version != _PLAIN_HEADER or total != length or offset & _FRAGMENTED:
                return None
            if size < 0x50 or (size >> 2 & 0x3C) > length - 20:
                return None
            ms = tcp_entry(key) or open_flow(TCP, key, flags, maddr, now)
            if ms is None:
                return None
            hand.ms = ms
            rewrite = ms.rewrite or precompute(ms, lock)
            if rewrite is None or rewrite.maddr != maddr:
                hand.ms = None
                return None
            if unsummed:
                checksum = 65535 - ones_sum(packet[20:])
            header = _write_tcp(
                (ip_checksum + rewrite.address_change) % 65535,
                maddr,
                daddr,
                rewrite.mport,
                dport,
                numbers,
                size,
                flags,
                window,
                (checksum + rewrite.transport_change) % 65535,
            )
            unchanged = 38
            traffic = tcp_traffic
        else:
            return None
        if protocol == UDP:
            ms.timer = now + ms.timeout
        elif flags & EVENTS == ACK:
            if (state := AFTER_ACK_OUT[ms.state]) == ms.state:
                ms.numbers_out = numbers
                ms.window_out = window
                ms.timer = now + ms.timeout
            elif may_enter(ms, state, numbers & 0xFFFFFFFF, now):
                ms.numbers_out = numbers
                ms.window_out = window
                enter(ms, state, now)
        else:
            passes(ms, packet, True, now, True)
        hand.ms = None
        packets = ms.packets_out = ms.packets_out + 1
        ms.bytes_out += length
        if lasting is not None and not packets % after:
            lasting.append((ms, True))
        traffic.accepted += 1
        traffic.bytes += length
        rest = packet[unchanged:] if length < _LARGE else memoryview(packet)[unchanged:]
        sent = packet[:10] + header + rest
        return sent if offset & _DONT_FRAGMENT else renewed(sent)

    return out


def known_flow_in(sessions: Sessions, refreshes: bool) -> In:
    """Make the function that sends a packet from the outside the fast way.

    The function takes (packet, now, unsummed), as `Masquerade.ip_fw_demasquerade` does. It returns
    the rewritten packet, or None where the packet has to take the plain way. `refreshes` tells
    whether a packet from the outside restarts its entry's timer.
    """
    index, traffic_of = sessions.tables.in_index, sessions.counters.inbound
    udp_entry, tcp_entry = index[UDP].get, index[TCP].get
    udp_traffic, tcp_traffic = traffic_of["udp"], traffic_of["tcp"]
    enter, heard = sessions.ip_masq_enter, sessions.ip_masq_heard
    hand, lock = sessions.hand, sessions.lock
    cached, passes = sessions.cached, sessions.ip_masq_segment
    lasting, after = cached.lasting if cached.cache else None, cached.after

    def into(packet: bytes, now: float, unsummed: bool) -> bytes | None:
        length = len(packet)
        if length < _UDP_LEAST:
            return None
        protocol = packet[9]
        if protocol == UDP:
            version, total, offset, ip_checksum, saddr, sport, size, checksum = _read_udp_in(packet)
            if version != _PLAIN_HEADER or total != length or offset & _FRAGMENTED:
                return None
            if size < 8 or size > length - 20:
                return None
            ms = udp_entry(packet[12:24])
            if ms is None or (ms.server is not None and not sessions.forwards.serves(ms)):
                return None  # it may begin another session
            hand.ms = ms
            rewrite = ms.rewrite or precompute(ms, lock)
            if rewrite is None:
                hand.ms = None
                return None
            if unsummed:
                checksum = 65535 - ones_sum(packet[20:])
            if checksum:
                checksum = (checksum - rewrite.transport_change) % 65535 or 65535
            header = _write_udp(
                (ip_checksum - rewrite.address_change) % 65535,
                saddr,
                rewrite.saddr,
                sport,
                rewrite.sport,
                size,
                checksum,
            )
            unchanged = 28
            traffic = udp_traffic
        elif protocol == TCP and length >= _TCP_LEAST:
            (
                version,
                total,
                offset,
                ip_checksum,
                saddr,
                sport,
                numbers,
                size,
                flags,
                window,
                checksum,
            ) = _read_tcp_in(packet)
            if version != _PLAIN_HEADER or total != length or offset & _FRAGMENTED:
                return None
            if size < 0x50 or (size >> 2 & 0x3C) > length - 20:
                return None
            ms = tcp_entry(packet[12:24])
            if ms is None or (ms.server is not None and flags & SYN):
                return None  # it may begin another session
            hand.ms = ms
            rewrite = ms.rewrite or precompute(ms, lock)
            if rewrite is None:
                hand.ms = None
                return None
            if unsummed:
                checksum = 65535 - ones_sum(packet[20:])
            header = _write_tcp(
                (ip_checksum - rewrite.address_change) % 65535,
                saddr,
                rewrite.saddr,
                sport,
                rewrite.sport,
                numbers,
                size,
                flags,
                window,
                (checksum - rewrite.transport_change) % 65535,
            )
            unchanged = 38
            traffic = tcp_traffic
        else:
            return None
        if protocol == UDP:
            if ms.flags & _TO_BE_HEARD:
                heard(ms)
            if refreshes:
                ms.timer = now + ms.timeout
        elif flags & EVENTS == ACK:
            if ms.flags & _TO_BE_HEARD:
                heard(ms, numbers & 0xFFFFFFFF)
            ms.numbers_in = numbers
            ms.window_in = window
            if (state := AFTER_ACK_IN[ms.state]) != ms.state:
                enter(ms, state, now)
            elif refreshes:
                ms.timer = now + ms.timeout
        else:
            passes(ms, packet, False, now, refreshes)
        hand.ms = None
        packets = ms.packets_in = ms.packets_in + 1
        ms.bytes_in += length
        if lasting is not None and not packets % after:
            lasting.append((ms, False))
        traffic.accepted += 1
        traffic.bytes += length
        rest = packet[unchanged:] if length < _LARGE else memoryview(packet)[unchanged:]
        return packet[:10] + header + rest

    return into
