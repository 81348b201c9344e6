"""Reads single values that a person wrote, in whichever option or file.

Each function takes what was written and returns what it means, or raises Wrong, which says what is
wrong about it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import TypeGuard


class Wrong(Exception):
    """Says what is allowed in place of a value. `keys` lead from the option to the value.

    A key that is a number is the place in a list.
    """

    def __init__(self, message: str, *keys: str | int) -> None:
        super().__init__(message)
        self.keys = keys


def written(value: object) -> str:
    """Return a value as text for a message of one line, cut off where it is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def must_be(allowed: str, value: object, *keys: str | int) -> Wrong:
    """Return the complaint about a value that is not what is allowed."""
    return Wrong(f"must be {allowed}, not {written(value)}", *keys)


def whole_number(low: int, high: int, value: object, *keys: str | int) -> int:
    """Return a whole number from `low` to `high`, both included."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise must_be(f"a whole number from {low} to {high}", value, *keys)
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Say whether a value is a number at all."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def seconds(low: float, high: float, value: object, *keys: str | int) -> float:
    """Return seconds and parts of them, from `low` to `high`, both included."""
    if is_number(value) and low <= value <= high:
        return float(value)
    raise must_be(f"seconds, from {low} to {high}", value, *keys)


def boolean(value: object) -> bool:
    """Return a value that has to be true or false."""
    if not isinstance(value, bool):
        raise must_be("true or false", value)
    return value


def one_of(choices: Iterable[str], value: object, *keys: str | int) -> str:
    """Return a name that is among `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise must_be("one of " + ", ".join(choices), value, *keys)
    return value


def unicast_address(allowed: str, value: object, *keys: str | int) -> int:
    """Return the address of one host, in host order; `allowed` says which address is asked for."""
    try:
        # Not value itself: IPv4Address takes an integer too.
        address = IPv4Address(str(value))
    except ValueError:
        raise must_be("an IPv4 address", value, *keys) from None
    first_octet = int(address) >> 24
    if first_octet in (0, 127) or address.is_multicast or int(address) == 0xFFFFFFFF:
        raise must_be(allowed, value, *keys)
    return int(address)
