"""How the servers behind a forwarded port are asked whether they are alive, as people write it.

check = "tcp"                                               # a connection can be made
check = "http"                                              # and / answers with 2xx or 3xx
check = { kind = "http", path = "/health", interval = 5 }   # and what is to be otherwise
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from nfmasq.config.values import Wrong, must_be, one_of, seconds, whole_number

KINDS = ("tcp", "http")


@dataclass(frozen=True)
class Check:
    """Holds a health check: one of KINDS, for "http" the path, and when; times in seconds.

    After `fall` failures in a row a server is taken out, after `rise` successes brought back.
    """

    kind: str
    path: str = "/"
    interval: float = 2
    timeout: float = 1
    rise: int = 2
    fall: int = 2

    def written(self) -> object:
        """Return it as it may stand in the file."""
        return self.kind if self == Check(self.kind) else asdict(self)


def check(value: object) -> Check:
    """Return the health check that a kind, or a table with the kind and more, asks for.

    Raises Wrong.
    """
    if not isinstance(value, Mapping):
        return Check(one_of(KINDS, value))
    for key in value:
        if key not in _KEYS:
            raise Wrong(f"is unknown; known are {', '.join(_KEYS)}", key)
    if "kind" not in value:
        raise Wrong(f"must have a kind, one of {', '.join(KINDS)}")
    return Check(**{key: _KEYS[key](written, key) for key, written in value.items()})


def _path(value: object, key: str) -> str:
    if not isinstance(value, str) or not re.fullmatch("/[!-~]*", value):
        raise must_be("a path, which begins with / and has no spaces", value, key)
    return value


_KEYS: dict[str, Callable[[object, str], Any]] = {
    "kind": partial(one_of, KINDS),
    "path": _path,
    "interval": partial(seconds, 0.1, 3600),
    "timeout": partial(seconds, 0.1, 3600),
    "rise": partial(whole_number, 1, 100),
    "fall": partial(whole_number, 1, 100),
}
