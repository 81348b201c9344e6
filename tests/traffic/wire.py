"""Packets that are put on the wire as they are, and what routers and hosts do to packets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from socket import AF_PACKET, SOCK_DGRAM

from nfmasq.lab import Host, Lab
from tests.packets import header_length, internet_checksum

ETH_P_IP = 0x0800


def sender(lab: Lab, host: Host, interface: str, link: str) -> Callable[[Iterable[bytes]], None]:
    """Return a function that sends packets to the gateway just as they are, which no kernel does.

    `interface` is the host's, and `link` the gateway's at the other end.
    """
    line = host.socket(AF_PACKET, SOCK_DGRAM)
    address = (interface, ETH_P_IP, 0, 0, bytes.fromhex(mac(lab, link).replace(":", "")))

    def send(packets: Iterable[bytes]) -> None:
        for packet in packets:
            line.sendto(packet, address)

    return send


def mac(lab: Lab, link: str) -> str:
    """Return the gateway's Ethernet address on a link."""
    return lab.gateway.run(["cat", f"/sys/class/net/{link}/address"]).stdout.strip()


def one_hop_further(packet: bytes) -> bytes:
    """Return the packet as a router sends it on: with one hop less and a new header checksum."""
    end = header_length(packet)
    before, after = packet[:8] + bytes([packet[8] - 1, packet[9]]), packet[12:end]
    checksum = internet_checksum(before + bytes(2) + after)
    return before + checksum.to_bytes(2, "big") + after + packet[end:]


@contextmanager
def without_offload(host: Host, interface: str) -> Iterator[None]:
    """Have a host send segments as they are on a cable: of one MTU, and with their checksums.

    Outside the block, a capture shows long segments, whose checksums are left to the network card.
    """
    host.run(["ethtool", "-K", interface, "tx", "off", "gso", "off"])
    try:
        yield
    finally:
        host.run(["ethtool", "-K", interface, "tx", "on", "gso", "on"])
