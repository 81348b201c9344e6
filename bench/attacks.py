"""The programs of `abuse.py`: a quiet neighbour, and attackers, each run on a host of the lab.

`python -m bench.attacks NAME ARGUMENT...` works as `traffic.py` does. Attackers send whole packets
that were made beforehand, many at a system call, at an even pace.
"""

from __future__ import annotations

import ctypes
import json
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from bench.traffic import BATCH, REQUEST, RESPONSE
from nfmasq.daemon.receive import messages_at
from nfmasq.engine.wire.checksum import checksum, with_checksum

FETCHES, ECHOES = 10, 100
"""What the neighbour does in a second: HTTP connections, and UDP echoes on a single flow."""

PATIENCE = 4.0
"""Seconds after which the neighbour gives up a connection or an echo."""

DIFFERENT = 1 << 14
"""How many packets an attack repeats."""

TCP, UDP, ICMP = socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_ICMP

_libc = ctypes.CDLL(None)


# -- the neighbour -----------------------------------------------------------------


def neighbour(server: str, http: int, echo: int, seconds: float) -> dict[str, Any]:
    """Fetch and echo at a quiet pace; returns what was tried and done, and how long it took.

    `fetches` and `echoes` are lists of the seconds that each took, None where it failed.
    """
    fetches: list[float | None] = []
    echoes: list[float | None] = [None] * int(seconds * ECHOES)
    threads = [threading.Thread(target=_echo, args=(server, echo, echoes))]
    threads[0].start()
    begin = time.monotonic()
    for number in range(int(seconds * FETCHES)):
        time.sleep(max(0.0, begin + number / FETCHES - time.monotonic()))
        fetch = threading.Thread(target=lambda: fetches.append(_fetch(server, http)))
        fetch.start()
        threads.append(fetch)
    for thread in threads:
        thread.join()
    return {"fetches": fetches, "echoes": echoes}


def _fetch(server: str, port: int) -> float | None:
    begin = time.monotonic()
    try:
        with socket.create_connection((server, port), timeout=PATIENCE) as sock:
            sock.sendall(REQUEST)
            answer = b""
            while more := sock.recv(4096):
                answer += more
    except OSError:
        return None
    return time.monotonic() - begin if answer == RESPONSE else None


def _echo(server: str, port: int, echoes: list[float | None]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((server, port))
        sock.settimeout(PATIENCE)
        receiver = threading.Thread(target=_receive_echoes, args=(sock, echoes))
        receiver.start()
        begin = time.monotonic()
        for number in range(len(echoes)):
            time.sleep(max(0.0, begin + number / ECHOES - time.monotonic()))
            sock.send(struct.pack("!Id", number, time.monotonic()))
        receiver.join()


def _receive_echoes(sock: socket.socket, echoes: list[float | None]) -> None:
    while True:
        try:
            number, sent = struct.unpack("!Id", sock.recv(100))
        except OSError:
            return
        echoes[number] = time.monotonic() - sent
        if number == len(echoes) - 1:
            return


# -- attackers ---------------------------------------------------------------------


def syns(saddr: str, server: str, rate: int, seconds: float) -> int:
    """Open connections from all ports of a host, and finish none."""
    return _storm((_tcp(saddr, n, server, 80, 0x02) for n in _ports()), rate, seconds)


def one_flow(saddr: str, server: str, rate: int, seconds: float) -> int:
    """Send datagrams of a flow that nobody answers."""
    return _storm((_udp(saddr, 4000, server, 61500) for _ in range(BATCH)), rate, seconds)


def many_flows(saddr: str, server: str, rate: int, seconds: float) -> int:
    """Send datagrams from a port to many ports."""
    return _storm((_udp(saddr, 4000, server, n) for n in _ports()), rate, seconds)


def forged(network: str, server: str, rate: int, seconds: float) -> int:
    """Open connections from the addresses 20 to 249 of a network, none of which is there."""
    sources = [f"{network}.{n}" for n in range(20, 250)]
    packets = (_tcp(random.choice(sources), n, server, 80, 0x02) for n in _ports())
    return _storm(packets, rate, seconds)


def strangers(gateway: str, rate: int, seconds: float) -> int:
    """Send SYNs from everywhere to the masquerade ports."""
    packets = (
        _tcp(f"198.18.{random.randrange(256)}.{random.randrange(1, 255)}", n, gateway, port, 0x02)
        for n, port in zip(_ports(), _masquerade_ports(), strict=False)
    )
    return _storm(packets, rate, seconds)


def errors(gateway: str, rate: int, seconds: float) -> int:
    """Send ICMP errors about packets that were never sent."""
    packets = (
        _icmp("198.18.0.1", gateway, b"\3\1", _udp(gateway, port, "198.18.0.9", 53)[:28])
        for port in islice(_masquerade_ports(), DIFFERENT)
    )
    return _storm(packets, rate, seconds)


def _ports() -> Iterator[int]:
    return iter(random.sample(range(1024, 65536), DIFFERENT))


def _masquerade_ports() -> Iterator[int]:
    while True:
        yield random.randrange(61000, 65096)


def _storm(packets: Iterator[bytes], rate: int, seconds: float) -> int:
    """Send these packets again and again, `rate` a second; returns how many were sent."""
    made = list(packets)
    size = max(map(len, made))
    buffer = ctypes.create_string_buffer(size * len(made))
    names = ctypes.create_string_buffer(16 * len(made))
    messages = messages_at(ctypes.addressof(buffer), size, len(made), size)
    for place, packet in enumerate(made):
        ctypes.memmove(ctypes.addressof(buffer) + place * size, packet, len(packet))
        messages[place].header.iovec.contents.length = len(packet)
        name = struct.pack("=H2x", socket.AF_INET) + packet[16:20] + bytes(8)
        ctypes.memmove(ctypes.addressof(names) + 16 * place, name, 16)
        messages[place].header.name = ctypes.addressof(names) + 16 * place
        messages[place].header.name_length = 16
    step, at, sent = ctypes.sizeof(messages[0]), ctypes.addressof(messages), 0
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 32, 8 << 20)  # SO_SNDBUFFORCE
        begin = time.monotonic()
        while (now := time.monotonic()) < begin + seconds:
            if sent > (now - begin) * rate:
                time.sleep(0.000_5)
                continue
            first = sent % len(made)
            count = min(BATCH, len(made) - first)
            _libc.sendmmsg(sock.fileno(), ctypes.c_void_p(at + first * step), count, 0)
            sent += count
    return sent


def _ip(saddr: str, daddr: str, protocol: int, payload: bytes) -> bytes:
    """Make a packet; the kernel fills in its header's checksum."""
    ends = socket.inet_aton(saddr) + socket.inet_aton(daddr)
    head = struct.pack("!BxHHHBBH", 0x45, 20 + len(payload), 1, 0, 64, protocol, 0)
    return head + ends + payload


def _tcp(saddr: str, sport: int, daddr: str, dport: int, flags: int) -> bytes:
    segment = struct.pack("!HHIIBBHHH", sport, dport, 7, 0, 0x50, flags, 8192, 0, 0)
    return with_checksum(_ip(saddr, daddr, TCP, segment))


def _udp(saddr: str, sport: int, daddr: str, dport: int) -> bytes:
    return _ip(saddr, daddr, UDP, struct.pack("!HHHH", sport, dport, 26, 0) + bytes(18))


def _icmp(saddr: str, daddr: str, kind: bytes, quoted: bytes) -> bytes:
    summed = checksum(kind + bytes(6) + quoted).to_bytes(2, "big")
    return _ip(saddr, daddr, ICMP, kind + summed + bytes(4) + quoted)


PROGRAMS: dict[str, Callable[..., object]] = {
    program.__name__: program
    for program in (neighbour, syns, one_flow, many_flows, forged, strangers, errors)
}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](*map(json.loads, sys.argv[2:]))))
