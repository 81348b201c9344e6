"""The control protocol: requests of any kind to a server, and answers of any kind to a client.

The first byte of a program picks who is spoken to. A server has a small table behind it, and gets
some requests, one after the other, each on a connection of its own: JSON made of what the protocol
knows and of what it does not, or bytes as they are. A client gets all bytes of the program as its
answer.

A request is answered in lines of JSON, of which the last is an end or an error, and it changes
no entry that it does not name. An answer is read to its end, or is an NfmasqError.
"""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nfmasq.config.forwards import HIGHEST_WEIGHT
from nfmasq.daemon import control
from nfmasq.daemon.control import ControlServer, describe, request
from nfmasq.engine import TCP, UDP, IpMasq, Masquerade
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.entry import NO_REPLY
from nfmasq.errors import NfmasqError
from tests.fuzz.steering import Steering, nothing_left_to_chance
from tests.gateway import told
from tests.packets import number

MOST_REQUESTS = 12

MADDR, HOSTS, OUTSIDER = "203.0.113.1", ("10.0.0.2", "10.0.0.3"), "198.51.100.7"
FORWARDED = "tcp:8080", "tcp:203.0.113.1:8081"

NAMES = ("list", "delete", "flush", "stats", "configuration", "reload", "servers", "weight",
         "LIST", "", None, 1, ["list"], {"list": 1})  # fmt: skip
CRITERIA = "protocol", "saddr", "sport", "maddr", "mport", "daddr", "dport"
KEYS = (*CRITERIA, "forward", "server", "weight", "request", "self", "reason", "")
VALUES: tuple[object, ...] = (
    "tcp", "udp", 6, "6", 17, "gre", "", *HOSTS, MADDR, OUTSIDER, "10.0.0.2/24", "010.0.0.2",
    "10.0.0.999", "::1", 80, 443, 5000, 61000, 61001, 0, -1, 65536, 2**70, 1.5, 5000.0, True, None,
    float("inf"), [], {}, ["tcp"], "\ud800", "é", *FORWARDED, "10.0.0.2:80", "10.0.0.3:80", 3,
)  # fmt: skip
USUAL: dict[str, tuple[object, ...]] = {
    "protocol": ("tcp", "udp", "6"),
    "saddr": HOSTS,
    "sport": (5000, 5001),
    "maddr": (MADDR,),
    "mport": (61000, 61001),
    "daddr": (OUTSIDER,),
    "dport": (80, 443),
    "forward": FORWARDED,
    "server": ("10.0.0.2:80", "10.0.0.3:80"),
    "weight": (0, 1, 3, HIGHEST_WEIGHT),
}


def run(program: bytes) -> None:
    """Have a server or a client take what a program says. Raises on a finding."""
    if program[:1] <= b"\x3f":
        read_answer(program[1:])
        return
    with nothing_left_to_chance():
        masquerade = _masquerade()
    with tempfile.TemporaryDirectory() as folder:
        server = _server(Path(folder, "control"), masquerade)
        try:
            for line in steps_of(program):
                _ask(server, masquerade, line)
        finally:
            server.close()


def steps_of(program: bytes) -> list[bytes]:
    """Return the requests that a program makes, or the answer that a client gets."""
    if program[:1] <= b"\x3f":
        return [program[1:]]
    steering = Steering(program[1:])
    lines: list[bytes] = []
    while not steering.is_over and len(lines) < MOST_REQUESTS:
        lines.append(_line(steering))
    return lines


def _line(steering: Steering) -> bytes:
    """Draw what a client sends: a request, changed or not, or bytes as they are."""
    how = steering.choice(("request",) * 6 + ("raw", "cut", "twice", "nested"))
    if how == "raw":
        end = b"\n" if steering.choice((True, False)) else b""
        return steering.taken(steering.choice((8, 64, 512))) + end
    if how == "nested":
        depth = steering.choice((1, 900, 1500)) + steering.randrange(200)
        name = str(steering.choice(NAMES)).encode()
        nested = b"[" * depth + b"]" * depth
        return b'{"request": "%s", "saddr": %s}\n' % (name, nested)
    arguments = {}
    for _ in range(steering.choice((0, 1, 1, 2, 3))):
        key = steering.choice(KEYS)
        values = USUAL.get(key, VALUES) if steering.random() < 0.7 else VALUES
        arguments[key] = steering.choice(values)
    line = json.dumps({"request": steering.choice(NAMES), **arguments}).encode() + b"\n"
    if how == "cut":
        return line[: steering.randrange(len(line))]
    return line * 2 if how == "twice" else line


# -- a server ----------------------------------------------------------------------------


def _masquerade() -> Masquerade:
    servers = [Server(number(host), 80) for host in HOSTS]
    forwards = Forwards([
        Forward(TCP, range(8080, 8081), servers),
        Forward(TCP, range(8081, 8082), [Server(number(HOSTS[0]), 80)], number(MADDR)),
    ])  # fmt: skip
    masquerade = Masquerade(*told(forwards=forwards))
    masquerade.sessions.now = 1000.0
    for protocol in (TCP, UDP):
        for host in HOSTS:
            for sport in (5000, 5001):
                for dport in (80, 443):
                    ends = number(host), sport, number(OUTSIDER), dport
                    sessions = masquerade.sessions
                    ms = sessions.ip_masq_new(protocol, number(MADDR), 0, *ends, NO_REPLY)
                    assert ms is not None
                    sessions.ip_masq_put(ms)
    return masquerade


def _server(path: Path, masquerade: Masquerade) -> ControlServer:
    def reload() -> list[str]:
        raise NfmasqError("nfmasq.toml:3: not what it was")

    return ControlServer(
        path,
        masquerade,
        configuration=lambda: {"queue": 7},
        figures=lambda: [("nfmasq_entries", {"protocol": "tcp"}, 2.0)],
        reload=reload,
        clock=lambda: 1010.0,
    )


def _ask(server: ControlServer, masquerade: Masquerade, line: bytes) -> None:
    """Send a line, and hold the answer against what it should be."""
    before = masquerade.sessions.entries()
    items, error = _answer(server, line)
    after = masquerade.sessions.entries()
    asked = _understood(line)
    gone = [ms for ms in before if ms not in after]
    if error is None and asked.get("request") in ("delete", "flush"):
        assert items == [len(gone)]
    else:
        assert not gone, "an entry ends by a request that ends none"
    if error is None and asked.get("request") in ("list", "delete"):
        meets = _meeting(asked)
        listed = [describe(masquerade.sessions, ms, 1010.0) for ms in before if meets(ms)]
        if asked["request"] == "list":
            assert sorted(map(str, items)) == sorted(map(str, listed))
        else:
            assert gone == [ms for ms in before if meets(ms)]
    for forward in masquerade.sessions.forwards.all:
        assert all(
            type(s.weight) is int and 0 <= s.weight <= HIGHEST_WEIGHT for s in forward.servers
        )


def _answer(server: ControlServer, line: bytes) -> tuple[list[Any], str | None]:
    """Have a server answer a line; returns the items, and the error or None."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        for each in (mine, theirs):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        mine.sendall(line)
        mine.shutdown(socket.SHUT_WR)
        server.finish_request(theirs, "")
        theirs.shutdown(socket.SHUT_WR)
        mine.settimeout(10)
        with mine.makefile("rb") as reply:
            lines = [json.loads(each) for each in reply]
    *items, last = [each for each in lines if each != {"busy": True}]
    assert all(each.keys() == {"item"} for each in items)
    assert last == {"end": True} or (last.keys() == {"error"} and type(last["error"]) is str)
    return [each["item"] for each in items], last.get("error")


def _understood(line: bytes) -> dict[str, Any]:
    """Return the request in a line, of which a server reads the first alone; {} where none is."""
    with suppress(ValueError, RecursionError):
        asked = json.loads(line.partition(b"\n")[0])
        if isinstance(asked, dict):
            return asked
    return {}


def _meeting(asked: dict[str, Any]) -> Callable[[IpMasq], bool]:
    """Return what tells the entries that meet the criteria of a request that was answered."""
    protocols = {"tcp": TCP, "6": TCP, "udp": UDP, "17": UDP}
    wanted = {}
    for key in CRITERIA:
        if key in asked:
            value = asked[key]
            wanted[key] = number(value) if key.endswith("addr") else protocols.get(value, value)
    return lambda ms: all(getattr(ms, key) == value for key, value in wanted.items())


# -- a client ----------------------------------------------------------------------------


def read_answer(answer: bytes) -> None:
    """Have a client read an answer to its end. Raises what a client should not."""
    mine, theirs = socket.socketpair()
    with theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        with patch.object(control, "_connected", lambda _: mine), suppress(NfmasqError):
            for _ in request(Path("control"), "list"):
                pass
            ends = [line for line in answer.split(b"\n") if "end" in _understood(line)]
            assert ends, "an answer without an end is taken for a whole answer"
