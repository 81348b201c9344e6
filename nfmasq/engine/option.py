"""A setting as a field of a dataclass: its default, and what it may be, said once.

Whoever reads settings (the command line, the configuration file), or shows them (`--help`, the
documentation), takes both from the field.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, field
from typing import Any, TypeVar

_T = TypeVar("_T")


def between(low: int, default: int, high: int) -> int:
    """Make a field for a whole number from `low` to `high`."""
    whole: int = field(default=default, metadata={"range": range(low, high + 1)})
    return whole


def one_of(choices: Iterable[str], default: str) -> str:
    """Make a field for one of several names."""
    name: str = field(default=default, metadata={"choices": tuple(choices)})
    return name


def range_of(setting: Field[Any]) -> range | None:
    """Return the whole numbers that a field allows; None where it is for something else."""
    return setting.metadata.get("range")


def choices_of(setting: Field[Any]) -> tuple[str, ...] | None:
    """Return the names that a field allows; None where it is for something else."""
    return setting.metadata.get("choices")


def seconds(low: float, default: float, high: float) -> float:
    """Make a field for a time in seconds, whole or not, from `low` to `high`."""
    duration: float = field(default=default, metadata={"seconds": (low, high)})
    return duration


def seconds_of(setting: Field[Any]) -> tuple[float, float] | None:
    """Return the least and the most seconds of a field; None where it is for something else."""
    return setting.metadata.get("seconds")
