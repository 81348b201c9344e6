"""Health checks: whether the servers of forwarded ports answer, asked from the gateway itself.

Theory of operation. Each server has a task of its own in one event loop, in one thread: slow or
silent servers, however many, do not delay the checks of the others. A task asks its server at the
check's interval. A server whose answer is unexpected (it fails though the server was alive, or
succeeds though it was dead) is in doubt. A server in doubt is asked `DOUBTFUL` times as often: so
what happened is known when little more than one interval has passed, and not after `fall` or `rise`
intervals. After `fall` or `rise` unexpected answers in a row the server is taken out or brought
back (`Server.alive`); an expected answer ends the doubt.

A server that is taken out gets no new sessions; which of its sessions go to another server, and
when, is in `engine/forward/forward.py`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import Mapping
from random import uniform
from typing import NamedTuple

from nfmasq.config.health import HealthSettings
from nfmasq.engine.forward.server import Server

log = logging.getLogger(__name__)

DOUBTFUL = 10
"""How many times as often a server in doubt is asked."""

_LONGEST_STATUS = 1024  # bytes
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})\b[^\n]*\n")


class HealthCheck(NamedTuple):
    """Says how a server is asked whether it is alive, and names its forward for the log."""

    how: HealthSettings
    forward: str


class HealthChecks:
    """Asks the servers that `follow` names whether they are alive, from construction to `stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[tuple[Server, HealthCheck], asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._run, name="health-checks", daemon=True)
        self._thread.start()

    def follow(self, servers: Mapping[Server, HealthCheck]) -> None:
        """Ask these servers from now on, no others; a server that is not asked counts as alive."""
        asyncio.run_coroutine_threadsafe(self._follow(servers), self._loop).result()

    def stop(self) -> None:
        """Stop asking servers, and end the thread."""
        self.follow({})
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _follow(self, servers: Mapping[Server, HealthCheck]) -> None:
        wanted = dict(servers).items()
        gone = self._tasks.keys() - wanted
        await _end({self._tasks.pop(key) for key in gone})
        for server in {server for server, _ in gone} - servers.keys():
            server.alive = True
        for server, check in wanted - self._tasks.keys():
            self._tasks[server, check] = self._loop.create_task(_watch(server, check))


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    # Cancelled again and again: before Python 3.12 wait_for sometimes swallows a cancellation.
    while tasks:
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=0.01)


async def _watch(server: Server, health_check: HealthCheck) -> None:
    """Ask a server whether it is alive, until the task is cancelled."""
    check, forward = health_check
    # Servers whose checks begin at the same moment are not asked at the same moment.
    await asyncio.sleep(uniform(0, min(1, check.interval)))
    unexpected = 0
    while True:
        fault = await _fault(server, check)
        unexpected = unexpected + 1 if (fault is None) != server.alive else 0
        if unexpected >= (check.fall if server.alive else check.rise):
            unexpected = 0
            server.alive = fault is None
            if fault is None:
                log.info("%s: %s is back", forward, server)
            else:
                log.warning("%s: %s is taken out: %s", forward, server, fault)
        await asyncio.sleep(check.interval / DOUBTFUL if unexpected else check.interval)


async def _fault(server: Server, check: HealthSettings) -> str | None:
    """Find what is wrong with a server; None where nothing is."""
    try:
        return await asyncio.wait_for(_asked(server, check), check.timeout)
    except asyncio.TimeoutError:
        return f"no answer in {check.timeout:g} s"
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else str(error)
    except Exception as error:
        log.debug("a health check failed", exc_info=True)
        return repr(error)


async def _asked(server: Server, check: HealthSettings) -> str | None:
    host, _, port = str(server).partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=_LONGEST_STATUS)
    try:
        if check.kind == "tcp":
            return None
        writer.write(
            f"GET {check.path} HTTP/1.1\r\nHost: {server}\r\n"
            "User-Agent: nfmasq\r\nConnection: close\r\n\r\n".encode()
        )
        try:
            line = await reader.readuntil(b"\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            line = b""
    finally:
        writer.transport.abort()
    status = _STATUS.match(line)
    if status is None:
        return "no answer of HTTP"
    return None if status[1][:1] in b"23" else f"HTTP status {status[1].decode()}"
