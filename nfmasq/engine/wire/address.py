"""IPv4 addresses, ints in host order: which kinds there are, and how people write them."""

from __future__ import annotations

from ipaddress import AddressValueError, IPv4Address, IPv6Address
from socket import inet_ntoa

_PRIVATE_NETWORKS = ((0x0A000000, 8), (0xAC100000, 12), (0xC0A80000, 16), (0x64400000, 10))
"""Private and shared address space: RFC 1918 and RFC 6598."""

_LOOPBACK, _MULTICAST = 127, 224


def is_private(address: int) -> bool:
    """Say whether an address is of an inside network.

    A private or shared address means nothing outside.
    """
    return any(address >> 32 - bits == network >> 32 - bits for network, bits in _PRIVATE_NETWORKS)


def is_host(address: int) -> bool:
    """Say whether an address can be a single host's.

    No host has an address of 0.0.0.0/8, 127.0.0.0/8 (loopback) or 224.0.0.0/3 (multicast, reserved,
    broadcast).
    """
    return 0 < address >> 24 < _MULTICAST and address >> 24 != _LOOPBACK


def dotted(address: int) -> str:
    """Write an address as four decimal numbers with dots between them."""
    return inet_ntoa(address.to_bytes(4, "big"))


def from_dotted(text: str) -> int | None:
    """Read an address that is written as four numbers with dots; None where it is no address."""
    try:
        return int(IPv4Address(text))
    except AddressValueError:
        return None


def within_ipv6(text: str) -> int | None:
    """Return the last 32 bits of an IPv6 address in text; None where the text is no address.

    They are an IPv4 address where the address stands for one (RFC 4291, section 2.5.5; RFC 6052).
    """
    try:
        return int(IPv6Address(text)) & 0xFFFFFFFF
    except AddressValueError:
        return None
