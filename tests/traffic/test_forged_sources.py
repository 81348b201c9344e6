"""Inside sources that are forged: a neighbour that is there has its connections all the same.

5,000 packets a second come from 230 addresses of the inside network that nobody has. The server
that the neighbour wants to reach answers them, so they hold all 4,096 ports.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import SOCK_DGRAM, SOCK_STREAM, socket
from time import sleep

import pytest

from nfmasq.lab import Daemon, Host, Lab
from tests.traffic.clients import connected, echoed
from tests.traffic.observed import eventually, figure
from tests.traffic.servers import ECHO_PORT, TCP_PORT, udp_echo

ROOT = Path(__file__).parents[2]
A_SECOND = 5000
TRIES = 20
KNOWN_AFTER = 2.0
"""Seconds after a host's first packet until it is known to be there, though it speaks only UDP."""

PATIENCE = 3.0
"""Seconds in which a connection is to open: a SYN that was lost comes again after one second."""


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    """Forged packets have no flow that lasts."""
    return ()


@contextmanager
def forger(host: Host, protocol: str, server: Host, port: int) -> Iterator[None]:
    """Have a host send in the name of others within the block."""
    network = host.address.rpartition(".")[0]
    told = json.dumps([protocol, network, server.address, port, A_SECOND])
    line = [sys.executable, "-m", "tests.traffic.forger", told]
    with host.popen(line, cwd=ROOT, stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            process.communicate("")


def opened(host: Host, server: Host) -> int:
    """Return how many of TRIES connections open."""
    succeeded = 0
    for _ in range(TRIES):
        with ExitStack() as stack:
            try:
                stack.enter_context(connected(host, SOCK_STREAM, server, TCP_PORT, PATIENCE))
                succeeded += 1
            except OSError:
                pass
    return succeeded


def answered(host: Host, server: Host) -> int:
    """Return how many of TRIES sockets have a datagram echoed, at the third try at the latest."""
    succeeded = 0
    for _ in range(TRIES):
        with connected(host, SOCK_DGRAM, server, ECHO_PORT, PATIENCE / 3) as client:
            succeeded += any(is_echoed(client) for _ in range(3))
    return succeeded


def is_echoed(client: socket) -> bool:
    try:
        return echoed(client)
    except OSError:  # refused
        return False


def all_ports_are_held(daemon: Daemon, protocol: str) -> bool:
    return eventually(lambda: figure(daemon, "nfmasq_ports_free", protocol=protocol) == 0)


@pytest.mark.usefixtures("listener")
def test_a_neighbour_and_a_host_that_is_new_open_all_their_connections(
    lab: Lab, masquerade: Callable[..., Daemon]
) -> None:
    daemon = masquerade()
    attacker, neighbour, newcomer = lab.inside
    server = lab.outside[0]
    assert opened(neighbour, server) == TRIES
    with forger(attacker, "tcp", server, TCP_PORT):
        assert all_ports_are_held(daemon, "tcp")
        assert opened(neighbour, server) == TRIES
        assert opened(newcomer, server) == TRIES


def test_datagrams_of_a_neighbour_that_speaks_only_udp_are_answered(
    lab: Lab, masquerade: Callable[..., Daemon]
) -> None:
    daemon = masquerade()
    attacker, neighbour, _ = lab.inside
    server = lab.outside[0]
    with udp_echo(server):
        assert answered(neighbour, server) == TRIES
        sleep(KNOWN_AFTER)
        with forger(attacker, "udp", server, ECHO_PORT):
            assert all_ports_are_held(daemon, "udp")
            assert answered(neighbour, server) == TRIES


@pytest.fixture(scope="module")
def lab(data_path: tuple[str, ...]) -> Iterator[Lab]:
    with Lab(inside=3, outside=1, options=data_path) as lab:
        yield lab
