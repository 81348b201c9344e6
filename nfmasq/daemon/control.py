"""The control socket: how `nfmasq list`, `stats`, `flush` and `delete` reach a running nfmasq.

A Unix stream socket that only its owner may open. A client sends one line of JSON,
`{"request": NAME, ...}`, and reads lines of JSON: any number of `{"item": ...}`, then
`{"end": true}`, or `{"error": MESSAGE}`. A reply that has neither an end nor an error was cut off.
While an item is longer in coming than `SIGN`, lines of `{"busy": true}` are signs of life.

| request         | arguments    | items                                                   |
| --------------- | ------------ | ------------------------------------------------------- |
| `list`          | criteria     | each entry that meets them all, unsorted (`describe`)   |
| `delete`        | criteria, at least one | how many entries were removed                 |
| `flush`         |              | how many entries were removed                           |
| `stats`         |              | `[name, labels, value]` of each figure                  |
| `busiest`       | seconds      | the busiest entries, again and again (`busiest.py`)     |
| `configuration` |              | the configuration, as it would stand in the file        |
| `reload`        |              | what changed, a line each (`reload.py`)                 |
| `servers`       | forward, server, both or neither | each server of these names (`servers.py`) |
| `weight`        | forward, server, weight | the server with its new weight               |

Criteria are any of protocol, saddr, sport, maddr, mport, daddr and dport; an entry must have all
these values. Protocols are given by name or number, addresses dotted.

Packets must not feel any of this. The engine's lock is held only to take the next few entries of a
walk, and to remove one entry at a time. What is read of an entry outside the lock may be one packet
old, which does not matter to a person. The thread that handles packets needs the interpreter, too,
so long walks pause after a quarter of a millisecond of work. Nobody waits for a client: each client
has a thread of its own, `HEARD_WITHIN` seconds to ask (`connections.py`), and `PATIENCE` seconds to
take each part of the answer.
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
from operator import attrgetter
from pathlib import Path
from socketserver import StreamRequestHandler, UnixStreamServer
from typing import Any

from nfmasq.daemon import servers
from nfmasq.daemon.busiest import SECONDS, busiest
from nfmasq.daemon.connections import LOOK_SECONDS, BoundedServer
from nfmasq.daemon.pace import paced
from nfmasq.engine import Flags, IpMasq, Masquerade
from nfmasq.engine.sessions import Sessions
from nfmasq.engine.table.endings import DELETED
from nfmasq.engine.table.entry import CACHED
from nfmasq.engine.wire.address import dotted, from_dotted
from nfmasq.engine.wire.by_address import name_of, number_of
from nfmasq.errors import NfmasqError

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds
SIGN = 1.0  # seconds
AT_ONCE = 0.05  # seconds without a line, after which the next line does not wait for others
LONGEST_REQUEST = 4096  # bytes
PART = 1 << 16  # bytes of an answer that are sent at once
LOOKS = 1024  # entries that are looked at between two pauses: a quarter of a millisecond of work
WALK = 32  # entries that are told, or ended, between two pauses: likewise
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


class ControlServer(BoundedServer, UnixStreamServer):
    """Answers requests about one masquerade, in threads, from `start` to `close`.

    `configuration`, `figures` and `reload` answer the requests `configuration`, `stats` and
    `reload`; `clock` is the clock of the packets. The socket is there, and the path taken, once
    the object is made.

    Raises NfmasqError where the path cannot be had, also where another nfmasq listens there.
    """

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
        self.replies: set[Reply] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self.serve_forever, args=(LOOK_SECONDS,), name="control", daemon=True
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
        self._closing.set()
        if self._thread.is_alive():
            self.shutdown()
        if _identity(self._path) == self._file:
            self._path.unlink(missing_ok=True)
        self.server_close()

    def service_actions(self) -> None:
        """Hang up on the silent, and give signs of life to those whose answer takes long."""
        super().service_actions()
        for reply in self.replies.copy():
            reply.give_sign()

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
                return [self._remove(criteria)]
            case "flush":
                return [self._flush()]
            case "stats":
                return self._figures()
            case "busiest":
                sessions, seconds = self._masquerade.sessions, _seconds(request)
                return busiest(sessions, describe, self._clock, seconds, self._closing.wait)
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
        sessions, saddr = self._masquerade.sessions, criteria.get("saddr")
        every = sessions.walk(LOOKS) if saddr is None else sessions.walk_host(saddr)
        entries = paced(every, LOOKS, PAUSE)
        if criteria:
            read, wanted = attrgetter(*criteria, "refcnt"), (*criteria.values(),)
            entries = (ms for ms in entries if read(ms)[:-1] == wanted)
        return paced(entries, WALK, PAUSE)

    def _remove(self, criteria: dict[str, int]) -> int:
        remove = self._masquerade.sessions.remove
        return sum(remove(ms, DELETED) for ms in self._matching(criteria))

    def _flush(self) -> int:
        """End all entries at one stroke, when the flow cache has given back the flows it carries.

        Until the stroke their packets come here, and go on as before.
        """
        sessions = self._masquerade.sessions
        sessions.cached.is_paused = True
        try:
            if sessions.cached.flows:
                entries = paced(sessions.walk(LOOKS), LOOKS, PAUSE)
                for ms in paced((ms for ms in entries if ms.flags & CACHED), WALK, PAUSE):
                    with sessions.lock:
                        sessions.cached.withdrawn(ms)
            return self._masquerade.flush()
        finally:
            sessions.cached.is_paused = False


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


class Reply:
    """The lines of a reply to one client; lines that come one right after the other go together.

    The thread that answers adds lines, and another thread gives signs of life.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines: list[bytes] = []
        self._bytes = 0
        self._sent = time.monotonic()
        self._added = 0.0
        self._sending = threading.Lock()

    def add(self, line: object) -> None:
        """Send a line (plain data), at once or together with others. Raises OSError."""
        encoded = json.dumps(line).encode() + b"\n"
        self._lines.append(encoded)
        self._bytes += len(encoded)
        before, self._added = self._added, time.monotonic()
        if (
            self._bytes >= PART
            or self._added - before > AT_ONCE
            or self._added - self._sent > SIGN / 2
        ):
            self.send()

    def send(self) -> None:
        """Send the lines that wait. Raises OSError."""
        with self._sending:
            self._connection.sendall(b"".join(self._lines))
            self._lines.clear()
            self._bytes = 0
            self._sent = time.monotonic()

    def give_sign(self) -> None:
        """Have the client know that the answer is on its way, if nothing was sent for `SIGN`."""
        if time.monotonic() - self._sent < SIGN or not self._sending.acquire(blocking=False):
            return
        try:
            self._connection.send(_BUSY, socket.MSG_DONTWAIT)
            self._sent = time.monotonic()
        except OSError:
            pass  # the client takes nothing, and the thread that answers finds out
        finally:
            self._sending.release()


_BUSY = b'{"busy": true}\n'


class _ClientConnection(StreamRequestHandler):
    """Reads the request of a client, and sends the reply."""

    server: ControlServer
    timeout = PATIENCE

    def handle(self) -> None:
        line = self.rfile.readline(LONGEST_REQUEST)
        self.server.heard(self.connection)
        reply = Reply(self.connection)
        self.server.replies.add(reply)
        try:
            for item in self.server.answer(_parsed(line)):
                reply.add({"item": item})
            reply.add({"end": True})
        except NfmasqError as error:
            reply.add({"error": str(error)})
        finally:
            self.server.replies.discard(reply)
        reply.send()


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


def _seconds(arguments: Mapping[str, object]) -> float:
    """Read for how many seconds to wait between two looks. Raises NfmasqError."""
    least, most = SECONDS
    match dict(arguments):
        case {"seconds": float() | int() as seconds, **others} if not others:
            if least <= seconds <= most:
                return float(seconds)
    raise NfmasqError(
        f"seconds is a number from {least:g} to {most:g}, not {json.dumps(dict(arguments))}"
    )


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
                    if line is not None and "item" in line:
                        yield line["item"]
                    elif line is None or "busy" not in line:
                        break
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
