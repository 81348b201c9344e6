"""The options of `nfmasq run`, by key: how each is read from what a person wrote.

A key is the command-line option without the dashes in front (of `--app`, the plural). Its reader
turns what was written into the value of a field, of `Configuration` or of the engine's `Settings`,
or raises `Wrong`. File and command line share the readers, so a value is right or wrong in both
places alike. Most readers need only what the field itself says of its values (`engine/option.py`).
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from nfmasq import apps
from nfmasq.config import forwards
from nfmasq.config.configuration import (
    DEFAULT_PROFILE,
    KEYS,
    field_of,
    key_of,
    setting_of,
    written_ports,
)
from nfmasq.config.values import (
    Wrong,
    is_number,
    must_be,
    one_of,
    reader_of,
    unicast_address,
    whole_number,
)
from nfmasq.engine import PROFILES, PROTOCOLS, Settings, Timeouts
from nfmasq.engine.option import allowed_names
from nfmasq.engine.table.timeouts import LONGEST
from nfmasq.rules import is_interface

Reader: TypeAlias = "Callable[[object], object]"

SOCKET_PATH_BYTES = 107  # sun_path holds 108 with its closing zero


def _behaviours(key: str, value: object) -> dict[int, str]:
    """Read behaviours by protocol number, from one name or from a table by protocol name.

    One name is for all protocols. A protocol that a table does not name has its default.
    """
    allowed = allowed_names(setting_of(key)) or ()
    if not isinstance(value, Mapping):
        return dict.fromkeys(PROTOCOLS, one_of(allowed, value))
    numbers = {name: number for number, name in PROTOCOLS.items()}
    behaviours: dict[int, str] = dict(getattr(Settings(), field_of(key)))
    for name, behaviour in value.items():
        if name not in numbers:
            raise Wrong(f"is unknown; known are {', '.join(numbers)}", name)
        behaviours[numbers[name]] = one_of(allowed, behaviour, name)
    return behaviours


def _ports(value: object) -> tuple[range, ...]:
    written = value.split(",") if isinstance(value, str) else [value]
    ranges = sorted(map(_port_range, written), key=lambda ports: ports.start)
    for ports, following in pairwise(ranges):
        if following.start < ports.stop:
            both = f"{written_ports(ports)} and {written_ports(following)}"
            raise Wrong(f"must not overlap, as {both} do")
    return tuple(ranges)


def _port_range(value: object) -> range:
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", value) if isinstance(value, str) else None
    low, high = map(int, match.groups()) if match else (0, 0)
    if not 1 <= low <= high <= 65535:
        raise must_be("LO-HI[,LO-HI]..., from 1 to 65535 with the lower port first", value)
    return range(low, high + 1)


def _masquerade_addresses(value: object) -> tuple[int, ...]:
    written = [value] if isinstance(value, str) else value
    if not isinstance(written, (list, tuple)):
        raise must_be("an IPv4 address or a list of them", value)
    return tuple(dict.fromkeys(map(_outside_address, written)))


_outside_address = partial(unicast_address, "an address that the outside can answer to")


def _interfaces(value: object) -> tuple[str, ...]:
    written = [value] if isinstance(value, str) else value
    if not isinstance(written, (list, tuple)):
        raise must_be("an interface or a list of them", value)
    for place, name in enumerate(written):
        if not isinstance(name, str) or not is_interface(name):
            allowed = "the name of an interface, or the beginning of names with + after it"
            raise must_be(allowed, name)
        if name in written[:place]:
            raise Wrong(f"has {name} twice")
    return tuple(written)


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
    profile = one_of(PROFILES, singles.pop("profile", DEFAULT_PROFILE), "profile")
    known = {key_of(field.name): field.name for field in fields(Timeouts)}
    for key, seconds in singles.items():
        if key not in known:
            raise Wrong(f"is unknown; known are profile, {', '.join(known)}", key)
        if not is_number(seconds) or not 0 < seconds <= LONGEST:
            raise must_be(f"seconds, more than 0 and at most {LONGEST}", seconds, key)
    changes = {known[key]: float(seconds) for key, seconds in singles.items()}
    return replace(PROFILES[profile], **changes)


def _apps(value: object) -> Mapping[str, tuple[int, ...]]:
    """Read the ports of helpers by name, from a table or from the command line.

    From the command line comes a tuple of NAME, NAME=PORT,PORT, NAME=off or off.
    """
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


_SPECIAL: dict[str, Reader] = {
    "ports": _ports,
    "masquerade-address": _masquerade_addresses,
    "inside": _interfaces,
    "outside": _interfaces,
    "metrics": _metrics,
    "control": _socket_path,
    "mapping": partial(_behaviours, "mapping"),
    "filtering": partial(_behaviours, "filtering"),
    "timeouts": _timeouts,
    "apps": _apps,
    "forward": forwards.forwards,
    "trigger": forwards.triggers,
}

READERS: dict[str, Reader] = {key: _SPECIAL.get(key) or reader_of(setting_of(key)) for key in KEYS}
"""The readers of all options, by key."""
