"""Readers of single values that a person wrote in an option or in the file.

Each takes what was written and returns what it means, or raises Wrong with what is wrong about it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import Field
from functools import partial
from ipaddress import IPv4Address
from typing import Any, TypeGuard

from nfmasq.engine import option


class Wrong(Exception):
    """A value is not allowed; the message says what is wrong about it.

    `keys` lead from the option to the value; a key that is a number is a place in a list.
    """

    def __init__(self, message: str, *keys: str | int) -> None:
        super().__init__(message)
        self.keys = keys


def written(value: object) -> str:
    """Write a value for a message of one line, in 60 characters at most."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def must_be(allowed: str, value: object, *keys: str | int) -> Wrong:
    """Make the error that says what is allowed, and what was written instead."""
    return Wrong(f"must be {allowed}, not {written(value)}", *keys)


def whole_number(low: int, high: int, value: object, *keys: str | int) -> int:
    """Read a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise must_be(f"a whole number from {low} to {high}", value, *keys)
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Say whether a value is a number, which true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def seconds(low: float, high: float, value: object, *keys: str | int) -> float:
    """Read a number of seconds, whole or not, from `low` to `high`."""
    if is_number(value) and low <= value <= high:
        return float(value)
    raise must_be(f"seconds, from {low} to {high}", value, *keys)


def boolean(value: object, *keys: str | int) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise must_be("true or false", value, *keys)
    return value


def one_of(choices: Iterable[str], value: object, *keys: str | int) -> str:
    """Read a name that is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise must_be("one of " + ", ".join(choices), value, *keys)
    return value


def unicast_address(allowed: str, value: object, *keys: str | int) -> int:
    """Read the IPv4 address of a single host, and return it in host order.

    Raises Wrong for 0.0.0.0/8, 127.0.0.0/8, multicast and 255.255.255.255; its message says by
    `allowed` which address it has to be.
    """
    try:
        # Not value itself: IPv4Address takes an integer too.
        address = IPv4Address(str(value))
    except ValueError:
        raise must_be("an IPv4 address", value, *keys) from None
    first_octet = int(address) >> 24
    if first_octet in (0, 127) or address.is_multicast or int(address) == 0xFFFFFFFF:
        raise must_be(allowed, value, *keys)
    return int(address)


def reader_of(setting: Field[Any]) -> Callable[..., Any]:
    """Return the reader of a field that says what it may be (`engine/option.py`), or is a switch.

    A reader takes what was written, and the keys that lead to it. Raises TypeError for any other
    field.
    """
    if (whole := option.allowed_numbers(setting)) is not None:
        return partial(whole_number, whole.start, whole.stop - 1)
    if (duration := option.allowed_seconds(setting)) is not None:
        return partial(seconds, *duration)
    if (choices := option.allowed_names(setting)) is not None:
        return partial(one_of, choices)
    if setting.type in (bool, "bool"):
        return boolean
    raise TypeError(f"{setting.name} does not say what it may be")
