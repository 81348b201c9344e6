"""Connections of clients to the control socket and to the metrics: bounded, whatever clients do.

Theory of operation. A thread accepts connections, and each connection has a thread of its own. Any
local user may connect to the metrics, and may say nothing, or little, slowly. So there are `MOST`
connections at a time, and each has `HEARD_WITHIN` seconds for its whole request. A client that
comes when there are `MOST` takes the place of the client that has been silent for longest: who asks
at once, is answered. When clients come faster than `PER_SECOND`, they wait in the kernel.

Where a connection cannot be accepted, since there are no file descriptors left, it would wait, and
have the thread try again without end. So each server holds a descriptor in reserve, with which it
accepts the connection and closes it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from socket import SHUT_RDWR, socket
from socketserver import BaseServer, ThreadingMixIn
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from nfmasq.engine.table.limits import TokenBucket

MOST = 32
"""Connections at a time, of one server."""

HEARD_WITHIN = 5.0
"""Seconds that a client has for its whole request."""

PER_SECOND = 100
"""Connections that are accepted in a second, in the long run and at once."""

LOOK_SECONDS = 0.1
"""Seconds between two looks at the connections, and the longest that a server takes to stop."""

_NO_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_REST = 0.1

if TYPE_CHECKING:
    _Server = BaseServer
else:
    _Server = object

Connection = socket


class BoundedServer(ThreadingMixIn, _Server):
    """A server of `socketserver` whose clients cannot take more than their share.

    Its request handlers call `heard` when they have read a request.
    """

    daemon_threads = True
    request_queue_size = 128

    socket: socket

    def __init__(self, *arguments: Any) -> None:
        self._silent: dict[Connection, float] = {}  # until when the request must have come
        self._answered: set[Connection] = set()
        self._pace = TokenBucket(PER_SECOND, PER_SECOND)
        self._reserve: int | None = _descriptor()
        try:
            super().__init__(*arguments)
        except BaseException:
            self._give_reserve_back()
            raise

    def server_close(self) -> None:
        """Close the listening socket, and give the descriptor in reserve back."""
        super().server_close()
        self._give_reserve_back()

    def heard(self, connection: Connection) -> None:
        """Note that the request of a connection has come: no other connection takes its place."""
        if self._silent.pop(connection, None) is not None:
            self._answered.add(connection)

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._silent) + len(self._answered)

    # -- called by socketserver ---------------------------------------------------------------

    def get_request(self) -> tuple[Connection, Any]:
        """Accept a connection. Raises OSError where that cannot be, after a rest."""
        while not self._pace.take(monotonic()):
            sleep(1 / PER_SECOND)
        try:
            return self.socket.accept()
        except OSError as error:
            if error.errno in _NO_MEANS:
                self._refuse_one()
                sleep(_REST)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Say whether there is room for a connection; a silent connection makes room."""
        if self.connections >= MOST and self._silent:
            self._hang_up(next(iter(self._silent)))
        return self.connections < MOST

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread answer a connection."""
        self._silent[request] = monotonic() + HEARD_WITHIN
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, which was answered, or refused."""
        self._silent.pop(request, None)
        self._answered.discard(request)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Hang up on whoever has been silent for too long."""
        now = monotonic()
        for connection, until in list(self._silent.items()):
            if until > now:
                return
            self._hang_up(connection)

    def _hang_up(self, connection: Connection) -> None:
        """End a connection; its thread closes it."""
        if self._silent.pop(connection, None) is not None:
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)

    def _refuse_one(self) -> None:
        """Accept a connection with the descriptor in reserve, and close it."""
        self._give_reserve_back()
        with suppress(OSError):
            self.socket.accept()[0].close()
        with suppress(OSError):
            self._reserve = _descriptor()

    def _give_reserve_back(self) -> None:
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None


def _descriptor() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
