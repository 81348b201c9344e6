"""The masquerade: a packet and a time go in, the packet to send on comes out.

A packet from the inside (`ip_fw_masquerade`) is put on the masquerade address and a port of this
address, for its session, which is made if there is none. A packet from the outside
(`ip_fw_demasquerade`) that belongs to a session goes on to the inside machine; a packet that
belongs to no session is not ours and is left alone. From the inside nothing passes that was not
rewritten: a packet that is malformed, of an unsupported kind, or cannot get a port is dropped and
counted.

A verdict is the packet to send on: the same object where it passes untouched, another object where
it was rewritten, None where it is dropped.

A `Masquerade` has its parts, and each can be read by itself:

    sessions   the entries: how they begin, change and end (`sessions.py`)
    outbound   the way of a packet from the inside (`outbound.py`)
    inbound    the way of a packet from the outside (`inbound.py`)
    hairpins   the flows between inside machines, for the second step of a hairpin (`hairpin.py`)
    own_flows  the gateway's own flows from masquerade ports (`own_flows.py`)

A packet tries the fast path first (`fastpath.py`). Nearly every packet needs no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeAlias

from nfmasq.engine import fastpath, hairpin, icmp
from nfmasq.engine.cached import FlowCache
from nfmasq.engine.counters import Traffic
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.helper.app import Apps
from nfmasq.engine.inbound import Inbound
from nfmasq.engine.outbound import Outbound
from nfmasq.engine.own_flows import OwnFlows
from nfmasq.engine.sessions import Lock, Sessions
from nfmasq.engine.settings import Settings
from nfmasq.engine.table.endings import ADDRESS
from nfmasq.engine.table.entry import HASHED, NO_REPLY, IpMasq
from nfmasq.engine.wire.checksum import with_checksum
from nfmasq.engine.wire.header import ICMP_ERRORS, Header, Refused, SessionRefused, read_header
from nfmasq.engine.wire.identification import Identification
from nfmasq.engine.wire.protocols import ICMP, PROTOCOLS, WITH_PORTS, protocol_name

MOST_TO_SEND = 65_536
"""The most packets that wait in `outbox`; when there are more, the oldest are forgotten."""

Way: TypeAlias = "Callable[..., bytes | None]"


def _plain_way_only(*_: object) -> None:
    """Take the place of the fast path where it is turned off: judge no packet."""


class Masquerade:
    """All sessions of one masquerade, and the packets' ways through them.

    Packets are whole IPv4 packets, bytes in network order; addresses are ints in host order; `now`
    is in seconds, on one clock that never goes back. A packet may be `unsummed`: its TCP or UDP
    checksum was left to the network card (`wire/checksum.py`). An `unsummed` packet of another
    protocol raises UnknownChecksum, and is to come again when the kernel has filled the checksum
    in.

    `lock` must be reentrant where it is a real lock; without `fast` every packet takes the plain
    way. `outbox` collects the packets that the masquerade itself has to send. Whoever uses this
    object sends them, and fills in a source address where it is 0.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        apps: Apps | None = None,
        forwards: Forwards | None = None,
        *,
        lock: Lock | None = None,
        fast: bool = True,
    ) -> None:
        settings = settings or Settings()
        self.outbox: deque[bytes] = deque(maxlen=MOST_TO_SEND)
        self.identification = Identification()
        self.hairpins = hairpin.Hairpins()
        self.sessions = Sessions(settings, apps or {}, forwards or Forwards(), lock)
        self.sessions.watch.subscribe(fastpath.Invalidation())
        self.sessions.watch.subscribe(self.hairpins)
        self.outbound = Outbound(self.sessions, self.outbox, settings)
        self.inbound = Inbound(self.sessions, self.outbox, settings)
        self.sessions.watch.subscribe(self.outbound)
        self.own_flows = OwnFlows(self.sessions, self.inbound)
        self._counters = self.sessions.counters
        self._fast = fast
        self._set_up_fast_ways(settings)

    def configure(
        self, settings: Settings, apps: Apps | None = None, forwards: Forwards | None = None
    ) -> None:
        """Use other settings from now on, with these helpers and forwards; none where not given.

        This may be called at any time, and no session ends by it (`Sessions.configure`).
        """
        with self.sessions.lock:
            self.sessions.configure(settings, apps or {}, forwards or Forwards())
            self.outbound.configure(settings)
            self.inbound.configure(settings)
            self._set_up_fast_ways(settings)

    def use_cache(self, cache: FlowCache | None) -> None:
        """Have a flow cache carry the flows that last, from now on; None: every packet comes here.

        Whoever hands the packets over looks into `sessions.cached.lasting` after each.
        """
        with self.sessions.lock:
            self.sessions.cached.use(cache)
            self.identification.shared = cache is not None
            self._set_up_fast_ways(self._settings)

    def flush(self) -> int:
        """End all entries at one stroke; returns how many (`Sessions.flush`)."""
        with self.sessions.lock:
            ended = self.sessions.flush()
            self._set_up_fast_ways(self._settings)  # they look into the indices of the tables
            return ended

    def enter_lasting(self) -> None:
        """Have the cache carry the flows that are due (`sessions.cached.due`)."""
        with self.sessions.lock:
            self.sessions.cached.enter()

    def _set_up_fast_ways(self, settings: Settings) -> None:
        self._settings = settings
        self._known_flow_out: fastpath.Out = _plain_way_only
        self._known_flow_in: fastpath.In = _plain_way_only
        if self._fast:
            self._known_flow_out = fastpath.known_flow_out(
                self.sessions, self.outbound.open_flow, self.identification.renewed
            )
            self._known_flow_in = fastpath.known_flow_in(self.sessions, settings.inbound_refresh)

    # -- the packets' ways ---------------------------------------------------------

    def ip_fw_masquerade(
        self, packet: bytes, maddr: int, now: float, unsummed: bool = False
    ) -> bytes | None:
        """Judge a packet from the inside; `maddr` is the masquerade address for a new session."""
        sent = self._known_flow_out(packet, maddr, now, unsummed)
        if sent is not None:
            return sent
        if unsummed:
            packet = with_checksum(packet)
        way = self.outbound.masquerade
        sent = self._judge(self._counters.outbound, now, way, packet, maddr)
        return sent and self.identification.renewed(sent)

    def ip_fw_demasquerade(self, packet: bytes, now: float, unsummed: bool = False) -> bytes | None:
        """Judge a packet from the outside.

        A packet of a session goes on to the inside, any other packet goes to the gateway.
        """
        sent = self._known_flow_in(packet, now, unsummed)
        if sent is not None:
            return sent
        way = self.inbound.demasquerade
        if not unsummed:
            return self._judge(self._counters.inbound, now, way, packet)
        summed = with_checksum(packet)
        sent = self._judge(self._counters.inbound, now, way, summed)
        return packet if sent is summed else sent

    def ip_fw_own(self, packet: bytes, now: float, unsummed: bool = False) -> bytes | None:
        """Judge a packet of the gateway's own.

        It may be an ICMP error about a rewritten packet. Or it may come from a masquerade port:
        then it leaves from another port, if the masquerade needs this port (`own_flows.py`).
        """
        summed = with_checksum(packet) if unsummed else packet
        sent = self._judge(self._counters.outbound, now, self._own, summed)
        return packet if sent is summed else sent

    def ip_fw_hairpin(
        self, packet: bytes, maddr: int, now: float, unsummed: bool = False
    ) -> bytes | None:
        """Take the first step of a hairpin: a packet from the inside to an address of the gateway.

        The packet goes on to the inside machine that has the port, or, as the same object, to the
        gateway. `maddr` is the masquerade address for a new session, unless the sender's endpoint
        is already on an address that the gateway has.
        """
        summed = with_checksum(packet) if unsummed else packet
        sent = self._judge(self._counters.outbound, now, self._hairpin, summed, maddr)
        return packet if sent is summed else sent

    def ip_fw_hairpin_source(
        self, packet: bytes, now: float, unsummed: bool = False
    ) -> bytes | None:
        """Take the second step of a hairpin: a packet on its way out to the inside machine.

        The first step has counted the packet; only its loss is counted here.
        """
        if unsummed:
            packet = with_checksum(packet)
        with self.sessions.lock:
            try:
                sent = hairpin.from_inside_form(self.hairpins, packet)
                return self.identification.renewed(sent)
            except Refused as refusal:
                self.sessions.drop(packet, refusal.reason)
                self._counters.outbound[protocol_name(packet)].count(None)
                return None

    def ip_fw_hairpin_own_error(self, packet: bytes, now: float) -> bytes | None:
        """Judge a packet of the gateway's own to the inside; it may be an error about a hairpin."""
        return self._judge(self._counters.outbound, now, self._hairpin_own_error, packet)

    def _judge(
        self, traffic: dict[str, Traffic], now: float, way: Way, packet: bytes, *maddr: int
    ) -> bytes | None:
        """Send a packet its way, and count what becomes of the packet."""
        with self.sessions.lock:
            self.sessions.now = now
            try:
                sent = way(packet, *maddr)
            except SessionRefused:
                sent = None
            except Refused as refusal:
                self.sessions.drop(packet, refusal.reason)
                sent = None
            traffic[protocol_name(packet)].count(sent)
        return sent

    def _hairpin(self, packet: bytes, maddr: int) -> bytes | None:
        """Send a packet out and in again, as two separate packets would go."""
        if len(packet) < 10 or packet[9] not in PROTOCOLS:
            return packet
        tables = self.sessions.tables
        header = read_header(packet)
        if header.protocol == ICMP and header.kind in ICMP_ERRORS:
            return hairpin.error_to_inside_form(tables, self.hairpins, packet, header)
        if header.protocol not in WITH_PORTS or not self.inbound.leads_inside(header):
            return packet
        sent = self.outbound.masquerade(packet, self._maddr_of(header) or maddr)
        if sent is None:
            return None
        arrived = self.inbound.demasquerade(sent, header.saddr)
        if arrived is sent:
            raise Refused("filtered")
        return hairpin.to_inside_form(tables, self.hairpins, header, arrived)

    def _maddr_of(self, header: Header) -> int | None:
        """Return the masquerade address of a packet's sender, if the gateway has it; or None."""
        return self.sessions.tables.maddr_of(header, self.inbound.maddrs)

    def _hairpin_own_error(self, packet: bytes) -> bytes:
        return hairpin.own_error_from_inside_form(self.hairpins, packet)

    def _own(self, packet: bytes) -> bytes | None:
        if len(packet) < 10 or packet[9] not in PROTOCOLS:
            return packet
        header = read_header(packet)
        if header.protocol != ICMP or header.kind not in ICMP_ERRORS:
            return self.own_flows.masquerade(packet, header)
        tables = self.sessions.tables
        inside_form = hairpin.error_to_inside_form(tables, self.hairpins, packet, header)
        if inside_form is not packet:
            return inside_form
        return icmp.mend_own_error(tables, packet, header)

    # -- in time ---------------------------------------------------------------------

    def sweep(self, now: float, limit: int) -> bool:
        """Expire what is due, looking at `limit` entries at most; true where more is due.

        Also tell the senders of SYNs that were held, and send unanswered probes again, `limit` of
        each at most, by way of `outbox`.
        """
        with self.sessions.lock:
            held = self.inbound.refuse_held(now, limit)
            resets = self.outbound.resets
            probes = resets.due(now, limit) if resets else []
            self.outbox.extend(probes)
            return self.sessions.sweep(now, limit) or limit in (held, len(probes))

    def hosts_are_there(self, addresses: Iterable[int], now: float) -> None:
        """Note that inside hosts have shown that they are there, in another way than by packets.

        Addresses are in host order.
        """
        with self.sessions.lock:
            for address in addresses:
                self.sessions.hosts.is_there(address, now)

    def hosts_unknown(self, addresses: Iterable[int]) -> set[int]:
        """Return those inside hosts that have sessions, and have not shown that they are there.

        Addresses are in host order.
        """
        hosts = self.sessions.hosts
        with self.sessions.lock:
            return {
                address
                for address in addresses
                if hosts.entries_of(address) and not hosts.is_genuine(address)
            }

    def masq_address_gone(self, ms: IpMasq, now: float) -> bool:
        """End an entry whose masquerade address the gateway has no more; returns whether it ended.

        An entry that nothing came back for stays, and moves with its next packet.
        """
        with self.sessions.lock:
            if ms.flags & (HASHED | NO_REPLY) != HASHED:
                return False
            self.sessions.now = now
            self.sessions.remove(ms, ADDRESS)
            return True
