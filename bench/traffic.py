"""The programs that make traffic, each run on a host of the lab as a process of its own.

`python -m bench.traffic NAME ARGUMENT...` calls the function NAME with arguments in JSON, and
writes what it returns on stdout, in JSON.

The programs share the machine's processors with the handler that is measured: the time that they
take is missing there, and brings all results nearer together. So packets are sent and received many
at a system call (sendmmsg, recvmmsg), and the receiver sleeps in between.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import cycle
from types import FrameType
from typing import Any, NoReturn

from nfmasq.daemon.receive import messages_at

BATCH = 64
"""Packets for each system call."""

DRAIN_SECONDS = 0.005
"""How long the receiver sleeps; its socket holds what comes meanwhile."""

RECEIVE_BUFFER = 64 * 1024 * 1024
SO_RCVBUFFORCE = 33  # socket(7); Python has no name for it

BACKLOG = 1 << 20
"""Connections that a listener which accepts none can have: many times what a measurement makes.

Once it is full, the kernel drops the segments that would complete further ones, and the clients
wait.
"""

SCATTERED = 0xC6120000
"""198.18.0.0, the first of the addresses that `scatter` and `spread` send to."""

ADDRESSES = 1 << 17
"""How many addresses there are from `SCATTERED` on (198.18.0.0/15, RFC 2544)."""

FIRST_PORT = 20000
"""The source port of the first `ADDRESSES` flows of `spread`; the next have the next port."""

ANSWER_SECONDS = 2
"""Seconds to wait for the answer to a datagram."""

TCP_DEFER_ACCEPT = 9  # tcp(7); mypy knows it on Linux only
REQUEST = b"GET / HTTP/1.0\r\n\r\n"
RESPONSE = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nyes"

_libc = ctypes.CDLL(None)
_buffer = ctypes.create_string_buffer(65536)


def _messages(size: int) -> Any:
    """Return a batch of messages of `size` bytes, all in the same place."""
    return messages_at(ctypes.addressof(_buffer), size, BATCH)


def flood(address: str, port: int, size: int, seconds: float) -> int:
    """Send datagrams of `size` bytes as fast as the machine does; returns how many were sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((address, port))
        sendmmsg, descriptor, messages = _libc.sendmmsg, sock.fileno(), _messages(size)
        sent = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sent += max(0, sendmmsg(descriptor, messages, BATCH, 0))
    return sent


def spread(port: int, size: int, flows: int, seconds: float) -> int:
    """Send datagrams of `size` bytes as fast as the machine does, spread over `flows` flows.

    Flow number n goes to the address `SCATTERED` + n % `ADDRESSES`, from the source port
    `FIRST_PORT` + n // `ADDRESSES`. The flows follow one another in a random order, so that nothing
    that is kept of them lies in memory as it is asked for. It lasts for `seconds`, and until each
    flow has had a datagram. Returns how many were sent.
    """
    addresses = ctypes.create_string_buffer(16 * BATCH)
    messages = _messages(size)
    for place, message in enumerate(messages):
        message.header.name = ctypes.addressof(addresses) + 16 * place
        message.header.name_length = 16
    with ExitStack() as stack:
        batches = []
        for first in range(0, flows, ADDRESSES):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind(("", FIRST_PORT + first // ADDRESSES))
            some = _destinations(port, min(ADDRESSES, flows - first))
            batches += [(sock.fileno(), batch) for batch in some]
        random.shuffle(batches)
        sendmmsg, sent, end = _libc.sendmmsg, 0, time.monotonic() + seconds
        for number, (descriptor, batch) in enumerate(cycle(batches)):
            if number >= len(batches) and time.monotonic() >= end:
                break
            ctypes.memmove(addresses, batch, len(batch))
            sent += max(0, sendmmsg(descriptor, messages, len(batch) // 16, 0))
    return sent


def _destinations(port: int, flows: int) -> Iterator[bytes]:
    """Yield the destinations of flows from one port in a random order, by the batch.

    Each is a struct sockaddr_in, see ip(7). Few flows fill a batch with several turns.
    """
    numbers = random.sample(range(flows), flows) * max(1, BATCH // flows)
    for at in range(0, len(numbers), BATCH):
        yield b"".join(
            struct.pack("=H", socket.AF_INET) + struct.pack("!HI8x", port, SCATTERED + number)
            for number in numbers[at : at + BATCH]
        )


def count(port: int, size: int, warm_up: float, seconds: float) -> float:
    """Return the datagrams of `size` bytes that arrive a second.

    They count from `warm_up` seconds after the first, which is answered: a flow that nobody answers
    is none that a masquerade has to keep. Raises TimeoutError where none arrives.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        sock.bind(("", port))
        sock.settimeout(5)
        _, sender = sock.recvfrom(1)
        sock.sendto(b"answer", sender)
        messages = _messages(size)
        sock.setblocking(False)
        _drain(sock, messages, warm_up)
        begin = time.monotonic()
        arrived = _drain(sock, messages, seconds)
        return arrived / (time.monotonic() - begin)


def _drain(sock: socket.socket, messages: Any, seconds: float) -> int:
    recvmmsg, descriptor = _libc.recvmmsg, sock.fileno()
    arrived = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(DRAIN_SECONDS)
        while (received := recvmmsg(descriptor, messages, BATCH, 0, None)) > 0:
            arrived += received
    return arrived


def backlog(port: int) -> None:
    """Listen, and leave it to the kernel to complete each connection."""
    with socket.create_server(("", port), backlog=BACKLOG):
        time.sleep(3600)


def connect(address: str, port: int, clients: int, seconds: float) -> float:
    """Return the TCP connections a second that `clients` processes open, and reset at once.

    A reset leaves nothing behind that would keep the source port from being used again.
    """
    return _each_second(partial(_open_and_reset, (address, port)), clients, seconds)


def fetch(address: str, port: int, clients: int, seconds: float) -> float:
    """Return the requests a second that `clients` processes have answered by a server of `http`.

    Each request has a TCP connection of its own, which both sides close.
    """
    return _each_second(partial(_fetch, (address, port)), clients, seconds)


def _each_second(exchange: Callable[[], bool], clients: int, seconds: float) -> float:
    """Return how many exchanges `clients` processes bring to their end a second."""
    reading, writing = os.pipe()
    end = time.monotonic() + seconds
    for _ in range(clients):
        if os.fork() == 0:
            # The kernel sends a lost first segment again after seconds, and again: stop it in time.
            signal.signal(signal.SIGALRM, _give_up)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            os.write(writing, struct.pack("q", _repeat_until(end, exchange)))
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as counts:
        made: int = sum(n for (n,) in struct.iter_unpack("q", counts.read()))
    return made / seconds


def _give_up(_number: int, _frame: FrameType | None) -> NoReturn:
    raise TimeoutError


def _repeat_until(end: float, exchange: Callable[[], bool]) -> int:
    done = 0
    with suppress(TimeoutError):
        while time.monotonic() < end:
            with suppress(OSError):
                done += exchange()
        signal.setitimer(signal.ITIMER_REAL, 0)
    return done


def _open_and_reset(server: tuple[str, int]) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.connect(server)
        return True


def _fetch(server: tuple[str, int]) -> bool:
    with socket.socket() as sock:
        sock.connect(server)
        sock.sendall(REQUEST)
        answer = b""
        while more := sock.recv(4096):
            answer += more
        return answer == RESPONSE


def http(port: int) -> None:
    """Answer each request, a connection each, and close the connection.

    A connection comes here when its request is there. So a single process never waits for a client,
    and the kernel does nearly all of the work.
    """
    with socket.create_server(("", port), backlog=128) as server:
        server.setsockopt(socket.IPPROTO_TCP, TCP_DEFER_ACCEPT, ANSWER_SECONDS)
        while True:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.recv(4096)
                connection.sendall(RESPONSE)


def echo(port: int) -> None:
    """Send each datagram back; see `ping`."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", port))
        while True:
            sock.sendto(*sock.recvfrom(2048))


def ping(address: str, port: int, size: int, seconds: float) -> list[tuple[float, float]]:
    """Measure the round trips of datagrams of `size` bytes, one after the other.

    Both ends have a processor of their own where there are two, as two hosts have. Otherwise the
    kernel would choose anew each time, and a round trip on one processor takes a third of the time.

    Each round trip is returned as (time.monotonic() at its start, seconds that it took). Raises
    TimeoutError where an answer does not come.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    trips = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        # Not settimeout(), which would poll before each read.
        timeout = struct.pack("@ll", ANSWER_SECONDS, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        sock.connect((address, port))
        payload = bytes(size)
        end = time.monotonic() + seconds
        begin = 0.0
        while begin < end:
            begin = time.monotonic()
            sock.send(payload)
            try:
                sock.recv(2048)
            except BlockingIOError:
                raise TimeoutError(f"no answer within {ANSWER_SECONDS} s") from None
            trips.append((begin, time.monotonic() - begin))
    return trips


def scatter(begin: float, wave_seconds: float, wave_size: int, waves: list[int]) -> None:
    """Send single TCP segments, each to an address of its own (198.18.0.0/15, RFC 2544).

    `waves` are TCP flags; wave number n sends `wave_size` segments with them, at an even pace,
    from time.monotonic() `begin` + n * `wave_seconds` on, for nine tenths of that time.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        for wave, flags in enumerate(waves):
            for place in range(wave_size):
                if place % BATCH == 0:
                    due = begin + (wave + 0.9 * place / wave_size) * wave_seconds
                    time.sleep(max(0.0, due - time.monotonic()))
                number = wave * wave_size + place
                address = (SCATTERED + number).to_bytes(4, "big")
                # The kernel fills in what is 0 here of the IP header: length, checksum, source.
                header = struct.pack(
                    "!BxHHxxBBH4x4s", 0x45, 0, 0, 64, socket.IPPROTO_TCP, 0, address
                )
                segment = struct.pack(
                    "!HHIIBBHHH", 1024 + number // 1000, 9, 0, 0, 0x50, flags, 0, 0, 0
                )
                sock.sendto(header + segment, (socket.inet_ntoa(address), 0))


PROGRAMS: dict[str, Callable[..., object]] = {
    program.__name__: program
    for program in (
        flood, spread, count, backlog, connect, http, fetch, echo, ping, scatter,
    )
}  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](*map(json.loads, sys.argv[2:]))))
