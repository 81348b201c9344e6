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
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
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
"""198.18.0.0, the first of the addresses that `scatter` sends to."""

ANSWER_SECONDS = 2
"""Seconds to wait for the answer to a datagram."""


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
    reading, writing = os.pipe()
    end = time.monotonic() + seconds
    for _ in range(clients):
        if os.fork() == 0:
            # The kernel sends a lost first segment again after seconds, and again: stop it in time.
            signal.signal(signal.SIGALRM, _give_up)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            os.write(writing, struct.pack("q", _connect_until(end, (address, port))))
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as counts:
        made: int = sum(n for (n,) in struct.iter_unpack("q", counts.read()))
    return made / seconds


def _give_up(_number: int, _frame: FrameType | None) -> NoReturn:
    raise TimeoutError


def _connect_until(end: float, server: tuple[str, int]) -> int:
    made = 0
    reset = struct.pack("ii", 1, 0)
    with suppress(TimeoutError):
        while time.monotonic() < end:
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                try:
                    sock.connect(server)
                except OSError:
                    continue
                made += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
    return made


def echo(port: int) -> None:
    """Send each datagram back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", port))
        while True:
            sock.sendto(*sock.recvfrom(2048))


def ping(address: str, port: int, size: int, seconds: float) -> list[tuple[float, float]]:
    """Measure the round trips of datagrams of `size` bytes, one after the other.

    Each round trip is returned as (time.monotonic() at its start, seconds that it took). Raises
    TimeoutError where an answer does not come.
    """
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
    program.__name__: program for program in (flood, count, backlog, connect, echo, ping, scatter)
}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](*map(json.loads, sys.argv[2:]))))
