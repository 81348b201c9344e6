"""A tunnel between two hosts of a lab, for kernels that have no tunnels.

It is two tun devices, a thread, and raw sockets that carry the packets, in GRE (RFC 2784) or bare
in IP (RFC 2003).
"""

from __future__ import annotations

import fcntl
import os
import selectors
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from nfmasq.lab import Host

GRE, IP_IN_IP = 47, 4
HEADER = {GRE: b"\x00\x00\x08\x00", IP_IN_IP: b""}
MTU = 1400

TUNSETIFF = 0x400454CA
TUN_ALONE = 0x1001  # IFF_TUN, IFF_NO_PI
TUN_WITH_VIRTIO_HEADER = 0x5001  # IFF_TUN, IFF_NO_PI, IFF_VNET_HDR


def open_tun(name: str, flags: int = TUN_ALONE) -> int:
    """Open a tun device in the network namespace of the caller; returns its file descriptor."""
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH14x", name.encode(), flags))
    return tun


@contextmanager
def tunnel(protocol: int, *ends: tuple[Host, str, str]) -> Iterator[None]:
    """Open a tunnel between two hosts, within the block.

    Each end is a host, its address within the tunnel, and the address at which it takes the other
    end to be. With "" for this address, it answers the address that it last heard from.
    """
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for host, within, peer in ends:
            tun = host.call(open_tun, "tunnel")
            stack.callback(os.close, tun)
            host.ip(f"address add {within}/30 dev tunnel")
            host.ip(f"link set tunnel mtu {MTU} up")
            raw = stack.enter_context(host.socket(socket.AF_INET, socket.SOCK_RAW, protocol))
            heard = [peer]
            selector.register(tun, selectors.EVENT_READ, ("out", tun, raw, heard))
            selector.register(raw, selectors.EVENT_READ, ("in", tun, raw, heard))
        stop, stopped = socket.socketpair()
        selector.register(stopped, selectors.EVENT_READ, None)
        carrier = threading.Thread(target=_carry, args=(selector, HEADER[protocol]), daemon=True)
        carrier.start()
        try:
            yield
        finally:
            stop.send(b"!")
            carrier.join()
            stop.close()
            stopped.close()


def _carry(selector: selectors.BaseSelector, header: bytes) -> None:
    while True:
        for key, _ in selector.select():
            if key.data is None:
                return
            way, tun, raw, heard = key.data
            if way == "out":
                packet = os.read(tun, 65536)
                if heard[0]:
                    raw.sendto(header + packet, (heard[0], 0))
            else:
                outer, (heard[0], _) = raw.recvfrom(65536)
                os.write(tun, outer[20 + len(header) :])
