"""The control socket: how `nfmasq list`, `stats`, `flush` and `delete` reach a running nfmasq.

A Unix stream socket that only its owner may open. A client sends one line of JSON,
`{"request": NAME, ...}`, and reads lines of JSON: any number of `{"item": ...}`, then
`{"end": true}`, or `{"error": MESSAGE}`. A reply that has neither an end nor an error was cut off.

| request         | arguments    | items                                                   |
| --------------- | ------------ | ------------------------------------------------------- |
| `list`          | criteria     | each entry that meets them all, unsorted (`describe`)   |
| `delete`        | criteria, at least one | how many entries were removed                 |
| `flush`         |              | how many entries were removed                           |
| `stats`         |              | `[name, labels, value]` of each figure                  |
| `configuration` |              | the configuration, as it would stand in the file        |
| `reload`        |              | what changed, a line each (`reload.py`)                 |
| `servers`       | forward, server, both or neither | each server of these names (`servers.py`) |
| `weight`        | forward, server, weight | the server with its new weight               |

Criteria are any of protocol, saddr, sport, maddr, mport, daddr and dport; an entry must have all
these values. Protocols are given by name or number, addresses dotted.

Packets must not feel any of this. The engine's lock is held only to take the next few entries of a
walk through all, and to remove one entry at a time. What is read of an entry outside the lock may
be one packet old, which does not matter to a person. The thread that handles packets needs the
interpreter, too, so long walks pause every few entries. Nobody waits for a client: each client has
a thread of its own, and `PATIENCE` seconds to send or take something.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingUnixStreamServer
from typing import Any

from nfmasq.daemon import servers
from nfmasq.daemon.pace import paced
from nfmasq.engine import Flags, IpMasq, Masquerade
from nfmasq.engine.sessions import Sessions
from nfmasq.engine.table.endings import DELETED, FLUSHED
from nfmasq.engine.table.entry import CACHED
from nfmasq.engine.wire.address import dotted, from_dotted
from nfmasq.engine.wire.by_address import name_of, number_of
from nfmasq.errors import NfmasqError

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds
STOP_WITHIN = 0.1  # seconds
LONGEST_REQUEST = 4096  # bytes
WALK = 32  # entries between two pauses: a quarter of a millisecond of work
PAUSE = 0.0003  # seconds; packets keep most of their pace, and a million entries take 20 s

Figures = Iterable[tuple[str, Mapping[str, str], float]]


def describe(sessions: Sessions, ms: IpMasq, now: float) -> dict[str, Any]:
    """Return an entry as plain data, the object of `nfmasq list --json`.

    Addresses are dotted, `expires` is in seconds from `now` (in the clock of the packets), and
    `control` names the entry that controls this entry by its protocol and masquerade endpoint:
    "tcp 198.51.100.2:61001".
    """
    usage, timer = sessions.account_of(ms)
    control = ms.control
    # An entry without a timer is in use just now, and is about to have its whole timeout again.
    expires = ms.timeout if timer is None else max(0.0, timer - now)
    return {
        "protocol": name_of(ms.protocol),
        "saddr": dotted(ms.saddr),
        "sport": ms.sport,
        "maddr": dotted(ms.maddr),
        "mport": ms.mport,
        "daddr": dotted(ms.daddr),
        "dport": ms.dport,
        "state": ms.state_name,
        "expires": round(expires, 1),
        "refcnt": ms.refcnt,
        "flags": _flag_names(ms.flags),
        "packets_out": usage.packets_out,
        "packets_in": usage.packets_in,
        "bytes_out": usage.bytes_out,
        "bytes_in": usage.bytes_in,
        "app": None if ms.app is None else ms.app.name,
        "control": None if control is None else _masqueraded_as(control),
        "cached": ms.flags & CACHED > 0,
    }


def _masqueraded_as(ms: IpMasq) -> str:
    return f"{name_of(ms.protocol)} {dotted(ms.maddr)}:{ms.mport}"


@cache
def _flag_names(flags: int) -> list[str]:
    return [flag.name for flag in Flags if flags & flag and flag.name]


class ControlServer(ThreadingUnixStreamServer):
    """Answers requests about one masquerade, in threads, from `start` to `close`.

    `configuration`, `figures` and `reload` answer the requests `configuration`, `stats` and
    `reload`; `clock` is the clock of the packets. The socket is there, and the path taken, once
    the object is made.

    Raises NfmasqError where the path cannot be had, also where another nfmasq listens there.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(
        self,
        path: Path,
        masquerade: Masquerade,
        configuration: Callable[[], Mapping[str, object]],
        figures: Callable[[], Figures],
        reload: Callable[[], Iterable[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._masquerade = masquerade
        self._configuration = configuration
        self._figures = figures
        self._reload = reload
        self._clock = clock
        self._thread = threading.Thread(
            target=self.serve_forever, args=(STOP_WITHIN,), name="control", daemon=True
        )
        try:
            super().__init__(os.fspath(path), _ClientConnection)
        except OSError as error:
            reason = error.strerror or error
            raise NfmasqError(f"cannot make the control socket {path}: {reason}") from None

    def server_bind(self) -> None:
        """Take the path; nobody but its owner can open it, not even for a moment."""
        _clear(self._path)
        # A Unix socket hands its own mode on to the file that bind makes.
        os.fchmod(self.fileno(), 0o600)
        super().server_bind()
        self._file = _identity(self._path)

    def start(self) -> None:
        """Answer requests from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering; remove the socket file unless another file has taken its place."""
        if self._thread.is_alive():
            self.shutdown()
        if _identity(self._path) == self._file:
            self._path.unlink(missing_ok=True)
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Log what went wrong with one client; a client that hung up or hangs is no news."""
        log.debug("a control request failed", exc_info=True)

    def answer(self, request: dict[str, Any]) -> Iterable[object]:
        """Return the items (plain data) that answer a request; takes the keys out of `request`.

        Raises NfmasqError where the request cannot be answered.
        """
        name = request.pop("request", None)
        if request and name in ("flush", "stats", "configuration", "reload"):
            raise NfmasqError(f"{name} takes no arguments, not {json.dumps(request)}")
        forwards = self._masquerade.sessions.forwards
        match name:
            case "list":
                now = self._clock()
                sessions = self._masquerade.sessions
                return (describe(sessions, ms, now) for ms in self._matching(_criteria(request)))
            case "delete":
                criteria = _criteria(request)
                if not criteria:
                    raise NfmasqError("delete needs a criterion; flush removes all entries")
                return [self._remove(criteria, DELETED)]
            case "flush":
                return [self._remove({}, FLUSHED)]
            case "stats":
                return self._figures()
            case "configuration":
                return [self._configuration()]
            case "reload":
                return self._reload()
            case "servers":
                found = servers.find(forwards, **_names(request, ("forward", "server")))
                return [servers.describe(*each) for each in found]
            case "weight":
                weight = request.pop("weight", None)
                names = _names(request, ("forward", "server"), all_of_them=True)
                return [servers.set_weight(forwards, **names, weight=weight)]
            case other:
                raise NfmasqError(f"unknown request: {json.dumps(other)}")

    def _matching(self, criteria: dict[str, int]) -> Iterator[IpMasq]:
        wanted = list(criteria.items())
        for ms in paced(self._masquerade.sessions.walk(), WALK, PAUSE):
            if all(getattr(ms, name) == value for name, value in wanted):
                yield ms

    def _remove(self, criteria: dict[str, int], reason: str) -> int:
        remove = self._masquerade.sessions.remove
        return sum(remove(ms, reason) for ms in self._matching(criteria))


def _clear(path: Path) -> None:
    """Remove a socket file that nobody listens at any more.

    Raises NfmasqError where somebody listens, and where something else is at the path.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise NfmasqError(f"cannot make the control socket {path}: something else is there")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except (TimeoutError, BlockingIOError):
            pass  # somebody listens, and is busy
    raise NfmasqError(
        f"another nfmasq is listening at {path}; stop it, or give this one another --control"
    )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _ClientConnection(StreamRequestHandler):
    """Reads the request of a client, and sends the reply."""

    server: ControlServer
    timeout = PATIENCE
    wbufsize = 1 << 16

    def handle(self) -> None:
        try:
            for item in self.server.answer(_parsed(self.rfile.readline(LONGEST_REQUEST))):
                self._send({"item": item})
            self._send({"end": True})
        except NfmasqError as error:
            self._send({"error": str(error)})

    def _send(self, line: object) -> None:
        self.wfile.write(json.dumps(line).encode() + b"\n")


def _parsed(line: bytes) -> dict[str, Any]:
    request = _object(line) if line.endswith(b"\n") else None
    # What is nested may be too deep for json to write into an error.
    if request is None or any(isinstance(value, dict | list) for value in request.values()):
        raise NfmasqError(
            "a request is one line of JSON, an object with nothing nested in it, of less than"
            f" {LONGEST_REQUEST} bytes"
        )
    return request


def _object(line: bytes) -> dict[str, Any] | None:
    """Read a line of JSON; None where it is not an object."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None


def _names(
    arguments: Mapping[str, object], known: Sequence[str], all_of_them: bool = False
) -> dict[str, str]:
    """Return the arguments, which must be texts under known names. Raises NfmasqError."""
    names = {key: name for key, name in arguments.items() if isinstance(name, str)}
    missing = set(known) - names.keys() if all_of_them else set()
    if names.keys() != arguments.keys() or names.keys() - set(known) or missing:
        raise NfmasqError(f"the arguments are {', '.join(known)}, not {json.dumps(arguments)}")
    return names


def _criteria(arguments: Mapping[str, object]) -> dict[str, int]:
    """Read which attributes of an entry are asked for, with values as an entry holds them."""
    return {name: _criterion(name, value) for name, value in arguments.items()}


def _criterion(name: str, value: object) -> int:
    if name == "protocol" and isinstance(value, str):
        number = number_of(value)
        if number is not None:
            return number
    if name in ("saddr", "maddr", "daddr") and isinstance(value, str):
        address = from_dotted(value)
        if address is not None:
            return address
    if name in ("sport", "mport", "dport") and type(value) is int:
        return value
    raise NfmasqError(f"no entry can have this: {json.dumps({name: value})}")


def request(path: Path, name: str, **arguments: object) -> Iterator[Any]:
    """Ask the nfmasq at `path`, and yield the items of its reply as they come.

    Raises NfmasqError where no nfmasq is running there, where it does not answer, and where its
    reply is an error or is cut off.
    """
    with _connected(path) as connection:
        try:
            connection.sendall(json.dumps({"request": name, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                for line in map(_object, lines):
                    if line is None or "item" not in line:
                        break
                    yield line["item"]
                else:
                    raise NfmasqError(f"nfmasq at {path} stopped in the middle of its answer")
        except OSError as error:
            raise NfmasqError(f"nfmasq at {path} does not answer: {error}") from None
    if line and "error" in line:
        raise NfmasqError(line["error"])
    if not line or "end" not in line:
        raise NfmasqError(f"the answer from {path} is cut off, or not from nfmasq")


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    # The client is more patient than the server: the server gives up first, since it knows why.
    connection.settimeout(2 * PATIENCE)
    try:
        connection.connect(os.fspath(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        raise NfmasqError(
            f"no nfmasq is running at {path} (start it with: sudo nfmasq run)"
        ) from None
    except PermissionError:
        connection.close()
        raise NfmasqError(f"not permitted to talk to nfmasq at {path} (try with sudo)") from None
    except OSError as error:
        connection.close()
        raise NfmasqError(f"cannot talk to nfmasq at {path}: {error}") from None
    return connection
