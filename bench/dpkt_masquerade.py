"""A plain masquerade of TCP and UDP with dpkt: parse, change, build.

It has no ICMP and no expiry, and verifies nothing. `python -m bench.dpkt_masquerade 198.51.100.2`
"""

from __future__ import annotations

import socket
import sys

import dpkt
from netfilterqueue import Packet

from bench.baseline import TCP, UDP, Ports, serve
from nfmasq.daemon.netfilter import FORWARD

MADDR = socket.inet_aton(sys.argv[1])
ports: Ports[tuple[bytes, int]] = Ports()


def handle(packet: Packet) -> None:
    ip = dpkt.ip.IP(packet.get_payload())
    if ip.p in (TCP, UDP):
        if packet.hook == FORWARD:
            ip.data.sport = ports.mport(ip.p, (ip.src, ip.data.sport))
            ip.src = MADDR
        elif inside := ports.inside(ip.p, ip.data.dport):
            ip.dst, ip.data.dport = inside
        ip.sum = ip.data.sum = 0  # dpkt computes a checksum that is 0
        packet.set_payload(bytes(ip))
    packet.accept()


if __name__ == "__main__":
    serve(handle)
