"""What is put on the wire as it is, and what happens there that is not the masquerade's doing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from socket import AF_PACKET, SOCK_DGRAM

from nfmasq.lab import Host, Lab
from tests.packets import header_length, internet_checksum

ETH_P_IP = 0x0800


def sender(lab: Lab, host: Host, interface: str, link: str) -> Callable[[Iterable[bytes]], None]:
    """Sends packets to the gateway just as they are, which a kernel does not do with its own.

    `interface` is the host's, and `link` the gateway's at the other end.
    """
    line = host.socket(AF_PACKET, SOCK_DGRAM)
    address = (interface, ETH_P_IP, 0, 0, bytes.fromhex(mac(lab, link).replace(":", "")))

    def send(packets: Iterable[bytes]) -> None:
        for packet in packets:
            line.sendto(packet, address)

    return send


def mac(lab: Lab, link: str) -> str:
    """The gateway's Ethernet address on a link."""
    return lab.gateway.run(["cat", f"/sys/class/net/{link}/address"]).stdout.strip()


def one_hop_further(packet: bytes) -> bytes:
    """The packet as a router sends it on: with one hop less, and the header checksum for that."""
    end = header_length(packet)
    before, after = packet[:8] + bytes([packet[8] - 1, packet[9]]), packet[12:end]
    checksum = internet_checksum(before + bytes(2) + after)
    return before + checksum.to_bytes(2, "big") + after + packet[end:]


@contextmanager
def without_offload(host: Host, interface: str) -> Iterator[None]:
    """Within the block the host sends segments as they would be on a cable: of one MTU, and whole.

    Else a capture shows long ones whose checksums are left for the network card to fill in.
    """
    host.run(["ethtool", "-K", interface, "tx", "off", "gso", "off"])
    try:
        yield
    finally:
        host.run(["ethtool", "-K", interface, "tx", "on", "gso", "on"])
