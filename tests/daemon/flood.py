"""A process that lives through a flood, and says how much memory it has before and after.

`python -m tests.daemon.flood KIND PACKETS` writes three numbers of bytes: before the flood, at its
end, and when all of its entries have expired and a minute has passed. The interpreter is set as in
the daemon.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from nfmasq import apps
from nfmasq.daemon import service  # noqa: F401 - as much of it is loaded as in the daemon
from nfmasq.daemon.interpreter import favour_packets, give_memory_back
from nfmasq.daemon.sweeper import REST, STEP
from nfmasq.engine import BEHAVIOURS, TCP
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from tests.gateway import GATEWAY, Gateway
from tests.packets import ACK, SYN, Endpoint, dotted, number, source, tcp, udp

BEGUN = 500
"""Packets of the flood before memory is first looked at: what is needed once is there then."""

SERVER, FTP, FORWARDED = "10.0.0.250", 21, 8021


def inside(n: int) -> Endpoint:
    host, port = divmod(n, 50_000)
    return dotted(number("10.1.0.0") + host), 1024 + port


def outside(n: int, port: int) -> Endpoint:
    return dotted(number("198.18.0.0") + n), port


def many_sockets(gateway: Gateway, n: int) -> None:
    gateway.out(udp(inside(n), outside(n % 5, 53)))


def one_socket(gateway: Gateway, n: int) -> None:
    gateway.out(udp(inside(0), outside(n, 53)))


def syns(gateway: Gateway, n: int) -> None:
    gateway.out(tcp(inside(n), outside(n % 5, 443), SYN))


def connections(gateway: Gateway, n: int) -> None:
    sent = gateway.out(tcp(inside(n), outside(n % 5, 443), SYN))
    if sent is not None:
        gateway.into(tcp(outside(n % 5, 443), source(sent), SYN | ACK))


def many_hosts(gateway: Gateway, n: int) -> None:
    gateway.out(udp((inside(50_000 * n)[0], 1024), outside(0, 53)))


def syns_to_a_helper(gateway: Gateway, n: int) -> None:
    gateway.out(tcp(inside(n), outside(n % 5, FTP), SYN))


def syns_to_a_forwarded_helper(gateway: Gateway, n: int) -> None:
    gateway.into(tcp(outside(n, 1024), (GATEWAY, FORWARDED), SYN))


FLOODS: dict[str, Callable[[Gateway, int], None]] = {
    flood.__name__: flood
    for flood in (
        many_sockets,
        one_socket,
        syns,
        connections,
        many_hosts,
        syns_to_a_helper,
        syns_to_a_forwarded_helper,
    )
}


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def rest(gateway: Gateway) -> None:
    """Let all entries expire, and then a minute pass."""
    gateway.passes(10_000)
    assert not gateway.sessions.entries()
    for _ in range(int(60 / REST)):
        gateway.now += REST
        gateway.masq.sweep(gateway.now, STEP)


def main(kind: str, packets: int) -> None:
    server = Server(number(SERVER), FTP)
    gateway = Gateway(
        lock=threading.RLock(),
        apps=apps.helpers({"ftp": (FTP,)}),
        forwards=Forwards([Forward(TCP, range(FORWARDED, FORWARDED + 1), [server])]),
        ports=range(1024, 65536),
        filtering=BEHAVIOURS[1],
        max_entries=10 * packets,
    )
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    flood = FLOODS[kind]
    for n in range(BEGUN):
        flood(gateway, n)
    rest(gateway)
    before = resident()
    for n in range(packets):
        flood(gateway, n)
    most = resident()
    rest(gateway)
    print(before, most, resident())


if __name__ == "__main__":
    with ExitStack() as stack:
        favour_packets(stack)
        give_memory_back()
        main(sys.argv[1], int(sys.argv[2]))
