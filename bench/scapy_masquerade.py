"""A plain masquerade of TCP and UDP with scapy: parse, change, build.

It has no ICMP and no expiry, and verifies nothing. `python -m bench.scapy_masquerade 198.51.100.2`
"""

from __future__ import annotations

import sys

from netfilterqueue import Packet
from scapy.layers.inet import IP

from bench.baseline import TCP, UDP, Ports, serve
from nfmasq.daemon.netfilter import FORWARD

MADDR = sys.argv[1]
ports: Ports[tuple[str, int]] = Ports()


def handle(packet: Packet) -> None:
    ip = IP(packet.get_payload())
    if ip.proto in (TCP, UDP):
        if packet.hook == FORWARD:
            ip.payload.sport = ports.mport(ip.proto, (ip.src, ip.payload.sport))
            ip.src = MADDR
        elif inside := ports.inside(ip.proto, ip.payload.dport):
            ip.dst, ip.payload.dport = inside
        del ip.chksum, ip.payload.chksum  # scapy computes a checksum that is not there
        packet.set_payload(bytes(ip))
    packet.accept()


if __name__ == "__main__":
    serve(handle)
