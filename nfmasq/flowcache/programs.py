"""The programs of the flow cache and their maps, loaded into the kernel.

The layouts of keys and values here are those of `flow_cache.bpf.c`.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
import time
from collections.abc import Iterator
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from pathlib import Path
from typing import NamedTuple

from nfmasq.flowcache.libbpf import ANY, Libbpf

OBJECT = Path(__file__).with_name("flow_cache.bpf.o")

OUT, IN = 0, 1
"""The directions of a packet: to the outside, to the inside."""

STALE = 1
"""A flag of a flow: its packets go to nfmasq until it is put anew."""

INSIDE, OUTSIDE, ETHERNET = 1, 2, 4
"""Flags of an interface: its side of the gateway, and whether its packets have Ethernet headers."""

_COUNTERS = 4096


class Key(ctypes.Structure):
    """What a packet's flow is found by. Addresses and ports are in network order."""

    _fields_ = (
        ("source", c_uint32),
        ("destination", c_uint32),
        ("source_port", c_uint16),
        ("destination_port", c_uint16),
        ("protocol", c_uint8),
        ("direction", c_uint8),
        ("zero", c_uint16),
    )


class Flow(ctypes.Structure):
    """How the packets of a flow are rewritten in one direction, and what was done so far."""

    _fields_ = (
        ("address", c_uint32),
        ("port", c_uint16),
        ("flags", c_uint16),
        ("outside", c_uint32),
        ("address_change", c_uint32),
        ("port_change", c_uint32),
        ("ack", c_uint32),
        ("packets", c_uint64),
        ("bytes", c_uint64),
        ("last", c_uint64),
        ("window", c_uint16),
        ("zero", c_uint16 * 3),
    )


class Datagram(ctypes.Structure):
    """What the end of a datagram is found by, in network order (RFC 791, section 3.2)."""

    _fields_ = (
        ("source", c_uint32),
        ("destination", c_uint32),
        ("identification", c_uint16),
        ("protocol", c_uint8),
        ("zero", c_uint8),
    )


class End(ctypes.Structure):
    """The last bytes of a datagram: of `last`, the last `length` bytes."""

    _fields_ = (("last", c_uint8 * 4), ("length", c_uint32))


class Pace(ctypes.Structure):
    """How fast a host's packets may go on to nfmasq, in nanoseconds on the monotonic clock."""

    _fields_ = (("interval", c_uint64), ("due", c_uint64), ("until", c_uint64))


class Counts(NamedTuple):
    """What all programs have done: by direction, and packets that were dropped.

    `dropped` are those that the guard has dropped, `held` those of hosts that are held to a pace.
    """

    packets_out: int = 0
    packets_in: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    dropped: int = 0
    held: int = 0


_counts = struct.Struct("=6Q")


class Programs:
    """The programs and maps in the kernel, from construction to `close`.

    `size` is how many flows there may be, each in two directions. Raises OSError where the machine
    has no libbpf, and where the kernel does not load the programs.
    """

    def __init__(self, size: int) -> None:
        if sys.byteorder != "little":
            raise OSError("the programs are made for little-endian machines")
        self.libbpf = Libbpf()
        self._object = self.libbpf.open(OBJECT)
        try:
            self._object.set_size("flows", 2 * size)
            self._object.load()
            self.flows = self._object.map("flows")
            self._interfaces = self._object.map("interfaces")
            self._maddrs = self._object.map("maddrs")
            self._counted = self._object.map("counted")
            self._ends = self._object.map("ends")
            self._crowding = self._object.map("crowding")
            self._number_packets()
        except OSError:
            self._object.close()
            raise
        self._all_counts = ctypes.create_string_buffer(_counts.size * self.libbpf.cpus())

    def program(self, name: str) -> int:
        """Return a program's file descriptor."""
        return self._object.program(name)

    def set_interface(self, interface: int, flags: int) -> None:
        """Let the programs know an interface by its index; no flags: forget it. Raises OSError."""
        if flags:
            self._set(self._interfaces, c_uint32(interface), c_uint32(flags))
        else:
            self.libbpf.delete(self._interfaces, ctypes.byref(c_uint32(interface)))

    def add_maddr(self, maddr: int) -> None:
        """Let packets with this address (host order) as their source pass the guard.

        Raises OSError.
        """
        self._set(self._maddrs, c_uint32(address_in_packet(maddr)), c_uint32(1))

    def counts(self) -> Counts:
        """Return what the programs have done so far."""
        self.libbpf.look_up(self._counted, ctypes.byref(c_uint32(0)), self._all_counts)
        return Counts(*map(sum, zip(*self._by_processor(), strict=True)))

    def hold(self, saddr: int, pace: int) -> bool:
        """Let no more packets a second than `pace` go on to nfmasq from an inside host.

        `saddr` is in host order. The host is let go a second after the last packet that was too
        many. Returns False, and does nothing, where it is held already. Raises OSError.
        """
        key, held, now = c_uint32(address_in_packet(saddr)), Pace(), time.monotonic_ns()
        self.libbpf.look_up(self._crowding, ctypes.byref(key), ctypes.byref(held))
        if held.until > now:
            return False
        self._set(self._crowding, key, Pace(10**9 // pace, now, now + 10**9))
        return True

    def take_end(self, packet: bytes) -> bytes:
        """Return up to four bytes that a datagram ends with, where it is too long for NFQUEUE.

        `packet` is its beginning, of a header at least. Returns nothing where no program has seen
        its last fragment, and when it is asked again.
        """
        identity = packet[12:20] + packet[4:6] + packet[9:10] + b"\0"
        of, end = Datagram.from_buffer_copy(identity), End()
        if self.libbpf.look_up(self._ends, ctypes.byref(of), ctypes.byref(end)) < 0:
            return b""
        self.libbpf.delete(self._ends, ctypes.byref(of))
        return bytes(end.last)[-end.length :]

    def close(self) -> None:
        """Close everything. Programs that are attached stay in the kernel, with their maps."""
        self._object.close()

    def _by_processor(self) -> Iterator[tuple[int, ...]]:
        return _counts.iter_unpack(self._all_counts.raw)

    def _number_packets(self) -> None:
        """Have identifications begin at numbers that nobody can guess."""
        source = random.SystemRandom()
        numbers = self._object.map("identifications")
        for counter in range(_COUNTERS):
            self._set(numbers, c_uint32(counter), c_uint32(source.randrange(1, 65536, 2)))

    def _set(self, of_map: int, key: c_uint32, value: c_uint32 | Pace) -> None:
        done = self.libbpf.update(of_map, ctypes.byref(key), ctypes.byref(value), ANY)
        if done < 0:
            raise OSError(-done, "an element cannot be set")


def address_in_packet(address: int) -> int:
    """Return an address as the number that a little-endian machine reads out of a packet."""
    return int.from_bytes(address.to_bytes(4, "big"), "little")
