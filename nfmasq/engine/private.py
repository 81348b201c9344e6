"""Private addresses: those of inside networks, which mean nothing outside."""

from __future__ import annotations

_NETWORKS = ((0x0A000000, 8), (0xAC100000, 12), (0xC0A80000, 16), (0x64400000, 10))
"""Private and shared address space: RFC 1918 and RFC 6598."""


def is_private(address: int) -> bool:
    """Whether an address, in host order, is a private one."""
    return any(address >> 32 - bits == network >> 32 - bits for network, bits in _NETWORKS)
