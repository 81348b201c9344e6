"""What happens to packets on the wire that is not the masquerade's doing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nfmasq.lab import Host
from tests.packets import header_length, internet_checksum


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
