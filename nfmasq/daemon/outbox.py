"""Sending the packets that the engine itself makes: ICMP errors and TCP segments.

Theory of operation. The engine leaves whole packets in its `outbox`, a deque. The thread that has
called the engine empties the outbox right after: the thread that handles packets, the sweeper, or
the thread that ends the entries of an address that is gone. To take a packet from a deque is one
step, which no other thread interrupts, and several threads may use one socket. So nothing is
locked, and each packet is sent once, by one of the threads. A raw socket sends a packet from the
source address that the packet has, or, where this address is 0, from the address that the kernel's
routing picks.

A packet that is sent here passes OUTPUT as any packet of this machine does, and may come to the
handler from there (`Masquerade.ip_fw_own`). Nothing here waits for the handler.
"""

from __future__ import annotations

import logging
import socket
from collections import deque

from nfmasq.daemon.log import RateLimit
from nfmasq.daemon.socket_filter import KEEP_NOTHING, attach_filter

log = logging.getLogger(__name__)
log.addFilter(RateLimit(limit=5, period=60))

_DADDR = slice(16, 20)


class Outbox:
    """Sends the whole IPv4 packets in `packets`. Raises OSError without CAP_NET_RAW."""

    def __init__(self, packets: deque[bytes]) -> None:
        self._packets = packets
        # IPPROTO_RAW is for sending packets that have their IP header already (raw(7)).
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        attach_filter(self._socket, KEEP_NOTHING)
        self._socket.setblocking(False)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send(self) -> None:
        """Send all packets. A packet that cannot be sent is lost; the packets after it are sent."""
        while self._packets:
            try:
                packet = self._packets.popleft()
            except IndexError:  # another thread was faster
                return
            destination = socket.inet_ntoa(packet[_DADDR])
            try:
                self._socket.sendto(packet, (destination, 0))
            except OSError as error:
                log.warning("a packet of our own to %s is lost: %s", destination, error.strerror)
