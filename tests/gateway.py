"""A gateway to send packets through: the engine with a clock, and the hosts around it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from nfmasq.engine import PROTOCOLS, IpMasq, Masquerade, Settings
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.helper.app import Apps
from nfmasq.engine.sessions import Lock
from tests.packets import ACK, SYN, Endpoint, number, source, tcp, udp

INSIDE: Endpoint = ("10.0.0.2", 40000)
NEIGHBOUR: Endpoint = ("10.0.0.3", 40000)
SERVER: Endpoint = ("198.51.100.7", 443)
SERVER_OTHER_PORT: Endpoint = ("198.51.100.7", 8443)
OTHER_SERVER: Endpoint = ("198.51.100.8", 443)
GATEWAY = "203.0.113.1"
NEW_ADDRESS = "203.0.113.2"
PORTS = range(61000, 65096)
THREE_PORTS = range(61000, 61003)


def endpoints(host: str, many: int) -> list[Endpoint]:
    """List `many` endpoints of an inside host, with ports from 1024 on."""
    return [(host, 1024 + at) for at in range(many)]


Told = tuple[Settings, "Apps | None", "Forwards | None"]


def told(*, apps: Apps | None = None, forwards: Forwards | None = None, **settings: Any) -> Told:
    """Put together what a masquerade is told: settings, helpers and forwards.

    Settings that are not given have their defaults. A mapping or a filtering may be one name, for
    all protocols.
    """
    for key in {"mapping", "filtering"} & settings.keys():
        if isinstance(settings[key], str):
            settings[key] = dict.fromkeys(PROTOCOLS, settings[key])
    return Settings(**settings), apps, forwards


def masquerade_with(*, lock: Lock | None = None, fast: bool = True, **settings: Any) -> Masquerade:
    """Make a masquerade with these settings, helpers and forwards; see `told`."""
    return Masquerade(*told(**settings), lock=lock, fast=fast)


def entries_on(gateway: Gateway, maddr: int) -> list[IpMasq]:
    """List the entries on a masquerade address, in host order."""
    return [ms for ms in gateway.sessions.entries() if ms.maddr == maddr]


def ended(masq: Masquerade) -> dict[str, int]:
    """Count the entries of all protocols that ended, by the reason."""
    counts = Counter[str]()
    for reasons in masq.sessions.account().ended.values():
        counts.update(reasons)
    return {reason: n for reason, n in counts.items() if n}


class Gateway:
    """A masquerade with a clock, and one address that may change."""

    def __init__(self, **settings: Any) -> None:
        self.masq = masquerade_with(**settings)
        self.sessions = self.masq.sessions
        self.address = GATEWAY
        self.now = 1000.0

    def configure(self, **settings: Any) -> None:
        """Have the masquerade go by other settings; what is not given has its default."""
        self.masq.configure(*told(**settings))

    def out(self, packet: bytes) -> bytes | None:
        return self.masq.ip_fw_masquerade(packet, number(self.address), self.now)

    def into(self, packet: bytes) -> bytes | None:
        return self.masq.ip_fw_demasquerade(packet, self.now)

    def send(self, inside: Endpoint, outside: Endpoint, payload: bytes = b"question") -> Endpoint:
        """Send a datagram from the inside; returns the endpoint that it seems to come from."""
        sent = self.out(udp(inside, outside, payload))
        assert sent is not None
        return source(sent)

    def connects(self, inside: Endpoint, server: Endpoint) -> bool:
        """Say whether a TCP connection opens: a SYN, its answer, and the acknowledgement of it."""
        sent = self.out(tcp(inside, server, SYN))
        if sent is None:
            return False
        answer = tcp(server, source(sent), SYN | ACK)
        if self.into(answer) != tcp(server, inside, SYN | ACK):
            return False
        return self.out(tcp(inside, server, ACK)) is not None

    def flood(self, host: str, many: int) -> list[bool]:
        """Send `many` SYNs from a host, each from another port; returns which of them got out."""
        return [self.out(tcp(inside, SERVER, SYN)) is not None for inside in endpoints(host, many)]

    def lets_in(self, outside: Endpoint, mapped: Endpoint) -> bool:
        """Say whether a datagram from outside gets to an inside machine, and is not left alone."""
        packet = udp(outside, mapped, b"answer")
        return self.into(packet) is not packet

    def passes(self, seconds: float) -> None:
        self.now += seconds
        while self.masq.sweep(self.now, 10):
            pass

    @property
    def errors(self) -> dict[str, int]:
        """How many packets were dropped, or sessions refused, by the reason."""
        return {reason: n for reason, n in self.sessions.counters.errors.items() if n}

    @property
    def ended(self) -> dict[str, int]:
        """How many entries ended, by the reason."""
        return ended(self.masq)

    @property
    def expected(self) -> list[IpMasq]:
        """The entries that a helper has made: they are controlled by another entry."""
        return [ms for ms in self.sessions.entries() if ms.control is not None]
