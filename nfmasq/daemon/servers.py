"""The servers of forwarded ports as people see them: named, in a state, with a weight to set."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from nfmasq.config.forwards import HIGHEST_WEIGHT
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.errors import NfmasqError

log = logging.getLogger(__name__)


def state(server: Server) -> str:
    """Say whether a server is given new sessions ("up"), or why not ("down" or "drained")."""
    if not server.alive:
        return "down"
    return "up" if server.weight else "drained"


def describe(forward: Forward, server: Server) -> dict[str, Any]:
    """Return a server as plain data, the object of `nfmasq servers --json`.

    `active` and `inactive` count the sessions that the server has, `total` all that it was given.
    """
    return {
        "forward": str(forward),
        "server": str(server),
        "state": state(server),
        "weight": server.weight,
        "active": server.active,
        "inactive": server.inactive,
        "total": server.total,
    }


def find(
    forwards: Forwards, forward: str | None = None, server: str | None = None
) -> Iterator[tuple[Forward, Server]]:
    """Yield each server with its forward: all servers, or the servers of these names.

    Raises NfmasqError where no forward, or no server of the forward, has the name.
    """
    named = [known for known in forwards.all if forward in (None, str(known))]
    if forward is not None and not named:
        raise NfmasqError(f"nothing is forwarded as {forward}; there is {_listed(forwards.all)}")
    if server is not None and not any(server == str(s) for known in named for s in known.servers):
        of = [s for known in named for s in known.servers]
        raise NfmasqError(f"there is no server {server}; there is {_listed(of)}")
    for known in named:
        for one in known.servers:
            if server in (None, str(one)):
                yield known, one


def set_weight(forwards: Forwards, forward: str, server: str, weight: object) -> dict[str, Any]:
    """Give a server another weight, 0 to drain it; returns the server as `describe` does.

    Raises NfmasqError where no server has these names, and where `weight` is not a whole number
    from 0 to HIGHEST_WEIGHT.
    """
    if type(weight) is not int or not 0 <= weight <= HIGHEST_WEIGHT:
        raise NfmasqError(f"a weight is a whole number from 0 to {HIGHEST_WEIGHT}")
    ((known, one),) = find(forwards, forward, server)
    log.info("%s: %s has weight %d instead of %d", known, one, weight, one.weight)
    one.weight = weight
    return describe(known, one)


def _listed(names: Iterator[object] | Any) -> str:
    return ", ".join(map(str, names)) or "none"
