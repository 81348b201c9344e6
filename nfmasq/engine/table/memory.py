"""Memory given back after a flood.

A dictionary that has grown does not shrink when its keys go, but only when further keys have filled
it up once more. After a flood this may be never. So a dictionary that has become sparse is made
anew, with the memory that its keys need. This takes time for each key that is left, which is a
small part of the time that it took to make and delete all the keys that have gone.
"""

from __future__ import annotations

from sys import getsizeof
from typing import Any

_DENSE = 128
"""Bytes that a key takes, at most, in a dictionary that has just grown."""

_SPARSE = 16
"""How many times the memory of a dense dictionary makes a dictionary sparse. The more times, the
more keys have gone for each key that is left."""

_FEW = 8


def is_sparse(keys: dict[Any, Any]) -> bool:
    """Say whether a dictionary has far more memory than its keys need."""
    return getsizeof(keys) > _SPARSE * _DENSE * (len(keys) + _FEW)


def compact(keys: dict[Any, Any]) -> None:
    """Give the memory of a sparse dictionary back; the dictionary remains the same object.

    For a moment it is empty, so whoever reads it without the lock may miss a key.
    """
    if is_sparse(keys):
        kept = keys.copy()
        keys.clear()
        keys.update(kept)
