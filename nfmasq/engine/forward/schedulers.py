"""Schedulers, under their usual names: which of several servers gets the next session.

A scheduler is made for one forward. It is called with the servers that may be chosen (alive, and of
a weight above 0; at least one server) and the client's address. Servers may come, go and change
their weights at any time, so what a scheduler remembers of a server is kept by server.

    rr   round-robin                one server after the other
    wrr  weighted round-robin       in the proportion of the weights, evenly mixed
    lc   least-connection           the server with the least load
    wlc  weighted least-connection  the server with the least load for its weight
    sh   source-hash                for a client always the same server, in the proportion of the
                                    weights
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from math import log
from typing import TypeAlias

from nfmasq.engine.forward.server import Server

_INACTIVE_FOR_ONE_ACTIVE = 256
"""A session that is opening or closing costs a server next to nothing."""


Scheduler: TypeAlias = "Callable[[Sequence[Server], int], Server]"
"""From (servers, client's address in host order) to the chosen server."""


def round_robin() -> Scheduler:
    """Make a scheduler `rr`."""
    turn = 0

    def choose(servers: Sequence[Server], _client: int) -> Server:
        nonlocal turn
        turn = (turn + 1) % len(servers)
        return servers[turn - 1]

    return choose


def weighted_round_robin() -> Scheduler:
    """Make a scheduler `wrr`.

    At every choice each server earns its weight; the richest server is chosen, and pays for all.
    """
    credit: dict[Server, int] = {}

    def choose(servers: Sequence[Server], _client: int) -> Server:
        for gone in credit.keys() - set(servers):
            del credit[gone]
        for server in servers:
            credit[server] = credit.get(server, 0) + server.weight
        richest = max(servers, key=credit.__getitem__)
        credit[richest] -= sum(server.weight for server in servers)
        return richest

    return choose


def least_connection() -> Scheduler:
    """Make a scheduler `lc`."""
    return lambda servers, _client: min(servers, key=_load)


def weighted_least_connection() -> Scheduler:
    """Make a scheduler `wlc`; of idle servers it chooses the server with the most weight."""

    def load_for_weight(server: Server) -> tuple[float, int]:
        return _load(server) / server.weight, -server.weight

    return lambda servers, _client: min(servers, key=load_for_weight)


def source_hash() -> Scheduler:
    """Make a scheduler `sh`, by rendezvous hashing: only the clients of a server that goes move."""
    return lambda servers, client: max(servers, key=lambda server: _attraction(server, client))


def _load(server: Server) -> int:
    return server.active * _INACTIVE_FOR_ONE_ACTIVE + server.inactive


def _attraction(server: Server, client: int) -> float:
    """Return a number for a server and a client: the server with the highest number is chosen.

    A server has the highest number as often as its weight says. This holds for -weight / log(u),
    with u evenly distributed from 0 to 1.
    """
    pair = b"%d %d %d" % (server.address, server.port, client)
    drawn = int.from_bytes(blake2b(pair, digest_size=7).digest(), "big")
    return -server.weight / log((drawn + 1) / (2**56 + 1))


SCHEDULERS: dict[str, Callable[[], Scheduler]] = {
    "rr": round_robin,
    "wrr": weighted_round_robin,
    "lc": least_connection,
    "wlc": weighted_least_connection,
    "sh": source_hash,
}
"""The schedulers by name."""

DEFAULT_SCHEDULER = "wrr"
"""The scheduler of a forward that names none."""
