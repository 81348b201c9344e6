"""A crowd of hosts and the servers that they visit, as a program of its own (`test_busy_network`).

    crowd.py serve ADDRESS                              echo on 100 ports, until it is ended
    crowd.py visit ADDRESS HOSTS OPEN RATE SECONDS      what the crowd does; tells what came of it,
                                                        and ends with its input

Each host has an address of its own, 10.78.0.0/16, on the machine that this runs on.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from asyncio import StreamReader, StreamWriter
from collections import Counter

FIRST_PORT, SERVERS = 8000, 100
AT_ONCE = 50
PATIENCE = 20.0
ROUND = 10.0
"""Seconds between two words on each open connection."""

Connection = tuple[StreamReader, StreamWriter]


async def serve(address: str) -> None:
    async def echo(reader: StreamReader, writer: StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    for port in range(FIRST_PORT, FIRST_PORT + SERVERS):
        await asyncio.start_server(echo, address, port, backlog=512)
    print("ready", flush=True)
    await asyncio.Event().wait()


class Crowd:
    """The hosts; `failures` are the errors that their programs had, by name."""

    def __init__(self, server: str, hosts: int) -> None:
        self.failures: Counter[str] = Counter()
        self._server = server
        self._hosts = [f"10.78.{at // 250}.{at % 250 + 1}" for at in range(hosts)]
        self._at_once = asyncio.Semaphore(AT_ONCE)

    async def connect(self, number: int) -> Connection | None:
        """Open a connection of a host to a server, each by its number; None where it fails."""
        host = self._hosts[number % len(self._hosts)]
        port = FIRST_PORT + number // len(self._hosts) % SERVERS
        try:
            async with self._at_once:
                opening = asyncio.open_connection(self._server, port, local_addr=(host, 0))
                return await asyncio.wait_for(opening, PATIENCE)
        except (OSError, asyncio.TimeoutError) as error:
            self.failures[repr(error)] += 1
            return None

    async def says(self, connection: Connection) -> bool:
        """Say something on a connection; returns whether it comes back."""
        reader, writer = connection
        try:
            async with self._at_once:
                writer.write(b"still there?\n")
                line = await asyncio.wait_for(reader.readline(), PATIENCE)
        except (OSError, asyncio.TimeoutError) as error:
            self.failures[repr(error)] += 1
            return False
        self.failures["no answer"] += not line
        return bool(line)

    async def visit(self, number: int) -> bool:
        """Open a connection, say something, and close it."""
        connection = await self.connect(number)
        if connection is None or not await self.says(connection):
            return False
        connection[1].close()
        await connection[1].wait_closed()
        return True


async def visit(server: str, hosts: int, open_each: int, rate: int, seconds: float) -> None:
    crowd = Crowd(server, hosts)
    connecting = [crowd.connect(number) for number in range(hosts * open_each)]
    opened = [each for each in await asyncio.gather(*connecting) if each is not None]
    loop = asyncio.get_running_loop()
    began = spoke = loop.time()
    visits: list[asyncio.Task[bool]] = []
    talk: list[asyncio.Task[bool]] = []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(began + number / rate - loop.time())
        visits.append(asyncio.create_task(crowd.visit(number)))
        if loop.time() > spoke + ROUND:
            spoke = loop.time()
            talk += [asyncio.create_task(crowd.says(each)) for each in opened]
    visited = await asyncio.gather(*visits)
    await asyncio.gather(*talk)
    alive = await asyncio.gather(*map(crowd.says, opened))
    failures = {name: n for name, n in crowd.failures.items() if n}
    told = {"open": sum(alive), "opened": sum(visited), "failures": failures}
    print(json.dumps(told), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 1 << 16), most))
    verb, address, *numbers = sys.argv[1:]
    if verb == "serve":
        asyncio.run(serve(address))
    else:
        hosts, open_each, rate = map(int, numbers[:3])
        asyncio.run(visit(address, hosts, open_each, rate, float(numbers[3])))
