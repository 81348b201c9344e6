"""Datagrams that NFQUEUE has no room for: they have up to four bytes too many.

A netlink attribute is at most 65,535 bytes long with its own header of 4. So the kernel hands over
at most 65,531 bytes of a packet, and takes back no more. A longer packet (UDP data of 65,504 to
65,507 bytes) comes to the handler cut, and a verdict with the rewritten packet would send it cut.

Theory of operation. A packet of this length has come in fragments, which the kernel put together.
The programs of the flow cache see the last fragment before, and note the end. Where they do not
see all packets, a packet socket gets the last fragment; a socket filter keeps all other packets
away from this socket. So when a packet comes cut, its end is there to be read. The whole packet
cannot go back with a verdict. The queued packet is dropped, and the rewritten packet is sent
through a raw socket, for which the kernel makes fragments again.

The packet socket is open only while it is needed: for each packet that comes in, whether its filter
keeps it or not, the kernel makes a copy of the headers.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

from nfmasq.daemon.netfilter import FORWARD, PREROUTING
from nfmasq.daemon.nfnetlink import MOST_COPIED
from nfmasq.daemon.socket_filter import KEEP_NOTHING, attach_filter

_ETH_P_IP = 0x0800
_SO_RCVBUFFORCE = 33
_IP_PKTINFO = 8
_IP_MTU_DISCOVER = 10
_IP_PMTUDISC_DONT = 0
_IP_TRANSPARENT = 19

_BUFFER = 4 << 20  # bytes of fragments: more than belong to the cut packets that the queue can hold

_LAST_FRAGMENTS = (
    (0x28, 0, 0, 6),  # A = flags and fragment offset
    (0x54, 0, 0, 0x1FFF),  # A = A & 0x1fff
    (0x15, 6, 0, 0),  # if A == 0 ignore it: the first fragment, or a superpacket
    (0x64, 0, 0, 3),  # A = A << 3
    (0x07, 0, 0, 0),  # X = A
    (0x28, 0, 0, 2),  # A = total length
    (0x0C, 0, 0, 0),  # A = A + X
    (0x25, 0, 1, MOST_COPIED),  # unless A > MOST_COPIED ignore it
    (0x06, 0, 0, 0xFFFFFFFF),  # keep the packet
    (0x06, 0, 0, 0),  # ignore it
)


class Oversize:
    """Completes and sends datagrams that were cut. Raises OSError without CAP_NET_RAW.

    `take_end` returns up to four last bytes of the datagram that begins with a packet, where it has
    them: `KernelFlowCache.take_end`.
    """

    def __init__(self, take_end: Callable[[bytes], bytes] = lambda packet: b"") -> None:
        self._take_end = take_end
        self._fragments: socket.socket | None = None
        self._one_at_a_time = threading.Lock()
        self._raw: dict[int, socket.socket] = {}
        self._raw_socket(socket.IPPROTO_UDP)
        with suppress(OSError):  # where this is not allowed, `take_end` may have all ends
            self.listen(True)

    def listen(self, wanted: bool) -> None:
        """Have a packet socket, or none where `take_end` has all ends. Raises OSError."""
        with self._one_at_a_time:
            if not wanted and self._fragments:
                self._fragments.close()
                self._fragments = None
            elif wanted and not self._fragments:
                self._fragments = _packet_socket()

    def close(self) -> None:
        """Close the sockets."""
        self.listen(False)
        for opened in self._raw.values():
            opened.close()

    def whole(self, packet: bytes) -> bytes:
        """Return all of a packet that is cut, where its end was seen; else return it as it is."""
        if int.from_bytes(packet[2:4], "big") <= len(packet):
            return packet
        return ended(packet, self._take_end(packet)) or self._complete(packet) or packet

    def _complete(self, cut: bytes) -> bytes | None:
        """Find the end of a packet among the fragments since the last call; returns the two joined.

        None where the end is not among them.
        """
        complete = None
        with self._one_at_a_time:
            while self._fragments:
                try:
                    fragment = self._fragments.recv(65536)
                except BlockingIOError:
                    break
                complete = completed(cut, fragment) or complete
        return complete

    def send(self, packet: bytes, hook: int, interface: int) -> None:
        """Send a rewritten packet on from the hook at which it was queued.

        A packet from FORWARD leaves by `interface`, an index; any other packet is routed anew. A
        packet that has no hop left is lost. Raises OSError.
        """
        # A packet from the outside has not been forwarded yet, which would cost it a hop.
        hops = packet[8] - (hook == PREROUTING)
        if hops == 0:
            return
        protocol, source, destination = packet[9], packet[12:16], packet[16:20]
        by_routing = 0
        out = interface if hook == FORWARD else by_routing
        self._raw_socket(protocol).sendmsg(
            [packet[_header_length(packet) :]],
            [
                (socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("@i4s4s", out, source, b"")),
                (socket.IPPROTO_IP, socket.IP_TTL, struct.pack("@i", hops)),
                (socket.IPPROTO_IP, socket.IP_TOS, struct.pack("@i", packet[1])),
            ],
            0,
            (socket.inet_ntoa(destination), 0),
        )

    def _raw_socket(self, protocol: int) -> socket.socket:
        """Return the socket that sends packets of a protocol, from any source address."""
        if protocol not in self._raw:
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol)
            attach_filter(raw, KEEP_NOTHING)
            raw.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
            raw.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)
            self._raw[protocol] = raw
        return self._raw[protocol]


def _packet_socket() -> socket.socket:
    """Open the socket that gets last fragments. Raises OSError."""
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_IP))
    try:
        attach_filter(opened, _LAST_FRAGMENTS)
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        opened.setblocking(False)
    except OSError:
        opened.close()
        raise
    return opened


def ended(cut: bytes, end: bytes) -> bytes | None:
    """Return the packet that begins with `cut` and whose last bytes are `end`.

    None where there are fewer bytes than those that are missing.
    """
    missing = int.from_bytes(cut[2:4], "big") - len(cut)
    return cut + end[-missing:] if 0 < missing <= len(end) else None


def completed(cut: bytes, fragment: bytes) -> bytes | None:
    """Return the packet that begins with `cut` and ends with `fragment`, its last fragment.

    None where the two do not belong together, by identification, protocol and addresses (RFC 791,
    section 3.2). None also where the missing bytes lie in two fragments, as with an MTU of 3,468 to
    3,475.
    """
    if _identity(cut) != _identity(fragment):
        return None
    offset = _header_length(cut) + (int.from_bytes(fragment[6:8], "big") & 0x1FFF) * 8
    total_length = int.from_bytes(fragment[2:4], "big")
    packet = cut[:offset] + fragment[_header_length(fragment) : total_length]
    return packet if len(packet) == int.from_bytes(cut[2:4], "big") else None


def _identity(packet: bytes) -> tuple[bytes, int, bytes]:
    return packet[4:6], packet[9], packet[12:20]


def _header_length(packet: bytes) -> int:
    return (packet[0] & 0x0F) * 4
