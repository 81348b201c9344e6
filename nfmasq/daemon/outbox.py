"""Sends the packets that the engine itself has to say: ICMP errors and TCP segments.

Theory of operation. The engine leaves whole packets in its `outbox`, a deque, while it judges
others. Whichever thread had it do so empties the outbox right after: the one that handles packets,
the sweeper, the one that follows addresses. To take a packet from a deque is one step that no
other thread comes between, and a socket may be used by several threads; so nothing is locked, and
a packet is sent once, by either. A raw socket sends it from whatever source address it has, or,
where it has none, from the one that the kernel's routing picks.

What is sent here passes OUTPUT as any packet of this machine does, and may come back to the handler
from there (`Masquerade.ip_fw_own_error`); the handler is not waited for.
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
    """Sends what is in `packets`. Raises OSError without CAP_NET_RAW."""

    def __init__(self, packets: deque[bytes]) -> None:
        self._packets = packets
        # IPPROTO_RAW is for sending with a header of one's own (raw(7)).
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        attach_filter(self._socket, KEEP_NOTHING)
        self._socket.setblocking(False)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send(self) -> None:
        """Send all that is there. A packet that cannot be sent is lost, and none after it."""
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
