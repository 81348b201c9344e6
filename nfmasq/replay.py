"""Runs the engine over a capture, and writes what the packets become into another capture.

A packet from an inside network to elsewhere is judged as from the inside, and a packet to a
masquerade address as from the outside. An ICMP error from a masquerade address is the gateway's
own. A gateway's handler never sees any other packet, so other packets are passed over. What the
masquerade would send of its own accord is not written: no host is there to act on it. The time is
the capture's, and entries expire by it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Network
from pathlib import Path
from typing import BinaryIO

import dpkt

from nfmasq.config import Configuration
from nfmasq.errors import NfmasqError

_RAW_IP = 101
_IPV4 = 0x0800
_VLAN = frozenset({0x8100, 0x88A8})

_TYPE_AND_NETWORK_AT = {1: (12, 14), 113: (14, 16), 276: (0, 20)}
"""By link type (Ethernet, Linux cooked v1, v2): where the protocol's type and the packet stand."""

_BARE = frozenset({12, 14, _RAW_IP, 228})
"""Link types whose frames are IP packets."""

_TIME_OPTIONS = frozenset({dpkt.pcapng.PCAPNG_OPT_IF_TSRESOL, dpkt.pcapng.PCAPNG_OPT_IF_TSOFFSET})

_UNREADABLE = (ValueError, dpkt.dpkt.Error, struct.error)

_STEP = 4096


class Replay:
    """A run of the engine over a capture; `inside` are the networks that are masqueraded."""

    def __init__(self, configuration: Configuration, inside: tuple[IPv4Network, ...]) -> None:
        self.engine = configuration.masquerade()
        self._maddrs = self.engine.inbound.maddrs = configuration.masquerade_addresses
        self._inside = [(int(net.network_address), int(net.netmask)) for net in inside]
        self._now = 0.0
        self.read = self.written = self.dropped = self.passed_over = 0

    def over(self, source: Path, target: Path) -> None:
        """Read the capture at `source`, and write the other one to `target`.

        Raises NfmasqError where `source` cannot be read as a capture, or `target` cannot be
        written; a regular file at `target` is then as before. Raises BrokenPipeError where whoever
        reads `target` has gone away.
        """
        try:
            with source.open("rb") as readable, _output(target) as writable:
                self._copy(readable, writable, source)
        except BrokenPipeError:
            raise
        except OSError as error:
            name = source if error.filename == str(source) else target
            raise NfmasqError(f"{name}: {error.strerror}") from None

    def summary(self) -> str:
        """Return what became of the packets, in one line."""
        errors = self.engine.sessions.counters.errors
        reasons = ", ".join(f"{n} {name}" for name, n in errors.items() if n)
        return (
            f"{self.read} packets read, {self.written} written, "
            f"{self.dropped} dropped{f' ({reasons})' if reasons else ''}, "
            f"{self.passed_over} passed over"
        )

    def _copy(self, readable: BinaryIO, writable: BinaryIO, source: Path) -> None:
        file = _Whole(readable)
        try:
            reader = dpkt.pcap.UniversalReader(file)
        except _UNREADABLE:
            raise NfmasqError(f"{source}: not a capture (pcap or pcapng)") from None
        if isinstance(reader, dpkt.pcapng.Reader) and not _of_one_kind(reader, file):
            raise NfmasqError(
                f"{source}: its interfaces differ in link type or in how they tell the time; "
                "capture them one by one"
            )
        link = reader.datalink()
        if link not in _BARE and link not in _TYPE_AND_NETWORK_AT:
            raise NfmasqError(f"{source}: link type {link} is not one that nfmasq can read")
        writer = dpkt.pcap.Writer(writable, snaplen=65535, linktype=_RAW_IP)
        for when, frame in _frames(reader, source):
            self.read += 1
            sent = self._judge(_packet(link, frame), when)
            if sent is not None:
                self.written += 1
                # Without `round`, dpkt writes 1.9999996 as 1 second and 1,000,000 microseconds.
                writer.writepkt(sent, ts=round(when, 6))

    def _judge(self, packet: bytes | None, when: float) -> bytes | None:
        """Return what is sent on for a packet; None where it is dropped or passed over."""
        if packet is None:
            self.passed_over += 1
            return None
        self._now = max(self._now, when)
        while self.engine.sweep(self._now, _STEP):
            pass
        saddr, daddr = struct.unpack_from("!II", packet, 12)
        if self._is_inside(saddr) and not self._is_inside(daddr) and daddr not in self._maddrs:
            maddr = self._maddrs[saddr % len(self._maddrs)]
            sent = self.engine.ip_fw_masquerade(packet, maddr, self._now)
        elif daddr in self._maddrs and not self._is_inside(saddr):
            sent = self.engine.ip_fw_demasquerade(packet, self._now)
        elif saddr in self._maddrs:
            sent = self.engine.ip_fw_own(packet, self._now)
        else:
            self.passed_over += 1
            return None
        self.dropped += sent is None
        return sent

    def _is_inside(self, address: int) -> bool:
        return any(address & mask == net for net, mask in self._inside)


@contextmanager
def _output(target: Path) -> Iterator[BinaryIO]:
    """Open a file to write.

    A regular file takes its place only when it is whole; any other is written to directly.
    """
    if target.exists() and not target.is_file():
        with target.open("wb") as file:
            yield file
        return
    place = Path(os.path.realpath(target))
    partial = place.with_name(place.name + ".part")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, place)
    finally:
        with suppress(OSError):
            partial.unlink()


class _Whole:
    """A file whose `read` raises ValueError where the file ends within what is asked for.

    Without it dpkt would take a record that is cut short for a whole record.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.name = file.name
        self.seek = file.seek
        self.tell = file.tell
        self._file = file

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if 0 < len(data) < size:
            raise ValueError("cut short")
        return data


def _of_one_kind(reader: dpkt.pcapng.Reader, file: _Whole) -> bool:
    """Say whether all interfaces are like the first; dpkt reads their packets as if they were."""
    description = type(reader.idb)
    order = "<" if description is dpkt.pcapng.InterfaceDescriptionBlockLE else ">"
    start = at = file.tell()
    # A file that breaks off, or has something else than blocks, is noticed when packets are read.
    with suppress(*_UNREADABLE):
        while head := file.read(8):
            kind, length = struct.unpack(f"{order}II", head)
            if kind == dpkt.pcapng.PCAPNG_BT_IDB:
                other = description(head + file.read(length - 8))
                if _kind(other) != _kind(reader.idb):
                    return False
            at += max(length, 12)
            file.seek(at)
    file.seek(start)
    return True


def _kind(interface: dpkt.pcapng.InterfaceDescriptionBlock) -> tuple[int, dict[int, bytes]]:
    """Return what it takes to read an interface's frames and their times."""
    times = {option.code: option.data for option in interface.opts if option.code in _TIME_OPTIONS}
    return interface.linktype, times


def _frames(reader: dpkt.pcap.Reader, source: Path) -> Iterator[tuple[float, bytes]]:
    """Yield times and frames, to the end of the capture; raises NfmasqError if it breaks off."""
    frames = iter(reader)
    while True:
        try:
            when, frame = next(frames)
            yield float(when), frame  # a time in nanoseconds comes as a Decimal
        except StopIteration:
            return
        except _UNREADABLE:
            raise NfmasqError(f"{source}: the capture is damaged") from None


def _packet(link: int, frame: bytes) -> bytes | None:
    """Return the IPv4 packet in a frame, without the frame's padding; None where there is none."""
    at = 0
    if link in _TYPE_AND_NETWORK_AT:
        type_at, at = _TYPE_AND_NETWORK_AT[link]
        kind = int.from_bytes(frame[type_at : type_at + 2], "big")
        while link == 1 and kind in _VLAN:
            kind = int.from_bytes(frame[at + 2 : at + 4], "big")
            at += 4
        if kind != _IPV4:
            return None
    if len(frame) < at + 20 or frame[at] >> 4 != 4:
        return None
    length = int.from_bytes(frame[at + 2 : at + 4], "big")
    return frame[at : at + length]
