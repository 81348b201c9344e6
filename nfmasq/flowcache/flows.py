"""The flows in the kernel's map: what the engine knows as its cache.

A direction of a flow is one element of the map: under the key of its packets stands what takes the
place of their source or destination, and by how much the checksums change by that. The programs
count in the element, and note what the newest segment of TCP acknowledges. All calls come with the
engine's lock held, so the buffers are shared.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Collection
from socket import htonl, htons, ntohl, ntohs

from nfmasq.engine.cached import UNUSED, FlowCache, Usage
from nfmasq.engine.table.entry import CACHED_IN, CACHED_OUT, IpMasq
from nfmasq.engine.wire.protocols import TCP
from nfmasq.engine.wire.sequence import after
from nfmasq.flowcache.libbpf import ANY, CREATE
from nfmasq.flowcache.programs import IN, OUT, STALE, Flow, Key, Programs, address_in_packet

_NANOSECONDS = 1e9


class Flows(FlowCache):
    """The flows that the programs know.

    `served` has the indices of the interfaces at which the programs rewrite packets as they leave.
    While it is empty no flow is carried.
    """

    def __init__(self, programs: Programs, served: Collection[int]) -> None:
        library = programs.libbpf
        self._map = programs.flows
        self._served = served
        self._update, self._look_up, self._take = library.update, library.look_up, library.take
        self._key, self._flow = Key(), Flow()
        self._key_at, self._flow_at = ctypes.byref(self._key), ctypes.byref(self._flow)

    def put(self, ms: IpMasq, outward: bool, interface: int) -> bool:
        """Carry one direction of a flow from now on; False where that cannot be."""
        if not self._served or (outward and interface not in self._served):
            return False
        self._set_key(ms, OUT if outward else IN)
        self._set_flow(ms, outward, interface)
        done = self._update(self._map, self._key_at, self._flow_at, CREATE)
        if done == -errno.EEXIST:
            return self._put_anew(ms, outward, interface)
        return bool(done == 0)

    def drop(self, ms: IpMasq) -> Usage:
        """Carry a flow no longer, from this moment on; returns its last usage."""
        return self._usage(ms, self._take)

    def usage(self, ms: IpMasq) -> Usage:
        """Return what has been done for a flow that is carried."""
        return self._usage(ms, self._look_up)

    def _put_anew(self, ms: IpMasq, outward: bool, interface: int) -> bool:
        """Put a direction that is in the map already, if it is out of date there."""
        flow = self._flow
        self._look_up(self._map, self._key_at, self._flow_at)
        if not flow.flags & STALE and (flow.outside == interface or not outward):
            return True
        self._take(self._map, self._key_at, self._flow_at)
        done = flow.packets, flow.bytes, flow.last
        told = self._told(ms, outward)
        self._set_flow(ms, outward, interface)
        flow.packets, flow.bytes, flow.last = done
        if told is not None:
            flow.ack, flow.window = htonl(told[0]), htons(told[1])
        return bool(self._update(self._map, self._key_at, self._flow_at, ANY) == 0)

    def _usage(self, ms: IpMasq, read: ctypes._NamedFuncPointer) -> Usage:
        flow, usage = self._flow, UNUSED
        if ms.flags & CACHED_OUT:
            self._set_key(ms, OUT)
            if read(self._map, self._key_at, self._flow_at) == 0:
                last, told = flow.last / _NANOSECONDS, self._told(ms, outward=True)
                usage = Usage(flow.packets, flow.bytes, last, told_out=told)
        if ms.flags & CACHED_IN:
            self._set_key(ms, IN)
            if read(self._map, self._key_at, self._flow_at) == 0:
                last, told = flow.last / _NANOSECONDS, self._told(ms, outward=False)
                incoming = flow.packets, flow.bytes, last
                usage = Usage(*usage[:3], *incoming, usage.told_out, told)
        return usage

    def _told(self, ms: IpMasq, outward: bool) -> tuple[int, int] | None:
        """Return the ACK number and window of a direction's newest segment; None over UDP.

        Where the direction is out of date in the map, newer segments may have passed elsewhere.
        """
        if ms.protocol != TCP:
            return None
        flow = self._flow
        told = ntohl(flow.ack), ntohs(flow.window)
        elsewhere = _told_of(ms, outward)
        is_newer = flow.flags & STALE and after(elsewhere[0], told[0])
        return elsewhere if is_newer else told

    def _set_key(self, ms: IpMasq, direction: int) -> None:
        key, outside = self._key, (ms.daddr, ms.dport)
        if direction == OUT:
            source, destination = (ms.saddr, ms.sport), outside
        else:
            source, destination = outside, (ms.maddr, ms.mport)
        key.source, key.source_port = _in_packet(source)
        key.destination, key.destination_port = _in_packet(destination)
        key.protocol, key.direction = ms.protocol, direction

    def _set_flow(self, ms: IpMasq, outward: bool, interface: int) -> None:
        flow = self._flow
        inside, masquerade = _in_packet((ms.saddr, ms.sport)), _in_packet((ms.maddr, ms.mport))
        before, after = (inside, masquerade) if outward else (masquerade, inside)
        flow.address, flow.port = after
        flow.outside = interface if outward else 0
        flow.address_change, flow.port_change = map(_change, before, after)
        flow.flags = flow.packets = flow.bytes = flow.last = 0
        ack, window = _told_of(ms, outward)
        flow.ack, flow.window = htonl(ack), htons(window)


def _told_of(ms: IpMasq, outward: bool) -> tuple[int, int]:
    """Return the ACK number and window that an entry knows of a direction; zeros: none."""
    if outward:
        return (ms.numbers_out or 0) & 0xFFFFFFFF, ms.window_out or 0
    return (ms.numbers_in or 0) & 0xFFFFFFFF, ms.window_in or 0


def _in_packet(endpoint: tuple[int, int]) -> tuple[int, int]:
    """Return address and port as the numbers that a little-endian machine reads out of a packet."""
    address, port = endpoint
    return address_in_packet(address), (port & 0xFF) << 8 | port >> 8


def _change(old: int, new: int) -> int:
    """Return what the checksum's sum changes by: ~old + new, in one's complement of 32 bits.

    It is 0 only where nothing changes.
    """
    if old == new:
        return 0
    total = (~old & 0xFFFFFFFF) + new
    return (total & 0xFFFFFFFF) + (total >> 32)
