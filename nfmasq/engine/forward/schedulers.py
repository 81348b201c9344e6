"""Which of several servers gets the next connection: the schedulers, by their names in the field.

A scheduler is made for one forwarded port and asked with the servers that may be chosen (alive,
and of a weight above 0; at least one) and the client's address. Those that remember something
remember it by server, so that servers may come, go and change their weights at any time.

    rr   round-robin             one after the other
    wrr  weighted round-robin    in the proportion of the weights, evenly mixed
    lc   least-connection        the one with the least load
    wlc  weighted the same       the one with the least load for its weight
    sh   source-hash             for one client always the same, in the proportion of the weights
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from math import log
from typing import TypeAlias

from nfmasq.engine.forward.server import Server

_INACTIVE_FOR_ONE_ACTIVE = 256
"""A connection that is opening or closing costs a server next to nothing."""


Scheduler: TypeAlias = "Callable[[Sequence[Server], int], Server]"
"""(servers, client's address) to the server."""


def round_robin() -> Scheduler:
    """`rr`"""
    turn = 0

    def choose(servers: Sequence[Server], _client: int) -> Server:
        nonlocal turn
        turn = (turn + 1) % len(servers)
        return servers[turn - 1]

    return choose


def weighted_round_robin() -> Scheduler:
    """`wrr`: each server earns its weight at every choice, and the richest pays for all."""
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
    """`lc`"""
    return lambda servers, _client: min(servers, key=_load)


def weighted_least_connection() -> Scheduler:
    """`wlc`; of idle ones the one with the most weight."""

    def load_for_weight(server: Server) -> tuple[float, int]:
        return _load(server) / server.weight, -server.weight

    return lambda servers, _client: min(servers, key=load_for_weight)


def source_hash() -> Scheduler:
    """`sh`, by rendezvous hashing: a server that goes moves nobody's clients but its own."""
    return lambda servers, client: max(servers, key=lambda server: _attraction(server, client))


def _load(server: Server) -> int:
    return server.active * _INACTIVE_FOR_ONE_ACTIVE + server.inactive


def _attraction(server: Server, client: int) -> float:
    """A number for this pair; the highest of a client's is this server's as often as weights say.

    That holds for -weight / log(u), with u even in 0 to 1.
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
