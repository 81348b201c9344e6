"""A gateway to send packets through: the engine with a clock, and who is around it."""

from __future__ import annotations

from typing import Any

from nfmasq.engine import IpMasq, Masquerade
from tests.packets import Endpoint, number, source, udp

INSIDE: Endpoint = ("10.0.0.2", 40000)
NEIGHBOUR: Endpoint = ("10.0.0.3", 40000)
SERVER: Endpoint = ("198.51.100.7", 443)
SERVER_OTHER_PORT: Endpoint = ("198.51.100.7", 8443)
OTHER_SERVER: Endpoint = ("198.51.100.8", 443)
GATEWAY = "203.0.113.1"
NEW_ADDRESS = "203.0.113.2"
PORTS = range(61000, 65096)
THREE_PORTS = range(61000, 61003)


class Gateway:
    """A masquerade with a clock, and one address that may change."""

    def __init__(self, **settings: Any) -> None:
        self.masq = Masquerade(**settings)
        self.address = GATEWAY
        self.now = 1000.0

    def out(self, packet: bytes) -> bytes | None:
        return self.masq.ip_fw_masquerade(packet, number(self.address), self.now)

    def into(self, packet: bytes) -> bytes | None:
        return self.masq.ip_fw_demasquerade(packet, self.now)

    def send(self, inside: Endpoint, outside: Endpoint, payload: bytes = b"question") -> Endpoint:
        """A datagram from the inside gets out; the endpoint that it seems to come from."""
        sent = self.out(udp(inside, outside, payload))
        assert sent is not None
        return source(sent)

    def lets_in(self, outside: Endpoint, mapped: Endpoint) -> bool:
        """Whether a datagram from outside gets to an inside machine, or is left alone."""
        packet = udp(outside, mapped, b"answer")
        return self.into(packet) is not packet

    def passes(self, seconds: float) -> None:
        self.now += seconds
        while self.masq.sweep(self.now, 10):
            pass

    @property
    def errors(self) -> dict[str, int]:
        """The reasons for which something was dropped."""
        return {reason: n for reason, n in self.masq.counters.errors.items() if n}

    @property
    def expected(self) -> list[IpMasq]:
        """The entries that a helper has made: those that another one controls."""
        return [ms for ms in self.masq.entries() if ms.control is not None]
