"""What a helper offers the masquerade: code that reads and rewrites the payload of one protocol.

A helper (`nfmasq/apps/`) is bound to the entries of its port. It sees each of their packets after
the addresses are rewritten and before sequence numbers and checksums are, and
returns the packet to go on with: the same, or one with another payload, whose shift it
has noted in the entry's `out_seq` or `in_seq`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from nfmasq.engine.entry import IpMasq


class App(Protocol):
    """A helper."""

    name: str

    def bind(self, ms: IpMasq) -> None:
        """An entry of the helper's port was made."""

    def unbind(self, ms: IpMasq) -> None:
        """The entry is going."""

    def packet_out(self, ms: IpMasq, packet: bytes) -> bytes:
        """A packet from the inside."""

    def packet_in(self, ms: IpMasq, packet: bytes) -> bytes:
        """A packet from the outside."""


Apps: TypeAlias = "Mapping[tuple[int, int], App]"
"""Helpers by (protocol, destination port)."""
