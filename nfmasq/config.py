"""The options of `nfmasq run`: defaults, the TOML file over them, the command line over both.

A key is the command-line option without the dashes in front (of `--app`, the plural). Each has one
check in `_CHECKS`, which turns what a person wrote into the value of a field of `Configuration`;
file and command line share the checks, so a value is right or wrong in both places alike.

A wrong file is a `ConfigurationError`, one line that names the file and the line; a wrong
option is a `UsageError`, one line that names the option.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from nfmasq import apps
from nfmasq.engine import (
    BEHAVIOURS,
    OTHER_PROTOCOLS,
    PORT_SELECTIONS,
    PROFILES,
    Masquerade,
    Timeouts,
)
from nfmasq.engine.counters import PROTOCOLS
from nfmasq.engine.sessions import Lock
from nfmasq.engine.unsolicited import UNSOLICITED
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
    """Everything `nfmasq run` is told, checked; `Configuration()` is the defaults."""

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

    def masquerade(self, lock: Lock | None = None) -> Masquerade:
        """A new masquerade with these settings."""
        return Masquerade(
            ports=tuple(chain.from_iterable(self.ports)),
            mapping=self.mapping,
            filtering=self.filtering,
            port_selection=self.port_selection,
            other_protocols=self.other_protocols,
            timeouts=self.timeouts,
            max_entries=self.max_entries,
            max_entries_per_host=self.max_entries_per_host,
            max_ports_per_host=self.max_ports_per_host,
            max_new_per_host=self.max_new_per_host,
            inbound_refresh=self.inbound_refresh,
            unsolicited=self.unsolicited,
            reset_on_address_change=self.reset_on_address_change,
            apps=apps.helpers(self.apps),
            lock=lock,
        )

    def as_table(self) -> dict[str, object]:
        """The same as plain data, keyed and written as in the file."""
        addresses = [str(ipaddress.IPv4Address(a)) for a in self.masquerade_addresses]
        return {key: getattr(self, _field(key)) for key in _CHECKS} | {
            "ports": ",".join(map(_ends, self.ports)),
            "masquerade-address": addresses,
            "metrics": "off" if self.metrics is None else _address_and_port(*self.metrics),
            "control": str(self.control),
            "mapping": _by_protocol_name(self.mapping),
            "filtering": _by_protocol_name(self.filtering),
            "timeouts": {_key(name): value for name, value in asdict(self.timeouts).items()},
            "apps": {n: list(self.apps.get(n, ())) for n in {**apps.DEFAULT, **self.apps}},
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
    from_command_line = _checked(given, _command_line_error)
    file = _File.read(path) if path else None
    from_file = _checked(file.table, file.error) if file else {}
    return replace(Configuration(), **(from_file | from_command_line))


# Checks: what a person wrote -> the value of the field, or _Wrong.


class _Wrong(Exception):
    """A value is not allowed; says what is. `keys` lead from the option to the value."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


def _must_be(allowed: str, value: object, *keys: str) -> _Wrong:
    written = json.dumps(value, default=str, ensure_ascii=False)
    if len(written) > 60:
        written = written[:57] + "..."
    return _Wrong(f"must be {allowed}, not {written}", *keys)


def _whole_number(low: int, high: int, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _must_be(f"a whole number from {low} to {high}", value)
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise _must_be("true or false", value)
    return value


def _one_of(choices: Iterable[str], value: object, *keys: str) -> str:
    if not isinstance(value, str) or value not in choices:
        raise _must_be("one of " + ", ".join(choices), value, *keys)
    return value


def _behaviours(default: Mapping[int, str], value: object) -> dict[int, str]:
    """By protocol number, from one for all protocols or from a table by protocol name."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(PROTOCOLS, _one_of(BEHAVIOURS, value))
    numbers = {name: number for number, name in PROTOCOLS.items()}
    behaviours = dict(default)
    for name, behaviour in value.items():
        if name not in numbers:
            raise _Wrong(f"is unknown; known are {', '.join(numbers)}", name)
        behaviours[numbers[name]] = _one_of(BEHAVIOURS, behaviour, name)
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
            raise _Wrong(f"must not overlap, as {_ends(ports)} and {_ends(following)} do")
    return tuple(ranges)


def _port_range(value: object) -> range:
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", value) if isinstance(value, str) else None
    low, high = map(int, match.groups()) if match else (0, 0)
    if not 1 <= low <= high <= 65535:
        raise _must_be("LO-HI[,LO-HI]..., from 1 to 65535 with the lower port first", value)
    return range(low, high + 1)


def _ends(ports: range) -> str:
    return f"{ports.start}-{ports.stop - 1}"


def _masquerade_addresses(value: object) -> tuple[int, ...]:
    written = [value] if isinstance(value, str) else value
    if not isinstance(written, (list, tuple)):
        raise _must_be("an IPv4 address or a list of them", value)
    return tuple(dict.fromkeys(map(_unicast_address, written)))


def _unicast_address(value: object) -> int:
    """An address that a host outside can answer to, in host order."""
    try:
        # Not value itself: IPv4Address takes an integer too.
        address = ipaddress.IPv4Address(str(value))
    except ValueError:
        raise _must_be("an IPv4 address", value) from None
    first_octet = int(address) >> 24
    if first_octet in (0, 127) or address.is_multicast or int(address) == 0xFFFFFFFF:
        raise _must_be("an address that the outside can answer to", value)
    return int(address)


def _metrics(value: object) -> tuple[str, int] | None:
    if value == "off":
        return None
    match = re.fullmatch(r"(.+):([0-9]{1,5})", value) if isinstance(value, str) else None
    try:
        host, port = match.groups() if match else ("", "0")
        bracketed = re.fullmatch(r"\[(.+)\]", host)
        address = ipaddress.IPv6Address(bracketed[1]) if bracketed else ipaddress.IPv4Address(host)
        return str(address), _whole_number(1, 65535, int(port))
    except (ValueError, _Wrong):
        raise _must_be('ADDRESS:PORT (as 127.0.0.1:9469 or [::1]:9469) or "off"', value) from None


def _socket_path(value: object) -> Path:
    allowed = f"a path of at most {SOCKET_PATH_BYTES} bytes"
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise _must_be(allowed, value)
    if len(os.fsencode(value)) > SOCKET_PATH_BYTES:
        raise _must_be(allowed, value)
    return Path(value)


def _timeouts(value: object) -> Timeouts:
    if not isinstance(value, Mapping):
        return PROFILES[_one_of(PROFILES, value)]
    singles = dict(value)
    profile = _one_of(PROFILES, singles.pop("profile", "rfc"), "profile")
    known = {_key(field.name): field.name for field in fields(Timeouts)}
    for key, seconds in singles.items():
        if key not in known:
            raise _Wrong(f"is unknown; known are profile, {', '.join(known)}", key)
        if not _is_number(seconds) or not 0 < seconds <= YEAR:
            raise _must_be(f"seconds, more than 0 and at most {YEAR}", seconds, key)
    changes = {known[key]: float(seconds) for key, seconds in singles.items()}
    return replace(PROFILES[profile], **changes)


def _apps(value: object) -> Mapping[str, tuple[int, ...]]:
    """A table of ports by name, or from the command line NAME, NAME=PORT,PORT, NAME=off, off."""
    if isinstance(value, Mapping):
        given = list(value.items())
    elif isinstance(value, tuple):
        given = [_app_option(item) for item in value]
    else:
        raise _must_be("a table of helpers and their ports", value)
    on = dict(apps.DEFAULT)
    for name, ports in given:
        if name == "off":
            on.clear()
            continue
        if name not in apps.names():
            raise _Wrong(f"is unknown; known are {', '.join(apps.names())}", name)
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
        raise _must_be(allowed, value, name)
    try:
        return tuple(dict.fromkeys(_whole_number(1, 65535, port) for port in value))
    except _Wrong:
        raise _must_be(allowed, value, name) from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _key(name: str) -> str:
    return name.replace("_", "-")


def _address_and_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


_CHECKS: dict[str, Callable[[object], object]] = {
    "queue": partial(_whole_number, 0, 65535),
    "ports": _ports,
    "masquerade-address": _masquerade_addresses,
    "metrics": _metrics,
    "control": _socket_path,
    "mapping": partial(_behaviours, DEFAULT_MAPPING),
    "filtering": partial(_behaviours, DEFAULT_FILTERING),
    "port-selection": partial(_one_of, PORT_SELECTIONS),
    "other-protocols": partial(_one_of, OTHER_PROTOCOLS),
    "timeouts": _timeouts,
    "log-level": partial(_one_of, LOG_LEVELS),
    "log-format": partial(_one_of, LOG_FORMATS),
    "queue-length": partial(_whole_number, 1, 1 << 20),
    "socket-buffer": partial(_whole_number, 1 << 16, 1 << 30),
    "gso": _boolean,
    "max-entries": partial(_whole_number, 1, 1 << 26),
    "max-entries-per-host": partial(_whole_number, 0, 1 << 26),
    "max-ports-per-host": partial(_whole_number, 0, 65535),
    "max-new-per-host": partial(_whole_number, 0, 1 << 26),
    "inbound-refresh": _boolean,
    "unsolicited": partial(_one_of, UNSOLICITED),
    "reset-on-address-change": _boolean,
    "apps": _apps,
}


def _field(key: str) -> str:
    return "masquerade_addresses" if key == "masquerade-address" else key.replace("-", "_")


def _checked(
    table: Mapping[str, object], error: Callable[[tuple[str, ...], str], NfmasqError]
) -> dict[str, Any]:
    """The fields of Configuration that `table` gives; `error` makes the error for a key."""
    values = {}
    for key, value in table.items():
        if key not in _CHECKS:
            raise error((key,), f"is unknown; known are {', '.join(_CHECKS)}")
        try:
            values[_field(key)] = _CHECKS[key](value)
        except _Wrong as wrong:
            raise error((key, *wrong.keys), str(wrong)) from None
    return values


def _command_line_error(keys: tuple[str, ...], message: str) -> UsageError:
    option = ("app", *keys[1:]) if keys[0] == "apps" else keys
    return UsageError(f"--{' '.join(option)} {message}")


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

    def error(self, keys: tuple[str, ...], message: str) -> ConfigurationError:
        line = _line_of(self.text, keys)
        return ConfigurationError(f"{self.path}:{line}: {'.'.join(keys)} {message}")


def _syntax_error(path: Path, text: str, message: str) -> str:
    """The parser's message with its "(at line 3, column 5)" moved to the front as path:3."""
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", message)
    if not match:
        return f"{path}: {message}"
    line = match[2] or len(text.splitlines())
    return f"{path}:{line}: not TOML: {match[1]}"


def _line_of(text: str, keys: tuple[str, ...]) -> int:
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
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return begins
        begins = count + 1
    return begins
