"""Everything that `nfmasq run` is told: the engine's settings, and the daemon's beside them.

The engine's settings stand in `engine/settings.py`, the daemon's here. Each stands once, with its
default and with what it may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from nfmasq import apps
from nfmasq.config.forwards import ForwardSettings, TriggerSettings
from nfmasq.engine import PROFILES, PROTOCOLS, Masquerade, Settings
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.option import name_field, number_field
from nfmasq.engine.sessions import Lock
from nfmasq.engine.settings import DEFAULT_PORTS
from nfmasq.engine.wire.address import dotted

DEFAULT_CONTROL = Path("/run/nfmasq.sock")

LOAD, KEEP, OFF = "load", "keep", "off"

RULES = (LOAD, KEEP, OFF)
"""The choices of `--rules`: nfmasq loads the rules, others do, or it does without any."""

IPTABLES = ("iptables", "iptables-nft", "iptables-legacy")

AUTO, ROUTED, DIRECT = "auto", "routed", "direct"

FLOW_CACHE = (AUTO, OFF, ROUTED, DIRECT)
"""The choices of `--flow-cache`: flows that last are carried in the kernel by its whole way, where
the machine can (auto); not at all; by its whole way; past the FORWARD chain."""

ON = "on"

FORWARDING = (ON, KEEP)
"""The choices of `--forwarding`: the kernel's forwarding is switched on, or stays as it is."""

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")

DEFAULT_PROFILE = next(name for name, row in PROFILES.items() if row == Settings().timeouts)
"""The name of the profile that has the default timeouts."""


@dataclass(frozen=True)
class Configuration:
    """The values of all options, known to be right; `Configuration()` has the defaults."""

    settings: Settings = field(default_factory=Settings)
    """The engine's settings, except for its ports: see `engine_settings`."""
    queue: int = number_field(0, low=0, high=65535)
    ports: tuple[range, ...] = (DEFAULT_PORTS,)
    """Masquerade ports: ranges in ascending order, which do not overlap."""
    masquerade_addresses: tuple[int, ...] = ()
    """IPv4 addresses in host order; empty: follow the kernel's routing."""
    inside: tuple[str, ...] = ()
    """The interfaces to the inside, which may come later; `ppp+` is all that begin with ppp."""
    outside: tuple[str, ...] = ()
    """The interfaces to the outside, likewise. There are some on both sides, or on none."""
    rules: str = name_field(KEEP, RULES)
    """Who loads the rules; where it is not given, `load` makes it LOAD with `inside`."""
    clamp_mss: bool = False
    """Whether the rules keep TCP segments as small as the path requires."""
    checksum_fill: bool = True
    """Whether the rules have the kernel compute checksums that were left to a card."""
    reserve: bool = False
    """Whether the gateway's own programs are given no masquerade ports."""
    only_inside: bool = False
    """Whether the rules drop what is forwarded to the outside from anywhere but the inside."""
    only_answers: bool = False
    """Whether the rules drop what the outside sends to the addresses of inside hosts."""
    ipv6_forward: bool = True
    """Whether IPv6 between the inside and the outside is left alone; else the rules drop it."""
    iptables: str = name_field("iptables", IPTABLES)
    """The program that loads the rules."""
    forwarding: str = name_field(KEEP, FORWARDING)
    flow_cache: str = name_field(AUTO, FLOW_CACHE)
    """How flows that last are carried in the kernel (`nfmasq/flowcache/`)."""
    metrics: tuple[str, int] | None = ("127.0.0.1", 9469)
    """The address and port where Prometheus scrapes; None: nowhere."""
    control: Path = DEFAULT_CONTROL
    log_level: str = name_field("info", LOG_LEVELS)
    log_format: str = name_field("text", LOG_FORMATS)
    queue_length: int = number_field(8192, low=1, high=1 << 20)
    """The most packets that may wait in the kernel for the handler."""
    socket_buffer: int = number_field(32 * 1024 * 1024, low=1 << 16, high=1 << 30)
    """The most bytes that the kernel may hold for the handler."""
    gso: bool = True
    """Whether superpackets are taken as they are, before they are cut into what a link carries."""
    apps: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: apps.DEFAULT)
    """The helpers that are on, and the server ports they are for."""
    forwards: tuple[ForwardSettings, ...] = ()
    triggers: tuple[TriggerSettings, ...] = ()

    def masquerade(self, lock: Lock | None = None) -> Masquerade:
        """Make a masquerade with this configuration; raises NfmasqError as `apps.helpers` does."""
        helpers = apps.helpers(self.apps)
        return Masquerade(self.engine_settings(), helpers, self.live_forwards(), lock=lock)

    def engine_settings(self) -> Settings:
        """Return the engine's settings, with the ports that sessions are given."""
        return replace(self.settings, ports=self.dynamic_ports())

    def live_forwards(self) -> Forwards:
        """Make new forwards and triggers for the engine."""
        return Forwards(
            [settings.forward() for settings in self.forwards],
            [settings.trigger() for settings in self.triggers],
        )

    def dynamic_ports(self) -> tuple[int, ...]:
        """Return the masquerade ports that sessions are given: no forward or trigger has them."""
        leading: tuple[ForwardSettings | TriggerSettings, ...] = (*self.forwards, *self.triggers)
        led_inside = {port for settings in leading for port in settings.ports}
        return tuple(port for port in chain.from_iterable(self.ports) if port not in led_inside)

    def value(self, key: str) -> object:
        """Return the value of an option by its key."""
        name = field_of(key)
        return getattr(self if name in OWN else self.settings, name)

    def as_table(self) -> dict[str, object]:
        """Return all options as plain data, keyed and written as in the file."""
        addresses = [dotted(address) for address in self.masquerade_addresses]
        return {key: self.value(key) for key in KEYS} | {
            "ports": ",".join(map(written_ports, self.ports)),
            "masquerade-address": addresses,
            "inside": list(self.inside),
            "outside": list(self.outside),
            "metrics": "off" if self.metrics is None else address_and_port(*self.metrics),
            "control": str(self.control),
            "mapping": _by_protocol_name(self.settings.mapping),
            "filtering": _by_protocol_name(self.settings.filtering),
            "timeouts": {key_of(n): value for n, value in asdict(self.settings.timeouts).items()},
            "apps": {n: list(self.apps.get(n, ())) for n in {**apps.DEFAULT, **self.apps}},
            "forward": [settings.as_table() for settings in self.forwards],
            "trigger": [settings.as_table() for settings in self.triggers],
        }


OWN = {own.name: own for own in fields(Configuration)}
"""The fields that are not the engine's, by name."""

# Both have `ports`: here the daemon's, which people write.
_FIELDS = {each.name: each for each in (*fields(Configuration), *fields(Settings))} | OWN

_SINGULAR = {
    "masquerade_addresses": "masquerade-address",
    "forwards": "forward",
    "triggers": "trigger",
}
"""The keys of fields with many values: each value is given under a key in the singular."""


def key_of(name: str) -> str:
    """Return the key of a field."""
    return _SINGULAR.get(name, name.replace("_", "-"))


def field_of(key: str) -> str:
    """Return the name of the field that a key is for."""
    return next((name for name, one in _SINGULAR.items() if one == key), key.replace("-", "_"))


KEYS = tuple(key_of(name) for name in _FIELDS if name != "settings")
"""The keys of all options."""


def setting_of(key: str) -> Field[Any]:
    """Return the field that a key is for: it says what the option may be (`engine/option.py`)."""
    return _FIELDS[field_of(key)]


def written_ports(ports: range) -> str:
    """Write a range of ports as LO-HI."""
    return f"{ports.start}-{ports.stop - 1}"


def address_and_port(address: str, port: int) -> str:
    """Write an address and a port as ADDRESS:PORT, an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _by_protocol_name(behaviours: Mapping[int, str]) -> object:
    """Return the behaviour that all protocols share or, where they differ, a table by name."""
    first, *others = behaviours.values()
    if all(other == first for other in others):
        return first
    return {PROTOCOLS[number]: behaviour for number, behaviour in behaviours.items()}
