"""The options of `nfmasq run`: the TOML file wins over the defaults, the command line over both.

| file | what it is |
| --- | --- |
| `configuration.py` | `Configuration`: the values of all options, with the defaults |
| `readers.py` | each option by its key: from what a person wrote to the value |
| `values.py` | readers of single values, which several options use |
| `forwards.py`, `health.py` | forwarded and triggered ports, and the health checks of servers |
| `file.py` | the TOML file, and on which line a key stands |
| `memory.py` | how many entries fit into this machine's memory: the default of max-entries |

What is wrong in the file is a `ConfigurationError`: one line that names the file and the line. What
is wrong on the command line is a `UsageError`: one line that names the option. Options that
contradict each other are a `ConfigurationError` that names the options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from nfmasq.config import forwards
from nfmasq.config.configuration import (
    DEFAULT_CONTROL,
    DEFAULT_PROFILE,
    LOAD,
    LOG_FORMATS,
    LOG_LEVELS,
    OWN,
    Configuration,
    field_of,
    setting_of,
)
from nfmasq.config.file import ConfigurationError, File, names
from nfmasq.config.readers import READERS
from nfmasq.config.values import Wrong
from nfmasq.engine import Settings
from nfmasq.errors import NfmasqError
from nfmasq.rules import overlap

__all__ = [
    "DEFAULT_CONTROL",
    "DEFAULT_FILE",
    "DEFAULT_PROFILE",
    "LOG_FORMATS",
    "LOG_LEVELS",
    "Configuration",
    "ConfigurationError",
    "UsageError",
    "default_file",
    "load",
    "setting_of",
]

DEFAULT_FILE = Path("/etc/nfmasq.toml")


class UsageError(NfmasqError):
    """The command line is wrong; the message names the option."""


def default_file() -> Path | None:
    """Return DEFAULT_FILE, which is read where no file is named; None where it does not exist."""
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def load(
    path: Path | None, command_line: Mapping[str, object], most_entries: int | None = None
) -> Configuration:
    """Read the configuration: defaults, then the TOML file, if any, then the command line.

    `command_line` holds values by key ("port-selection"); None and () mean "not given".
    `most_entries` is the default of max-entries on this machine, if it differs from that elsewhere.

    Raises ConfigurationError for the file, and for options that contradict each other, and
    UsageError for the command line.
    """
    given = {key: value for key, value in command_line.items() if value not in (None, ())}
    from_command_line = _read(given, _command_line_error)
    file = File.read(path) if path else None
    from_file = _read(file.table, file.error) if file else {}
    default = {} if most_entries is None else {"max_entries": most_entries}
    return _without_contradiction(_configuration(default | from_file | from_command_line))


def _configuration(values: dict[str, Any]) -> Configuration:
    """Make the configuration from values by field; a field that it lacks is the engine's."""
    if values.get("inside"):
        values = {"rules": LOAD, **values}
    of_the_engine = {name: value for name, value in values.items() if name not in OWN}
    of_the_daemon = {name: value for name, value in values.items() if name in OWN}
    return Configuration(replace(Settings(), **of_the_engine), **of_the_daemon)


def _without_contradiction(configuration: Configuration) -> Configuration:
    """Return the configuration, in which no options contradict each other.

    Raises ConfigurationError where options are right each by itself, and wrong together.
    """
    if both := forwards.contradiction(configuration.forwards, configuration.triggers):
        raise ConfigurationError(f"forward {both[0]} and trigger {both[1]} open the same ports")
    if not configuration.dynamic_ports():
        raise ConfigurationError("ports: all of them are forwarded, and none is left for sessions")
    if wrong := _wrong_interfaces(configuration):
        raise ConfigurationError(wrong)
    return configuration


def _wrong_interfaces(configuration: Configuration) -> str | None:
    """Return what is wrong with the interfaces of the rules, each of which is right by itself."""
    inside, outside = configuration.inside, configuration.outside
    if inside and not outside:
        return "inside is given without outside: the rules need both"
    if outside and not inside:
        return "outside is given without inside: the rules need both"
    if configuration.rules == LOAD and not inside:
        return "rules load needs to know for which interfaces: give inside and outside"
    for one, other in product(inside, outside):
        if overlap(one, other):
            return f"inside {one} and outside {other} overlap: no interface can be both"
    return None


def _read(
    table: Mapping[str, object], error: Callable[[tuple[str | int, ...], str], NfmasqError]
) -> dict[str, Any]:
    """Read the values of a table, by field; `error` makes the error for a key."""
    values = {}
    for key, value in table.items():
        if key not in READERS:
            raise error((key,), f"is unknown; known are {', '.join(READERS)}")
        try:
            values[field_of(key)] = READERS[key](value)
        except Wrong as wrong:
            raise error((key, *wrong.keys), str(wrong)) from None
    return values


def _command_line_error(keys: tuple[str | int, ...], message: str) -> UsageError:
    first, *others = names(keys)
    return UsageError(f"--{' '.join(['app' if first == 'apps' else first, *others])} {message}")
