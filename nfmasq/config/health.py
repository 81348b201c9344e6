"""Health checks of the servers behind a forward, as people write them.

check = "tcp"                                               # a connection can be made
check = "http"                                              # and / answers with 2xx or 3xx
check = { kind = "http", path = "/health", interval = 5 }   # with other values than the defaults
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from nfmasq.config.values import Wrong, must_be, one_of, reader_of
from nfmasq.engine.option import number_field, seconds_field

KINDS = ("tcp", "http")


@dataclass(frozen=True)
class HealthSettings:
    """A health check: one of KINDS, the path for "http", and when servers are asked.

    `interval` and `timeout` are seconds. After `fall` failures in a row a server is taken out,
    after `rise` successes brought back.
    """

    kind: str
    path: str = "/"
    interval: float = seconds_field(2, low=0.1, high=3600)
    timeout: float = seconds_field(1, low=0.1, high=3600)
    rise: int = number_field(2, low=1, high=100)
    fall: int = number_field(2, low=1, high=100)

    def written(self) -> object:
        """Return the health check as in the file: only its kind where the rest is the default."""
        return self.kind if self == HealthSettings(self.kind) else asdict(self)


def check(value: object) -> HealthSettings:
    """Read a health check from a kind, or a table with the kind and more. Raises Wrong."""
    if not isinstance(value, Mapping):
        return HealthSettings(one_of(KINDS, value))
    for key in value:
        if key not in _KEYS:
            raise Wrong(f"is unknown; known are {', '.join(_KEYS)}", key)
    if "kind" not in value:
        raise Wrong(f"must have a kind, one of {', '.join(KINDS)}")
    return HealthSettings(**{key: _KEYS[key](written, key) for key, written in value.items()})


def _path(value: object, key: str) -> str:
    if not isinstance(value, str) or not re.fullmatch("/[!-~]*", value):
        raise must_be("a path, which begins with / and has no spaces", value, key)
    return value


_KEYS: dict[str, Callable[[object, str], Any]] = {
    "kind": partial(one_of, KINDS),
    "path": _path,
    **{each.name: reader_of(each) for each in fields(HealthSettings) if each.metadata},
}
