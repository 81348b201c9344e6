"""Health checks: whether the servers of forwarded ports answer, asked from the gateway itself.

Theory of operation. Each server has a task of its own in one event loop, in one thread: however
many are slow or silent, none is asked any later for it. A task asks at the check's interval. An
answer that is not what was expected puts the server in doubt, and one in doubt is asked again
soon, `DOUBTFUL` times as often: so what happened is known when little more than an interval has
passed, and not after `fall` or `rise` of them. Enough such answers in a row, and the server is
taken out or brought back (`Server.alive`); one that is as expected ends the doubt.

A server that is taken out gets no new sessions, and keeps those it has.
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
"""A server in doubt is asked so many times as often."""

_LONGEST_STATUS = 1024  # bytes
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})\b[^\n]*\n")


class HealthCheck(NamedTuple):
    """Says how a server is asked whether it is alive, and names its forward for the log."""

    how: HealthSettings
    forward: str


class HealthChecks:
    """Asks servers whether they are alive, from making to `stop`; which servers, `follow` says."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[tuple[Server, HealthCheck], asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._run, name="health-checks", daemon=True)
        self._thread.start()

    def follow(self, servers: Mapping[Server, HealthCheck]) -> None:
        """Ask these from now on, and no others; a server that is not asked passes for alive."""
        asyncio.run_coroutine_threadsafe(self._follow(servers), self._loop).result()

    def stop(self) -> None:
        """Ask no more."""
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
    # Again and again, for before Python 3.12 wait_for swallows a cancellation now and then.
    while tasks:
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=0.01)


async def _watch(server: Server, health_check: HealthCheck) -> None:
    """Ask one server, until cancelled."""
    check, forward = health_check
    # Those that begin together are not asked together.
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
    """What is wrong with a server; None: nothing."""
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
