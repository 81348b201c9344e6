"""Verdicts, sent to the kernel many at a time.

NetfilterQueue makes a system call for each verdict, which is a good part of what a small packet
costs. The kernel takes any number of messages in one call. So verdicts are collected here, and
`queue.py` sends them at the end of a batch of packets, or when there are enough of them.

A message that replaces a packet is `nfnetlink.verdict_message` with one attribute more, the packet.
"""

from __future__ import annotations

import socket
from socket import htonl
from struct import Struct

from nfmasq.daemon import nfnetlink
from nfmasq.daemon.nfnetlink import NFQA_PAYLOAD

ENOUGH = 98_304
"""The load at which verdicts are sent."""

MOST = ENOUGH + 65_536
"""The most bytes that are sent at once: the last packet may be a whole superpacket."""

_LITTLE = ENOUGH // 2
"""The load below which all pieces are joined before they are sent: each piece costs the system call
more than it costs to copy the bytes of a small piece once more."""

_LEAST_LOAD = 1024

# The message's length, what is the same for all packets, the packet's number.
_verdict = Struct("=I24sI")
# A verdict as above, and the header of the attribute that follows: its length and kind.
_replacement = Struct("=I24sIHH")
_write_replacement, _REPLACEMENT_BYTES = _replacement.pack, _replacement.size
_PADDING = (b"", bytes(3), bytes(2), bytes(1))


class Verdicts:
    """Collects and sends the verdicts on packets of queue number `queue`, which `sock` has bound.

    A packet is named by the number that the kernel gave it (`Packet.id`). `waiting` is empty when
    there is nothing to send. `load` says how much waits: the bytes of the packets, and a fixed
    number of bytes for each verdict.
    """

    def __init__(self, sock: socket.socket, queue: int) -> None:
        self.waiting: list[bytes] = []
        self.load = 0
        self._send, self._sendmsg = sock.send, sock.sendmsg
        self._accept = _the_same_for_all(queue, nfnetlink.ACCEPT)
        self._drop = _the_same_for_all(queue, nfnetlink.DROP)
        self._queue_again = _the_same_for_all(queue, queue << 16 | nfnetlink.QUEUE)
        self._superpackets_off = nfnetlink.superpackets(queue, False)
        self._superpackets_on = nfnetlink.superpackets(queue, True)

    def accept(self, number: int) -> None:
        """Let the packet go on as it came."""
        self._add(number, self._accept)

    def drop(self, number: int) -> None:
        """Drop the packet."""
        self._add(number, self._drop)

    def replace(self, number: int, packet: bytes) -> None:
        """Let other bytes go on in the packet's place, at most `nfnetlink.MOST_COPIED`."""
        length = len(packet)
        head = _write_replacement(
            _REPLACEMENT_BYTES + length, self._accept, htonl(number), 4 + length, NFQA_PAYLOAD
        )
        self.waiting += (head, packet, _PADDING[length & 3])
        self.load += length + _LEAST_LOAD

    def cut(self, number: int) -> None:
        """Have the packet queued again as single packets, with all their checksums."""
        # The kernel cuts packets for a queue that does not ask for superpackets.
        self.waiting.append(self._superpackets_off)
        self._add(number, self._queue_again)
        self.waiting.append(self._superpackets_on)

    def send(self) -> None:
        """Send all verdicts; they still wait where the kernel does not take them (OSError)."""
        if self.waiting:
            if self.load < _LITTLE:
                self._send(b"".join(self.waiting))
            else:
                self._sendmsg(self.waiting)
            self.waiting.clear()
            self.load = 0

    def _add(self, number: int, the_same_for_all: bytes) -> None:
        self.waiting.append(_verdict.pack(_verdict.size, the_same_for_all, htonl(number)))
        self.load += _LEAST_LOAD


def _the_same_for_all(queue: int, verdict: int) -> bytes:
    """Make a verdict's message without its length (at the start) and the packet's number (end)."""
    return nfnetlink.verdict_message(queue, verdict)[4:-4]
