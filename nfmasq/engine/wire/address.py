"""IPv4 addresses, whole numbers in host order: which kinds there are, and how people write them."""

from __future__ import annotations

from ipaddress import AddressValueError, IPv4Address
from socket import inet_ntoa

_PRIVATE_NETWORKS = ((0x0A000000, 8), (0xAC100000, 12), (0xC0A80000, 16), (0x64400000, 10))
"""Private and shared address space: RFC 1918 and RFC 6598."""

_LOOPBACK, _MULTICAST = 127, 224


def is_private(address: int) -> bool:
    """Whether an address is of an inside network: a private one, which means nothing outside."""
    return any(address >> 32 - bits == network >> 32 - bits for network, bits in _PRIVATE_NETWORKS)


def is_host(address: int) -> bool:
    """Whether an address can be one host's: not multicast, broadcast, loopback or none."""
    return 0 < address >> 24 < _MULTICAST and address >> 24 != _LOOPBACK


def dotted(address: int) -> str:
    """An address as four numbers with dots between."""
    return inet_ntoa(address.to_bytes(4, "big"))


def from_dotted(text: str) -> int | None:
    """The address that is written so; None where it is no such."""
    try:
        return int(IPv4Address(text))
    except AddressValueError:
        return None
