"""A flow cache in a dictionary: it carries flows as the programs in the kernel do, and counts."""

from __future__ import annotations

from dataclasses import dataclass

from nfmasq.engine import TCP, UDP, IpMasq
from nfmasq.engine.cached import UNUSED, FlowCache, Usage
from nfmasq.engine.table.entry import CACHED_IN, CACHED_OUT
from nfmasq.engine.table.keys import session_key
from nfmasq.engine.wire.checksum import adjust, adjust_udp, difference
from tests.packets import ACK, FIN, RST, SYN

Key = tuple[int, bool, bytes]
"""The protocol of a packet, whether it goes out, and its addresses and ports."""


@dataclass
class Flow:
    """A direction of a flow: the endpoint that its packets get, and what was done so far."""

    address: int
    port: int
    interface: int
    packets: int = 0
    bytes: int = 0
    last: float = 0.0
    told: tuple[int, int] | None = None


class Dictionary(FlowCache):
    """A flow cache in a dictionary, with room for `size` directions of flows.

    `served` has the interfaces by which flows may leave; None: all.
    """

    def __init__(self, size: int = 1000, served: set[int] | None = None) -> None:
        self.flows: dict[Key, Flow] = {}
        self.size = size
        self.served = served

    # -- what the engine asks ------------------------------------------------------

    def put(self, ms: IpMasq, outward: bool, interface: int) -> bool:
        key = key_of(ms, outward)
        if key not in self.flows and len(self.flows) >= self.size:
            return False
        if outward and self.served is not None and interface not in self.served:
            return False
        endpoint = (ms.maddr, ms.mport) if outward else (ms.saddr, ms.sport)
        flow = self.flows.setdefault(key, Flow(*endpoint, interface, told=told_of(ms, outward)))
        assert (flow.address, flow.port) == endpoint, "the flow of another entry is in the cache"
        flow.interface = interface
        return True

    def drop(self, ms: IpMasq) -> Usage:
        usage = self.usage(ms)
        for outward, half in ((True, CACHED_OUT), (False, CACHED_IN)):
            if ms.flags & half:
                del self.flows[key_of(ms, outward)]
        return usage

    def usage(self, ms: IpMasq) -> Usage:
        usage = UNUSED
        if ms.flags & CACHED_OUT:
            flow = self.flows[key_of(ms, True)]
            usage = Usage(flow.packets, flow.bytes, flow.last, told_out=flow.told)
        if ms.flags & CACHED_IN:
            flow = self.flows[key_of(ms, False)]
            incoming = flow.packets, flow.bytes, flow.last
            usage = Usage(*usage[:3], *incoming, usage.told_out, flow.told)
        return usage

    # -- what passes ---------------------------------------------------------------

    def carry(self, packet: bytes, outward: bool, interface: int, now: float) -> bytes | None:
        """Return a packet rewritten; None where the cache does not know it, or leaves it alone."""
        if not needs_a_rewrite_alone(packet):
            return None
        flow = self.flows.get((packet[9], outward, packet[12:24]))
        if flow is None or (outward and flow.interface != interface):
            return None
        flow.packets += 1
        flow.bytes += len(packet)
        flow.last = now
        note_told(flow, packet)
        return rewritten(packet, outward, flow.address, flow.port)

    def passed_elsewhere(self, packet: bytes, outward: bool) -> None:
        """Note what a segment says that the cache would have carried, had it come here."""
        if packet[9] != TCP:
            return
        at = packet[0] % 16 * 4
        flow = self.flows.get((TCP, outward, packet[12:20] + packet[at : at + 4]))
        if flow is not None and packet[at + 13] & (ACK | SYN | FIN | RST) == ACK:
            note_told(flow, packet)


def key_of(ms: IpMasq, outward: bool) -> Key:
    """Return by what the packets of an entry are found in one direction."""
    if outward:
        return ms.protocol, True, session_key(ms.saddr, ms.daddr, ms.sport, ms.dport)
    return ms.protocol, False, session_key(ms.daddr, ms.maddr, ms.dport, ms.mport)


def note_told(flow: Flow, packet: bytes) -> None:
    """Note the ACK number and the window of a segment."""
    if packet[9] == TCP:
        at = packet[0] % 16 * 4
        flow.told = _number(packet, at + 8, 4), _number(packet, at + 14, 2)


def told_of(ms: IpMasq, outward: bool) -> tuple[int, int] | None:
    """Return the ACK number and window of the newest segment in one direction."""
    numbers, window = (ms.numbers_out, ms.window_out) if outward else (ms.numbers_in, ms.window_in)
    return None if numbers is None or window is None else (numbers & 0xFFFFFFFF, window)


def needs_a_rewrite_alone(packet: bytes) -> bool:
    """Say whether a packet may be one that the programs rewrite, if its flow is known."""
    if len(packet) < 28 or packet[0] != 0x45 or packet[6] & 0x3F or packet[7]:
        return False
    if int.from_bytes(packet[2:4], "big") != len(packet):
        return False
    if packet[9] == UDP:
        return 8 <= int.from_bytes(packet[24:26], "big") <= len(packet) - 20
    if packet[9] != TCP or len(packet) < 40 or not 20 <= packet[32] // 16 * 4 <= len(packet) - 20:
        return False
    return packet[33] & (ACK | SYN | FIN | RST) == ACK


def rewritten(packet: bytes, outward: bool, address: int, port: int) -> bytes:
    """Return a packet from another source, if it goes out, or to another destination."""
    address_at, port_at = (12, 20) if outward else (16, 22)
    check_at, adjusted = (36, adjust) if packet[9] == TCP else (26, adjust_udp)
    addressed = difference(_number(packet, address_at, 4), address)
    ported = difference(_number(packet, port_at, 2), port)
    new = bytearray(packet)
    new[10:12] = adjust(_number(packet, 10, 2), addressed).to_bytes(2, "big")
    checksum = adjusted(_number(packet, check_at, 2), addressed + ported)
    new[check_at : check_at + 2] = checksum.to_bytes(2, "big")
    new[address_at : address_at + 4] = address.to_bytes(4, "big")
    new[port_at : port_at + 2] = port.to_bytes(2, "big")
    return bytes(new)


def _number(packet: bytes, at: int, size: int) -> int:
    return int.from_bytes(packet[at : at + size], "big")
