"""Forwards and triggers, as people write them: `--forward`, `[[forward]]` and `[[trigger]]`.

    tcp:8080=10.0.0.2:80                            one port, on every masquerade address
    udp:8000-8010=10.0.0.2:9000-9010                a range of ports
    tcp:198.51.100.2:80=10.0.0.2:80,10.0.0.3:80     on one address, shared by two servers

A table in the file has the two parts under the keys `listen` and `servers`, and can say more. What
was read is plain data, `ForwardSettings` and `TriggerSettings`. The engine's objects are made from
it each time that a configuration takes effect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, TypeVar

from nfmasq.config import health
from nfmasq.config.health import HealthSettings
from nfmasq.config.values import Wrong, must_be, reader_of, unicast_address
from nfmasq.engine import TCP, UDP, option
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.schedulers import DEFAULT_SCHEDULER, SCHEDULERS
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


@dataclass(frozen=True)
class ServerSettings:
    """A server: its address (host order), and its port for the first port of the forward."""

    address: int
    port: int
    weight: int = option.number_field(1, low=0, high=HIGHEST_WEIGHT)


@dataclass(frozen=True)
class ForwardSettings:
    """A forward: ports on which the outside reaches servers inside."""

    protocol: int
    listen: int | None
    """An address in host order; None: every masquerade address."""
    ports: range
    servers: tuple[ServerSettings, ...]
    scheduler: str = option.name_field(DEFAULT_SCHEDULER, SCHEDULERS)
    persistence: float = option.seconds_field(0, low=0, high=DAY)
    """Seconds for which a client keeps its server; 0: it does not."""
    check: HealthSettings | None = None
    """The health check of the servers; None: they are taken to be alive."""

    def __str__(self) -> str:
        address = "" if self.listen is None else f"{dotted(self.listen)}:"
        return f"{_NAMES[self.protocol]}:{address}{_written_ports(self.ports)}"

    def forward(self) -> Forward:
        """Make the engine's `Forward`."""
        servers = [Server(s.address, s.port, s.weight) for s in self.servers]
        return Forward(
            self.protocol, self.ports, servers, self.listen, self.scheduler, self.persistence
        )

    def as_table(self) -> dict[str, object]:
        """Return the forward as its table in the file."""
        table: dict[str, object] = {
            "listen": str(self),
            "servers": [self._written(server) for server in self.servers],
            "scheduler": self.scheduler,
            "persistence": self.persistence,
        }
        return table | ({"check": self.check.written()} if self.check else {})

    def _written(self, server: ServerSettings) -> object:
        ports = range(server.port, server.port + len(self.ports))
        endpoint = f"{dotted(server.address)}:{_written_ports(ports)}"
        usual = ServerSettings(server.address, server.port)
        return endpoint if server == usual else {"server": endpoint, "weight": server.weight}


@dataclass(frozen=True)
class TriggerSettings:
    """A trigger: ports that open to an inside host for `seconds` when it sends to `outbound`."""

    outbound: tuple[int, tuple[range, ...]]
    """The protocol and the outside ports that the host has to send to."""
    protocol: int
    ports: range
    seconds: float = option.seconds_field(600, low=1, high=DAY)

    def __str__(self) -> str:
        return f"{_NAMES[self.protocol]}:{_written_ports(self.ports)}"

    def trigger(self) -> Trigger:
        """Make the engine's `Trigger`."""
        return Trigger(self.outbound, self.protocol, self.ports, self.seconds)

    def as_table(self) -> dict[str, object]:
        """Return the trigger as its table in the file."""
        protocol, ranges = self.outbound
        outbound = f"{_NAMES[protocol]}:{','.join(map(_written_ports, ranges))}"
        return {"outbound": outbound, "opens": str(self), "seconds": self.seconds}


def forwards(value: object) -> tuple[ForwardSettings, ...]:
    """Read what `--forward` or `[[forward]]` says: texts, tables, or both. Raises Wrong."""
    listed = _each(value, _forward)
    for (_, first), (place, second) in combinations(enumerate(listed), 2):
        if first.listen == second.listen and _meet(first, second):
            raise Wrong(f"has {first} and {second}, which overlap", place)
    return listed


def triggers(value: object) -> tuple[TriggerSettings, ...]:
    """Read what `[[trigger]]` says: a table or several. Raises Wrong."""
    listed = _each(value, _trigger)
    for (_, first), (place, second) in combinations(enumerate(listed), 2):
        if _meet(first, second):
            raise Wrong(f"has {first} and {second}, which overlap", place)
    return listed


def contradiction(
    forwards: Iterable[ForwardSettings], triggers: Sequence[TriggerSettings]
) -> tuple[ForwardSettings, TriggerSettings] | None:
    """Find a forward and a trigger that open the same ports; None where there are none."""
    for forward in forwards:
        for trigger in triggers:
            if _meet(forward, trigger):
                return forward, trigger
    return None


def _each(value: object, read: Callable[[object], _T]) -> tuple[_T, ...]:
    if not isinstance(value, (list, tuple)):
        return (read(value),)
    values = []
    for place, item in enumerate(value):
        try:
            values.append(read(item))
        except Wrong as wrong:
            raise Wrong(str(wrong), place, *wrong.keys) from None
    return tuple(values)


def _meet(one: ForwardSettings | TriggerSettings, other: ForwardSettings | TriggerSettings) -> bool:
    both = range(max(one.ports[0], other.ports[0]), min(one.ports[-1], other.ports[-1]) + 1)
    return one.protocol == other.protocol and len(both) > 0


def _forward(value: object) -> ForwardSettings:
    if isinstance(value, Mapping):
        return _forward_of_table(value)
    if not isinstance(value, str) or value.count("=") != 1:
        raise must_be("LISTEN=SERVER[,SERVER]..., as tcp:8080=10.0.0.2:80", value)
    listen, servers = value.split("=")
    try:
        return _forward_of_table({"listen": listen, "servers": servers.split(",")})
    except Wrong as wrong:
        raise Wrong(str(wrong)) from None  # a text has no keys to name


def _forward_of_table(table: Mapping[str, object]) -> ForwardSettings:
    _has_keys(table, _FORWARD_KEYS, required=("listen", "servers"))
    protocol, listen, ports = _listen(table["listen"])
    return ForwardSettings(
        protocol,
        listen,
        ports,
        _servers(table["servers"], ports),
        check=_check(table["check"]) if "check" in table else None,
        **_given(ForwardSettings, table),
    )


def _given(settings: type[Any], table: Mapping[str, object]) -> dict[str, Any]:
    """Read the values in a table, by field, for all fields that say what they may be."""
    described = {each.name: reader_of(each) for each in fields(settings) if each.metadata}
    return {name: read(table[name], name) for name, read in described.items() if name in table}


def _check(value: object) -> HealthSettings:
    try:
        return health.check(value)
    except Wrong as wrong:
        raise Wrong(str(wrong), "check", *wrong.keys) from None


def _trigger(value: object) -> TriggerSettings:
    if not isinstance(value, Mapping):
        raise must_be("a table with outbound and opens", value)
    _has_keys(value, _TRIGGER_KEYS, required=("outbound", "opens"))
    protocol, written_ranges = _protocol(value["outbound"], "outbound")
    ranges = tuple(_ports(ports, "outbound") for ports in written_ranges.split(","))
    opened, ports = _protocol(value["opens"], "opens")
    return TriggerSettings(
        (protocol, ranges),
        opened,
        _ports(ports, "opens"),
        **_given(TriggerSettings, value),
    )


def _has_keys(table: Mapping[str, object], known: Sequence[str], required: Sequence[str]) -> None:
    for key in table:
        if key not in known:
            raise Wrong(f"is unknown; known are {', '.join(known)}", key)
    for key in required:
        if key not in table:
            raise Wrong(f"lacks {key}")


def _protocol(value: object, key: str) -> tuple[int, str]:
    """Read the protocol's number, and what follows the colon."""
    name, colon, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not colon or name not in _PROTOCOLS:
        raise must_be("tcp:PORTS or udp:PORTS", value, key)
    return _PROTOCOLS[name], rest


def _listen(value: object) -> tuple[int, int | None, range]:
    protocol, rest = _protocol(value, "listen")
    address, colon, ports = rest.rpartition(":")
    listen = unicast_address("a masquerade address", address, "listen") if colon else None
    return protocol, listen, _ports(ports, "listen")


def _servers(value: object, ports: range) -> tuple[ServerSettings, ...]:
    try:
        servers = _each(value, lambda item: _server(item, ports))
    except Wrong as wrong:
        raise Wrong(str(wrong), "servers", *wrong.keys) from None
    if not servers:
        raise Wrong("must name a server", "servers")
    if len({(server.address, server.port) for server in servers}) < len(servers):
        raise Wrong("must name a server once", "servers")
    return servers


def _server(value: object, ports: range) -> ServerSettings:
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
    weight = _given(ServerSettings, value)
    return ServerSettings(unicast_address("the address of a host", address), there[0], **weight)


def _ports(text: str, *keys: str) -> range:
    """Read ports from "PORT" or "LO-HI"."""
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", text)
    low = int(match[1]) if match else 0
    high = int(match[2] or low) if match else 0
    if not 1 <= low <= high <= 65535:
        raise must_be("PORT or LO-HI, from 1 to 65535 with the lower port first", text, *keys)
    return range(low, high + 1)


def _written_ports(ports: range) -> str:
    return f"{ports[0]}" if len(ports) == 1 else f"{ports[0]}-{ports[-1]}"
