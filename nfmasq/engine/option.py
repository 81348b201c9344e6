"""A setting as a field of a dataclass: its default, and what it may be, said once.

Whoever reads settings (the command line, the configuration file), or shows them (`--help`, the
documentation), takes both from the field.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, field
from typing import Any


def number_field(default: int, *, low: int, high: int) -> int:
    """Make a field for a whole number from `low` to `high`."""
    number: int = field(default=default, metadata={"range": range(low, high + 1)})
    return number


def seconds_field(default: float, *, low: float, high: float) -> float:
    """Make a field for seconds, and parts of them, from `low` to `high`."""
    duration: float = field(default=default, metadata={"seconds": (low, high)})
    return duration


def name_field(default: str, choices: Iterable[str]) -> str:
    """Make a field for one of several names."""
    name: str = field(default=default, metadata={"choices": tuple(choices)})
    return name


def allowed_numbers(setting: Field[Any]) -> range | None:
    """Return the whole numbers that a field allows; None: the field is not for a whole number."""
    return setting.metadata.get("range")


def allowed_seconds(setting: Field[Any]) -> tuple[float, float] | None:
    """Return the least and the most seconds that a field allows; None: it is not for seconds."""
    return setting.metadata.get("seconds")


def allowed_names(setting: Field[Any]) -> tuple[str, ...] | None:
    """Return the names that a field allows; None: the field is not for a name."""
    return setting.metadata.get("choices")
