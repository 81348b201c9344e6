"""The options of `nfmasq run`: defaults, the TOML file over them, the command line over both.

A key is the command-line option without the dashes in front (of `--app`, the plural). For each key,
one function in `_READERS` turns what a person wrote into the value of a field of `Configuration`;
file and command line share it, so a value is right or wrong in both places alike.

A wrong file is a `ConfigurationError`, one line that names the file and the line; a wrong
option is a `UsageError`, one line that names the option.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from nfmasq import apps
from nfmasq.config import forwards
from nfmasq.config.forwards import ForwardRule, TriggerRule
from nfmasq.config.values import (
    Wrong,
    boolean,
    is_number,
    must_be,
    one_of,
    unicast_address,
    whole_number,
)
from nfmasq.engine import (
    BEHAVIOURS,
    OTHER_PROTOCOLS,
    PORT_SELECTIONS,
    PROFILES,
    Masquerade,
    Timeouts,
)
from nfmasq.engine.forward.forward import Forwards
from nfmasq.engine.sessions import Lock
from nfmasq.engine.unsolicited import UNSOLICITED
from nfmasq.engine.wire.address import dotted
from nfmasq.engine.wire.protocols import PROTOCOLS
from nfmasq.errors import NfmasqError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_FILE = Path("/etc/nfmasq.toml")
DEFAULT_CONTROL = Path("/run/nfmasq.sock")

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")

YEAR = 365 * 24 * 3600
SOCKET_PATH_BYTES = 107  # sun_path holds 108 with its closing zero

DEFAULT_MAPPING = dict.fromkeys(PROTOCOLS, "endpoint-independent")
DEFAULT_FILTERING = dict.fromkeys(PROTOCOLS, "address-dependent")


class ConfigurationError(NfmasqError):
    """The configuration file is wrong; the message names the file and, where known, the line."""


class UsageError(NfmasqError):
    """The command line is wrong; the message names the option."""


@dataclass(frozen=True)
class Configuration:
    """Holds all that `nfmasq run` is told, found right; `Configuration()` is the defaults."""

    queue: int = 0
    ports: tuple[range, ...] = (range(61000, 65096),)
    """Masquerade ports: ranges, ascending, of which no two overlap."""
    masquerade_addresses: tuple[int, ...] = ()
    """IPv4 addresses in host order; empty: follow the kernel's routing."""
    metrics: tuple[str, int] | None = ("127.0.0.1", 9469)
    """Where Prometheus scrapes; None: nowhere."""
    control: Path = DEFAULT_CONTROL
    mapping: Mapping[int, str] = field(default_factory=DEFAULT_MAPPING.copy)
    """One of BEHAVIOURS by protocol number."""
    filtering: Mapping[int, str] = field(default_factory=DEFAULT_FILTERING.copy)
    """The same."""
    port_selection: str = "sequential"
    other_protocols: str = "drop"
    timeouts: Timeouts = field(default_factory=lambda: PROFILES["rfc"])
    log_level: str = "info"
    log_format: str = "text"
    queue_length: int = 8192
    """Packets that wait in the kernel for the handler."""
    socket_buffer: int = 32 * 1024 * 1024
    """Bytes that the kernel may hold for the handler."""
    gso: bool = True
    """Take superpackets as they are, before they are cut into what a link carries."""
    max_entries: int = 1_048_576
    max_entries_per_host: int = 0
    max_ports_per_host: int = 0
    max_new_per_host: int = 0
    """New entries in a second. Of an inside host's limits, 0 means that there is none."""
    inbound_refresh: bool = True
    unsolicited: str = "drop"
    reset_on_address_change: bool = True
    apps: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: apps.DEFAULT)
    """The helpers that are on, and the server ports they are for."""
    forwards: tuple[ForwardRule, ...] = ()
    triggers: tuple[TriggerRule, ...] = ()

    def masquerade(self, lock: Lock | None = None) -> Masquerade:
        """A new masquerade with these settings."""
        return Masquerade(lock=lock, **self.settings())

    def settings(self) -> dict[str, Any]:
        """What a masquerade is configured with, with forwards made anew."""
        return {
            "ports": self.dynamic_ports(),
            "mapping": self.mapping,
            "filtering": self.filtering,
            "port_selection": self.port_selection,
            "other_protocols": self.other_protocols,
            "timeouts": self.timeouts,
            "max_entries": self.max_entries,
            "max_entries_per_host": self.max_entries_per_host,
            "max_ports_per_host": self.max_ports_per_host,
            "max_new_per_host": self.max_new_per_host,
            "inbound_refresh": self.inbound_refresh,
            "unsolicited": self.unsolicited,
            "reset_on_address_change": self.reset_on_address_change,
            "apps": apps.helpers(self.apps),
            "forwards": Forwards(
                [rule.forward() for rule in self.forwards],
                [rule.trigger() for rule in self.triggers],
            ),
        }

    def dynamic_ports(self) -> tuple[int, ...]:
        """The masquerade ports that sessions are given: those that lead nowhere else."""
        rules: tuple[ForwardRule | TriggerRule, ...] = (*self.forwards, *self.triggers)
        led_inside = {port for rule in rules for port in rule.ports}
        return tuple(port for port in chain.from_iterable(self.ports) if port not in led_inside)

    def as_table(self) -> dict[str, object]:
        """The same as plain data, keyed and written as in the file."""
        addresses = [dotted(address) for address in self.masquerade_addresses]
        return {key: getattr(self, _field(key)) for key in _READERS} | {
            "ports": ",".join(map(_ends, self.ports)),
            "masquerade-address": addresses,
            "metrics": "off" if self.metrics is None else _address_and_port(*self.metrics),
            "control": str(self.control),
            "mapping": _by_protocol_name(self.mapping),
            "filtering": _by_protocol_name(self.filtering),
            "timeouts": {_key(name): value for name, value in asdict(self.timeouts).items()},
            "apps": {n: list(self.apps.get(n, ())) for n in {**apps.DEFAULT, **self.apps}},
            "forward": [rule.as_table() for rule in self.forwards],
            "trigger": [rule.as_table() for rule in self.triggers],
        }


def default_file() -> Path | None:
    """The file to read where none is named, or None where it is not there."""
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def load(path: Path | None, command_line: Mapping[str, object]) -> Configuration:
    """The configuration: defaults, then the TOML file, if any, then the command line.

    `command_line` holds values by key ("port-selection"); None and () mean "not given".

    Raises ConfigurationError for the file and UsageError for the command line.
    """
    given = {key: value for key, value in command_line.items() if value not in (None, ())}
    from_command_line = _read(given, _command_line_error)
    file = _File.read(path) if path else None
    from_file = _read(file.table, file.error) if file else {}
    return _without_contradiction(replace(Configuration(), **(from_file | from_command_line)))


def _without_contradiction(configuration: Configuration) -> Configuration:
    """The same. Raises ConfigurationError where options that are right each are wrong together."""
    if both := forwards.contradiction(configuration.forwards, configuration.triggers):
        raise ConfigurationError(f"forward {both[0]} and trigger {both[1]} open the same ports")
    if not configuration.dynamic_ports():
        raise ConfigurationError("ports: all of them are forwarded, and none is left for sessions")
    return configuration


# Readers: what a person wrote -> the value of the field, or Wrong.


def _behaviours(default: Mapping[int, str], value: object) -> dict[int, str]:
    """By protocol number, from one for all protocols or from a table by protocol name."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(PROTOCOLS, one_of(BEHAVIOURS, value))
    numbers = {name: number for number, name in PROTOCOLS.items()}
    behaviours = dict(default)
    for name, behaviour in value.items():
        if name not in numbers:
            raise Wrong(f"is unknown; known are {', '.join(numbers)}", name)
        behaviours[numbers[name]] = one_of(BEHAVIOURS, behaviour, name)
    return behaviours


def _by_protocol_name(behaviours: Mapping[int, str]) -> object:
    """One for all protocols where they are alike, else a table."""
    first, *others = behaviours.values()
    if all(other == first for other in others):
        return first
    return {PROTOCOLS[number]: behaviour for number, behaviour in behaviours.items()}


def _ports(value: object) -> tuple[range, ...]:
    written = value.split(",") if isinstance(value, str) else [value]
    ranges = sorted(map(_port_range, written), key=lambda ports: ports.start)
    for ports, following in pairwise(ranges):
        if following.start < ports.stop:
            raise Wrong(f"must not overlap, as {_ends(ports)} and {_ends(following)} do")
    return tuple(ranges)


def _port_range(value: object) -> range:
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", value) if isinstance(value, str) else None
    low, high = map(int, match.groups()) if match else (0, 0)
    if not 1 <= low <= high <= 65535:
        raise must_be("LO-HI[,LO-HI]..., from 1 to 65535 with the lower port first", value)
    return range(low, high + 1)


def _ends(ports: range) -> str:
    return f"{ports.start}-{ports.stop - 1}"


def _masquerade_addresses(value: object) -> tuple[int, ...]:
    written = [value] if isinstance(value, str) else value
    if not isinstance(written, (list, tuple)):
        raise must_be("an IPv4 address or a list of them", value)
    return tuple(dict.fromkeys(map(_outside_address, written)))


_outside_address = partial(unicast_address, "an address that the outside can answer to")


def _metrics(value: object) -> tuple[str, int] | None:
    if value == "off":
        return None
    match = re.fullmatch(r"(.+):([0-9]{1,5})", value) if isinstance(value, str) else None
    try:
        host, port = match.groups() if match else ("", "0")
        bracketed = re.fullmatch(r"\[(.+)\]", host)
        address = ipaddress.IPv6Address(bracketed[1]) if bracketed else ipaddress.IPv4Address(host)
        return str(address), whole_number(1, 65535, int(port))
    except (ValueError, Wrong):
        raise must_be('ADDRESS:PORT (as 127.0.0.1:9469 or [::1]:9469) or "off"', value) from None


def _socket_path(value: object) -> Path:
    allowed = f"a path of at most {SOCKET_PATH_BYTES} bytes"
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise must_be(allowed, value)
    if len(os.fsencode(value)) > SOCKET_PATH_BYTES:
        raise must_be(allowed, value)
    return Path(value)


def _timeouts(value: object) -> Timeouts:
    if not isinstance(value, Mapping):
        return PROFILES[one_of(PROFILES, value)]
    singles = dict(value)
    profile = one_of(PROFILES, singles.pop("profile", "rfc"), "profile")
    known = {_key(field.name): field.name for field in fields(Timeouts)}
    for key, seconds in singles.items():
        if key not in known:
            raise Wrong(f"is unknown; known are profile, {', '.join(known)}", key)
        if not is_number(seconds) or not 0 < seconds <= YEAR:
            raise must_be(f"seconds, more than 0 and at most {YEAR}", seconds, key)
    changes = {known[key]: float(seconds) for key, seconds in singles.items()}
    return replace(PROFILES[profile], **changes)


def _apps(value: object) -> Mapping[str, tuple[int, ...]]:
    """A table of ports by name, or from the command line NAME, NAME=PORT,PORT, NAME=off, off."""
    if isinstance(value, Mapping):
        given = list(value.items())
    elif isinstance(value, tuple):
        given = [_app_option(item) for item in value]
    else:
        raise must_be("a table of helpers and their ports", value)
    on = dict(apps.DEFAULT)
    for name, ports in given:
        if name == "off":
            on.clear()
            continue
        if name not in apps.names():
            raise Wrong(f"is unknown; known are {', '.join(apps.names())}", name)
        on[name] = _app_ports(name, ports)
    return {name: ports for name, ports in on.items() if ports}


def _app_option(item: str) -> tuple[str, object]:
    name, equals, written = item.partition("=")
    if not equals:
        return name, apps.helper(name).ports if name in apps.names() else ()
    if written == "off":
        return name, ()
    return name, [int(port) if port.isdecimal() else port for port in written.split(",")]


def _app_ports(name: str, value: object) -> tuple[int, ...]:
    allowed = "a list of ports, from 1 to 65535"
    if not isinstance(value, (list, tuple)):
        raise must_be(allowed, value, name)
    try:
        return tuple(dict.fromkeys(whole_number(1, 65535, port) for port in value))
    except Wrong:
        raise must_be(allowed, value, name) from None


def _key(name: str) -> str:
    return name.replace("_", "-")


def _address_and_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


_READERS: dict[str, Callable[[object], object]] = {
    "queue": partial(whole_number, 0, 65535),
    "ports": _ports,
    "masquerade-address": _masquerade_addresses,
    "metrics": _metrics,
    "control": _socket_path,
    "mapping": partial(_behaviours, DEFAULT_MAPPING),
    "filtering": partial(_behaviours, DEFAULT_FILTERING),
    "port-selection": partial(one_of, PORT_SELECTIONS),
    "other-protocols": partial(one_of, OTHER_PROTOCOLS),
    "timeouts": _timeouts,
    "log-level": partial(one_of, LOG_LEVELS),
    "log-format": partial(one_of, LOG_FORMATS),
    "queue-length": partial(whole_number, 1, 1 << 20),
    "socket-buffer": partial(whole_number, 1 << 16, 1 << 30),
    "gso": boolean,
    "max-entries": partial(whole_number, 1, 1 << 26),
    "max-entries-per-host": partial(whole_number, 0, 1 << 26),
    "max-ports-per-host": partial(whole_number, 0, 65535),
    "max-new-per-host": partial(whole_number, 0, 1 << 26),
    "inbound-refresh": boolean,
    "unsolicited": partial(one_of, UNSOLICITED),
    "reset-on-address-change": boolean,
    "apps": _apps,
    "forward": forwards.forwards,
    "trigger": forwards.triggers,
}

_FIELDS_OF_MANY = {
    "masquerade-address": "masquerade_addresses",
    "forward": "forwards",
    "trigger": "triggers",
}
"""Keys in the singular, as each may be given several times."""


def _field(key: str) -> str:
    return _FIELDS_OF_MANY.get(key, key.replace("-", "_"))


def _read(
    table: Mapping[str, object], error: Callable[[tuple[str | int, ...], str], NfmasqError]
) -> dict[str, Any]:
    """Return the fields of Configuration that `table` gives; `error` makes the error for a key."""
    values = {}
    for key, value in table.items():
        if key not in _READERS:
            raise error((key,), f"is unknown; known are {', '.join(_READERS)}")
        try:
            values[_field(key)] = _READERS[key](value)
        except Wrong as wrong:
            raise error((key, *wrong.keys), str(wrong)) from None
    return values


def _command_line_error(keys: tuple[str | int, ...], message: str) -> UsageError:
    first, *others = _names(keys)
    return UsageError(f"--{' '.join(['app' if first == 'apps' else first, *others])} {message}")


def _names(keys: tuple[str | int, ...]) -> list[str]:
    """The keys less those that are a place in a list."""
    return [key for key in keys if isinstance(key, str)]


# The file, and where in it a key stands.


@dataclass(frozen=True)
class _File:
    path: Path
    text: str
    table: dict[str, Any]

    @classmethod
    def read(cls, where: Path) -> _File:
        """The parsed file."""
        try:
            # Decoded by hand: TOML wants UTF-8 whatever the locale.
            text = where.read_bytes().decode().replace("\r\n", "\n")
            return cls(where, text, tomllib.loads(text))
        except FileNotFoundError:
            raise ConfigurationError(f"{where}: there is no such configuration file") from None
        except OSError as error:
            raise ConfigurationError(f"{where}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ConfigurationError(f"{where}:{line}: not UTF-8 text") from None
        except RecursionError:
            raise ConfigurationError(f"{where}: nested too deeply") from None
        except ValueError as error:
            raise ConfigurationError(_syntax_error(where, text, str(error))) from None

    def error(self, keys: tuple[str | int, ...], message: str) -> ConfigurationError:
        line = _line_of(self.text, keys)
        return ConfigurationError(f"{self.path}:{line}: {'.'.join(_names(keys))} {message}")


def _syntax_error(path: Path, text: str, message: str) -> str:
    """The parser's message with its "(at line 3, column 5)" moved to the front as path:3."""
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", message)
    if not match:
        return f"{path}: {message}"
    line = match[2] or len(text.splitlines())
    return f"{path}:{line}: not TOML: {match[1]}"


def _line_of(text: str, keys: tuple[str | int, ...]) -> int:
    """The line, from 1, on which the statement begins that first gives the key.

    A TOML text cut after a whole statement is TOML again: so the statement that gives the key is
    the one by which the parsed text, growing line by line, comes to hold it. That needs no
    second parser, and is right for dotted and quoted keys, tables and values over many lines.
    """
    lines = text.split("\n")
    begins = 1
    for count in range(1, len(lines) + 1):
        try:
            value: Any = tomllib.loads("\n".join(lines[:count]))
        except ValueError:
            continue  # within a statement
        for key in keys:
            if isinstance(value, list):
                value = dict(enumerate(value))
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return begins
        begins = count + 1
    return begins
