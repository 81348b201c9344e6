"""Packets as they are on the wire: built and read with dpkt, checksums computed word by word.

A packet is bytes, an address is text in dotted form. An `Endpoint` is an address and a port; for
an ICMP query the identifier stands in the place of the port.
"""

from __future__ import annotations

import socket
import struct
from typing import TypeAlias

import dpkt

Endpoint: TypeAlias = "tuple[str, int]"

FIN, SYN, RST, PSH, ACK, URG = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20

MORE_FRAGMENTS = 0x2000

ECHO_REPLY, UNREACHABLE, SOURCE_QUENCH, REDIRECT, ECHO = 0, 3, 4, 5, 8
TIME_EXCEEDED, PARAMETER_PROBLEM, TIMESTAMP, INFORMATION, MASK = 11, 12, 13, 15, 17


def number(address: str) -> int:
    """Return an address as the engine has it: an int in host order."""
    return int.from_bytes(socket.inet_aton(address), "big")


def dotted(address: int) -> str:
    return socket.inet_ntoa(address.to_bytes(4, "big"))


# -- built ------------------------------------------------------------------------


def ip(src: str, dst: str, protocol: int, body: object, options: bytes = b"") -> bytes:
    """Build an IPv4 packet that must not be fragmented; `options` are whole words of 4 bytes."""
    packet = dpkt.ip.IP(src=socket.inet_aton(src), dst=socket.inet_aton(dst), p=protocol, data=body)
    packet.hl = 5 + len(options) // 4
    packet.opts = options
    packet.id = 4321
    packet.df = 1
    packet.len = len(packet)
    return bytes(packet)


def tcp(
    src: Endpoint,
    dst: Endpoint,
    flags: int = ACK,
    payload: bytes = b"",
    *,
    seq: int | None = None,
    ack: int = 1001,
    urgent: int = 0,
    tcp_options: bytes = b"",
    options: bytes = b"",
) -> bytes:
    """Build a segment; both ends have begun with 1000, where no numbers are given."""
    if seq is None:
        seq = 1000 if flags & SYN else 1001
    segment = dpkt.tcp.TCP(
        sport=src[1], dport=dst[1], flags=flags, seq=seq, ack=ack, data=payload, opts=tcp_options
    )
    segment.urp = urgent
    segment.off = 5 + len(tcp_options) // 4
    return ip(src[0], dst[0], 6, segment, options)


def udp(
    src: Endpoint,
    dst: Endpoint,
    payload: bytes = b"",
    *,
    options: bytes = b"",
    checksum: bool = True,
) -> bytes:
    datagram = dpkt.udp.UDP(sport=src[1], dport=dst[1], data=payload)
    datagram.ulen = len(datagram)
    packet = ip(src[0], dst[0], 17, datagram, options)
    return packet if checksum else with_checksum(packet, 0)


def udplite(src: Endpoint, dst: Endpoint, payload: bytes = b"", *, coverage: int = 0) -> bytes:
    """Build a UDP-Lite datagram whose checksum covers `coverage` bytes; 0 means all."""
    body = struct.pack("!HHHH", src[1], dst[1], coverage, 0) + payload
    covered = body[: coverage or len(body)]
    checksum = internet_checksum(pseudo_header(src[0], dst[0], 136, len(body)) + covered) or 0xFFFF
    return ip(src[0], dst[0], 136, body[:6] + checksum.to_bytes(2, "big") + payload)


def dccp(src: Endpoint, dst: Endpoint, payload: bytes = b"") -> bytes:
    """Build a DCCP-Data packet with a short sequence number."""
    head = struct.pack("!HHBBHBBH", src[1], dst[1], 3, 0, 0, 2 << 1, 0, 7)
    body = head + payload
    checksum = internet_checksum(pseudo_header(src[0], dst[0], 33, len(body)) + body)
    return ip(src[0], dst[0], 33, body[:6] + checksum.to_bytes(2, "big") + body[8:])


def icmp(src: str, dst: str, kind: int, code: int, body: bytes, *, options: bytes = b"") -> bytes:
    """Build an ICMP message; `body` is all that follows the checksum."""
    return ip(src, dst, 1, dpkt.icmp.ICMP(type=kind, code=code, data=body), options)


def query(
    src: Endpoint,
    dst: str,
    kind: int = ECHO,
    payload: bytes = b"ping",
    *,
    sequence: int = 1,
    options: bytes = b"",
) -> bytes:
    body = struct.pack("!HH", src[1], sequence) + payload
    return icmp(src[0], dst, kind, 0, body, options=options)


def reply(
    src: str,
    dst: Endpoint,
    kind: int = ECHO_REPLY,
    payload: bytes = b"ping",
    *,
    sequence: int = 1,
    options: bytes = b"",
) -> bytes:
    body = struct.pack("!HH", dst[1], sequence) + payload
    return icmp(src, dst[0], kind, 0, body, options=options)


def error(
    src: str,
    dst: str,
    quote: bytes,
    kind: int = UNREACHABLE,
    code: int = 3,
    *,
    options: bytes = b"",
) -> bytes:
    """Build an ICMP error that quotes the whole of `quote`, which `cut` makes shorter."""
    return icmp(src, dst, kind, code, bytes(4) + quote, options=options)


def cut(packet: bytes, transport: int = 8) -> bytes:
    """Cut a packet off `transport` bytes after its IP header; an error has to quote 8 bytes."""
    return packet[: header_length(packet) + transport]


# -- in pieces --------------------------------------------------------------------


def fragment(packet: bytes, start: int, size: int) -> bytes:
    """Cut out a fragment with `size` bytes of a packet's data, from byte `start` on.

    The packet has no options; `start` is a multiple of 8.
    """
    data = packet[20 + start : 20 + start + size]
    more = MORE_FRAGMENTS if 20 + start + size < len(packet) else 0
    header = with_header(packet[:20], total_length=20 + len(data), fragment=more | start // 8)
    return header + data


def fragments(packet: bytes, size: int) -> list[bytes]:
    """Cut a packet without options into fragments of `size` bytes of data, a multiple of 8."""
    return [fragment(packet, start, size) for start in range(0, len(packet) - 20, size)]


def fragmentable(packet: bytes) -> bytes:
    """Return a packet without its DF bit, so that routers may fragment it."""
    return with_header(packet, fragment=0)


# -- made odd ---------------------------------------------------------------------


def with_header(
    packet: bytes,
    *,
    version: int | None = None,
    total_length: int | None = None,
    fragment: int | None = None,
) -> bytes:
    """Return a packet with other values in its IP header, and with a right header checksum.

    `total_length` is in bytes. `fragment` is the whole field: the flags (DF is 0x4000, MF is
    MORE_FRAGMENTS) and the offset, in units of 8 bytes.
    """
    header, rest = bytearray(packet[: header_length(packet)]), packet[header_length(packet) :]
    if version is not None:
        header[0] = version << 4 | header[0] & 0x0F
    if total_length is not None:
        header[2:4] = total_length.to_bytes(2, "big")
    if fragment is not None:
        header[6:8] = fragment.to_bytes(2, "big")
    header[10:12] = bytes(2)
    header[10:12] = internet_checksum(header).to_bytes(2, "big")
    return bytes(header) + rest


def with_options(packet: bytes, options: bytes) -> bytes:
    """Return a packet that has no IP options with `options`, whole words of 4 bytes."""
    words = 5 + len(options) // 4
    header = bytes([0x40 | words]) + packet[1:20] + options
    return with_header(header + packet[20:], total_length=len(packet) + len(options))


def with_checksum(packet: bytes, checksum: int) -> bytes:
    """Return a TCP or UDP packet with a given transport checksum, right or wrong."""
    return _with_transport(packet, 16 if packet[9] == 6 else 6, checksum.to_bytes(2, "big"))


def with_udp_length(packet: bytes, length: int) -> bytes:
    """Return a UDP packet with a given length, in bytes, in its UDP header, right or wrong."""
    return _with_transport(packet, 4, length.to_bytes(2, "big"))


def with_data_offset(packet: bytes, words: int) -> bytes:
    """Return a TCP packet with a given data offset, in words of 4 bytes, right or wrong."""
    return _with_transport(packet, 12, bytes([words << 4]))


def _with_transport(packet: bytes, at: int, value: bytes) -> bytes:
    """Return a packet with `value` written at byte `at` of its transport header."""
    begin = header_length(packet) + at
    return packet[:begin] + value + packet[begin + len(value) :]


# -- read -------------------------------------------------------------------------


def header_length(packet: bytes) -> int:
    return (packet[0] & 0x0F) * 4


def source_address(packet: bytes) -> str:
    return socket.inet_ntoa(packet[12:16])


def destination_address(packet: bytes) -> str:
    return socket.inet_ntoa(packet[16:20])


def source(packet: bytes) -> Endpoint:
    """Return where a packet comes from; for an ICMP query or reply, with its identifier."""
    at = header_length(packet) + (4 if packet[9] == 1 else 0)
    return source_address(packet), int.from_bytes(packet[at : at + 2], "big")


def destination(packet: bytes) -> Endpoint:
    """Return where a packet goes to; for an ICMP query or reply, with its identifier."""
    at = header_length(packet) + (4 if packet[9] == 1 else 2)
    return destination_address(packet), int.from_bytes(packet[at : at + 2], "big")


def identification(packet: bytes) -> int:
    return int.from_bytes(packet[4:6], "big")


def quoted(packet: bytes) -> bytes:
    """Return what an ICMP error quotes."""
    return packet[header_length(packet) + 8 :]


# -- verified ---------------------------------------------------------------------


def internet_checksum(data: bytes | bytearray) -> int:
    """Compute a checksum as RFC 1071 has it: word by word, carries folded in, complemented."""
    words = struct.iter_unpack("!H", data + bytes(len(data) % 2))
    total: int = sum(word for (word,) in words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def pseudo_header(src: str, dst: str, protocol: int, length: int) -> bytes:
    return socket.inet_aton(src) + socket.inet_aton(dst) + struct.pack("!HH", protocol, length)


def header_checksum_is_right(packet: bytes) -> bool:
    return internet_checksum(packet[: header_length(packet)]) == 0


def transport_checksum_is_right(packet: bytes) -> bool:
    """Say whether the transport checksum of a whole packet is right.

    A UDP checksum of 0 says that there is none, and counts as right. Protocols that are not named
    here count as right too: they have no checksum that covers the addresses.
    """
    body = packet[header_length(packet) :]
    if packet[9] not in (1, 6, 17, 33, 136):
        return True
    if packet[9] == 1:
        return internet_checksum(body) == 0
    if packet[9] == 17 and body[6:8] == bytes(2):
        return True
    addresses = source_address(packet), destination_address(packet)
    covered = body
    if packet[9] == 136:
        covered = body[: int.from_bytes(body[4:6], "big") or len(body)]
    return internet_checksum(pseudo_header(*addresses, packet[9], len(body)) + covered) == 0


def checksums_are_right(packet: bytes) -> bool:
    return header_checksum_is_right(packet) and transport_checksum_is_right(packet)
