"""Ports that lead inside, as people write them: `--forward`, `[[forward]]` and `[[trigger]]`.

    tcp:8080=10.0.0.2:80                            one port, on every masquerade address
    udp:8000-8010=10.0.0.2:9000-9010                a range of ports
    tcp:198.51.100.2:80=10.0.0.2:80,10.0.0.3:80     on one address, shared by two servers

A table in the file says the same with the keys `listen` and `servers`, and can say more. What was
read stands in a `ForwardRule` or a `TriggerRule`, plain data, of which the engine's objects are
made each time that a configuration takes effect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple, TypeVar

from nfmasq.config import health
from nfmasq.config.health import Check
from nfmasq.config.values import (
    Wrong,
    must_be,
    one_of,
    seconds,
    unicast_address,
    whole_number,
)
from nfmasq.engine import TCP, UDP
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.schedulers import SCHEDULERS
from nfmasq.engine.forward.server import Server
from nfmasq.engine.forward.trigger import Trigger
from nfmasq.engine.wire.address import dotted

HIGHEST_WEIGHT = 65535
DAY = 24 * 3600

_PROTOCOLS = {"tcp": TCP, "udp": UDP}
_NAMES = {number: name for name, number in _PROTOCOLS.items()}
_FORWARD_KEYS = ("listen", "servers", "scheduler", "persistence", "check")
_TRIGGER_KEYS = ("outbound", "opens", "seconds")

_T = TypeVar("_T")


class ServerRule(NamedTuple):
    """A server inside: its address in host order, its port for the first of its forward's."""

    address: int
    port: int
    weight: int = 1


@dataclass(frozen=True)
class ForwardRule:
    """Ports on which the outside reaches servers inside."""

    protocol: int
    listen: int | None
    """An address in host order; None: every masquerade address."""
    ports: range
    servers: tuple[ServerRule, ...]
    scheduler: str = "wrr"
    """A name of SCHEDULERS."""
    persistence: float = 0
    """Seconds for which a client keeps its server; 0: it does not."""
    check: Check | None = None
    """How the servers are asked whether they are alive; None: they are taken to be."""

    def __str__(self) -> str:
        address = "" if self.listen is None else f"{dotted(self.listen)}:"
        return f"{_NAMES[self.protocol]}:{address}{_written_ports(self.ports)}"

    def forward(self) -> Forward:
        """What the engine has of it."""
        servers = [Server(*server) for server in self.servers]
        return Forward(
            self.protocol, self.ports, servers, self.listen, self.scheduler, self.persistence
        )

    def as_table(self) -> dict[str, object]:
        """The same as in the file."""
        table: dict[str, object] = {
            "listen": str(self),
            "servers": [self._written(server) for server in self.servers],
            "scheduler": self.scheduler,
            "persistence": self.persistence,
        }
        return table | ({"check": self.check.written()} if self.check else {})

    def _written(self, server: ServerRule) -> object:
        ports = range(server.port, server.port + len(self.ports))
        endpoint = f"{dotted(server.address)}:{_written_ports(ports)}"
        return endpoint if server.weight == 1 else {"server": endpoint, "weight": server.weight}


@dataclass(frozen=True)
class TriggerRule:
    """Ports that open to an inside host for `seconds` when it sends to one of some others."""

    outbound: tuple[int, tuple[range, ...]]
    """Protocol, and the outside ports that it has to send to."""
    protocol: int
    ports: range
    seconds: float = 600

    def __str__(self) -> str:
        return f"{_NAMES[self.protocol]}:{_written_ports(self.ports)}"

    def trigger(self) -> Trigger:
        """What the engine has of it."""
        return Trigger(self.outbound, self.protocol, self.ports, self.seconds)

    def as_table(self) -> dict[str, object]:
        """The same as in the file."""
        protocol, ranges = self.outbound
        outbound = f"{_NAMES[protocol]}:{','.join(map(_written_ports, ranges))}"
        return {"outbound": outbound, "opens": str(self), "seconds": self.seconds}


def forwards(value: object) -> tuple[ForwardRule, ...]:
    """From what `--forward` or `[[forward]]` says: texts, tables, or both."""
    rules = _each(value, _forward)
    for (_, first), (place, second) in combinations(enumerate(rules), 2):
        if first.listen == second.listen and _meet(first, second):
            raise Wrong(f"has {first} and {second}, which overlap", place)
    return rules


def triggers(value: object) -> tuple[TriggerRule, ...]:
    """From what `[[trigger]]` says."""
    rules = _each(value, _trigger)
    for (_, first), (place, second) in combinations(enumerate(rules), 2):
        if _meet(first, second):
            raise Wrong(f"has {first} and {second}, which overlap", place)
    return rules


def contradiction(
    forwards: Iterable[ForwardRule], triggers: Sequence[TriggerRule]
) -> tuple[ForwardRule, TriggerRule] | None:
    """A forward and a trigger of the same ports, if there are such."""
    for forward in forwards:
        for trigger in triggers:
            if _meet(forward, trigger):
                return forward, trigger
    return None


def _each(value: object, read: Callable[[object], _T]) -> tuple[_T, ...]:
    if not isinstance(value, (list, tuple)):
        return (read(value),)
    rules = []
    for place, item in enumerate(value):
        try:
            rules.append(read(item))
        except Wrong as wrong:
            raise Wrong(str(wrong), place, *wrong.keys) from None
    return tuple(rules)


def _meet(one: ForwardRule | TriggerRule, other: ForwardRule | TriggerRule) -> bool:
    both = range(max(one.ports[0], other.ports[0]), min(one.ports[-1], other.ports[-1]) + 1)
    return one.protocol == other.protocol and len(both) > 0


def _forward(value: object) -> ForwardRule:
    if isinstance(value, Mapping):
        return _forward_of_table(value)
    if not isinstance(value, str) or value.count("=") != 1:
        raise must_be("LISTEN=SERVER[,SERVER]..., as tcp:8080=10.0.0.2:80", value)
    listen, servers = value.split("=")
    try:
        return _forward_of_table({"listen": listen, "servers": servers.split(",")})
    except Wrong as wrong:
        raise Wrong(str(wrong)) from None  # there are no keys in a text


def _forward_of_table(table: Mapping[str, object]) -> ForwardRule:
    _has_keys(table, _FORWARD_KEYS, required=("listen", "servers"))
    protocol, listen, ports = _listen(table["listen"])
    return ForwardRule(
        protocol,
        listen,
        ports,
        _servers(table["servers"], ports),
        one_of(SCHEDULERS, table.get("scheduler", "wrr"), "scheduler"),
        seconds(0, DAY, table.get("persistence", 0), "persistence"),
        _check(table["check"]) if "check" in table else None,
    )


def _check(value: object) -> Check:
    try:
        return health.check(value)
    except Wrong as wrong:
        raise Wrong(str(wrong), "check", *wrong.keys) from None


def _trigger(value: object) -> TriggerRule:
    if not isinstance(value, Mapping):
        raise must_be("a table with outbound and opens", value)
    _has_keys(value, _TRIGGER_KEYS, required=("outbound", "opens"))
    protocol, written_ranges = _protocol(value["outbound"], "outbound")
    ranges = tuple(_ports(ports, "outbound") for ports in written_ranges.split(","))
    opened, ports = _protocol(value["opens"], "opens")
    return TriggerRule(
        (protocol, ranges),
        opened,
        _ports(ports, "opens"),
        seconds(1, DAY, value.get("seconds", 600), "seconds"),
    )


def _has_keys(table: Mapping[str, object], known: Sequence[str], required: Sequence[str]) -> None:
    for key in table:
        if key not in known:
            raise Wrong(f"is unknown; known are {', '.join(known)}", key)
    for key in required:
        if key not in table:
            raise Wrong(f"lacks {key}")


def _protocol(value: object, key: str) -> tuple[int, str]:
    """The protocol's number, and what follows the colon."""
    name, colon, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not colon or name not in _PROTOCOLS:
        raise must_be("tcp:PORTS or udp:PORTS", value, key)
    return _PROTOCOLS[name], rest


def _listen(value: object) -> tuple[int, int | None, range]:
    protocol, rest = _protocol(value, "listen")
    address, colon, ports = rest.rpartition(":")
    listen = unicast_address("a masquerade address", address, "listen") if colon else None
    return protocol, listen, _ports(ports, "listen")


def _servers(value: object, ports: range) -> tuple[ServerRule, ...]:
    try:
        servers = _each(value, lambda item: _server(item, ports))
    except Wrong as wrong:
        raise Wrong(str(wrong), "servers", *wrong.keys) from None
    if not servers:
        raise Wrong("must name a server", "servers")
    if len({server[:2] for server in servers}) < len(servers):
        raise Wrong("must name a server once", "servers")
    return servers


def _server(value: object, ports: range) -> ServerRule:
    if not isinstance(value, Mapping):
        value = {"server": value}
    _has_keys(value, ("server", "weight"), required=("server",))
    text = value["server"]
    address, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not colon:
        raise must_be("ADDRESS:PORT, as 10.0.0.2:80", text)
    there = _ports(port)
    if len(there) != len(ports):
        here = _written_ports(ports)
        raise Wrong(f"leads {here} to {text}, ranges of different length")
    weight = whole_number(0, HIGHEST_WEIGHT, value.get("weight", 1), "weight")
    return ServerRule(unicast_address("the address of a host", address), there[0], weight)


def _ports(text: str, *keys: str) -> range:
    """Ports from "PORT" or "LO-HI"."""
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", text)
    low = int(match[1]) if match else 0
    high = int(match[2] or low) if match else 0
    if not 1 <= low <= high <= 65535:
        raise must_be("PORT or LO-HI, from 1 to 65535 with the lower port first", text, *keys)
    return range(low, high + 1)


def _written_ports(ports: range) -> str:
    return f"{ports[0]}" if len(ports) == 1 else f"{ports[0]}-{ports[-1]}"
