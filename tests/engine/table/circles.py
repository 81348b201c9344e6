"""Circles of entries, linked through fields of their own: a slot's, a line's, the roll's."""

from __future__ import annotations

from typing import Any


def around(begin: Any, link: str, back: str) -> list[Any]:
    """List what stands in the circle of `begin`, and make sure that it is linked both ways."""
    found: list[Any] = []
    before, place = begin, getattr(begin, link)
    while place is not begin:
        assert getattr(place, back) is before
        found.append(place)
        before, place = place, getattr(place, link)
    assert getattr(begin, back) is before
    return found
