"""Clients of the control socket and of the metrics, who may be many, slow, or silent."""

from __future__ import annotations

import os
import resource
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from socket import AF_INET, AF_UNIX, SOCK_STREAM, socket

import pytest
from prometheus_client import CollectorRegistry

from nfmasq.daemon import connections
from nfmasq.daemon.connections import MOST, BoundedServer
from nfmasq.daemon.control import ControlServer, request
from nfmasq.daemon.metrics import MetricsServer
from nfmasq.engine import Masquerade
from nfmasq.engine.table.limits import TokenBucket


class Case:
    """A server, how a client connects to it, and how a client is answered by it."""

    def __init__(self, server: BoundedServer, connect: Callable[[], socket]) -> None:
        self.server = server
        self.connect = connect

    def answers(self) -> bool:
        if isinstance(self.server, MetricsServer):
            url = f"http://127.0.0.1:{self.server.server_port}/metrics"
            with urllib.request.urlopen(url, timeout=30) as answer:
                return bool(answer.status == 200)
        return list(request(Path(str(self.server.server_address)), "stats")) == []

    def silent(self, stack: ExitStack, said: bytes = b"") -> socket:
        client = stack.enter_context(self.connect())
        client.settimeout(30)
        if said:
            client.sendall(said)
        return client


def unix_client(path: Path) -> socket:
    client = socket(AF_UNIX)
    client.connect(os.fspath(path))
    return client


def tcp_client(port: int) -> socket:
    client = socket(AF_INET, SOCK_STREAM)
    client.connect(("127.0.0.1", port))
    return client


@pytest.fixture(params=["control", "metrics"])
def case(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Case]:
    monkeypatch.setattr(connections, "PER_SECOND", 2000)
    if request.param == "metrics":
        metrics = MetricsServer(CollectorRegistry(), "127.0.0.1", 0)
        yield Case(metrics, lambda: tcp_client(metrics.server_port))
        metrics.close()
    else:
        path = tmp_path / "control"
        control = ControlServer(
            path, Masquerade(lock=threading.RLock()), dict, list, list, time.monotonic
        )
        control.start()
        yield Case(control, lambda: unix_client(path))
        control.close()


def hung_up(client: socket) -> bool:
    """Say whether the server has hung up; waits for it."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def drip(client: socket, seconds: float) -> None:
    """Send a byte again and again."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        client.sendall(b"G")
        time.sleep(0.05)


def eventually(is_so: Callable[[], bool], seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while not is_so() and time.monotonic() < until:
        time.sleep(0.01)
    return is_so()


def test_many_silent_clients_are_a_bounded_number_and_a_client_that_asks_is_answered(
    case: Case,
) -> None:
    with ExitStack() as stack:
        clients = [case.silent(stack) for _ in range(4 * MOST)]
        assert case.answers()
        assert case.server.connections <= MOST
        assert all(map(hung_up, clients[: 2 * MOST])), "the oldest go first"
    assert eventually(lambda: case.server.connections == 0)


def test_threads_are_no_more_than_connections(case: Case) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(4 * MOST):
            case.silent(stack, b"G")
        assert eventually(lambda: threading.active_count() - before <= MOST)


def test_a_client_that_takes_its_time_over_the_request_is_hung_up_on(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte is in time for a limit between two bytes."""
    monkeypatch.setattr(connections, "HEARD_WITHIN", 0.3)
    with ExitStack() as stack:
        client = case.silent(stack)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            drip(client, 30)
        assert case.answers()


def test_clients_are_accepted_at_a_pace(case: Case) -> None:
    case.server._pace = TokenBucket(10, 10)
    began = time.monotonic()
    with ExitStack() as stack:
        for _ in range(10):
            case.silent(stack)
        assert case.answers()
        # Of all that there were, the eleventh waited; how long, the machine says.
        assert time.monotonic() - began >= 0.05


def test_a_connection_that_cannot_be_accepted_is_refused_and_costs_next_to_nothing(
    case: Case,
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        assert case.answers()
        family = AF_UNIX if isinstance(case.server, ControlServer) else AF_INET
        clients = [stack.enter_context(socket(family)) for _ in range(5)]
        taken = stack.enter_context(open(os.devnull))
        assert eventually(lambda: case.server.connections == 0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (_first_free(taken.fileno()), limit[1]))
        try:
            used = time.process_time()
            for client in clients:
                client.settimeout(30)
                client.connect(case.server.server_address)
            assert all(map(hung_up, clients))
            time.sleep(0.5)
            assert time.process_time() - used < 0.4
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert case.answers()


def _first_free(least: int) -> int:
    """Return the number of the first descriptor that is free; all below it are taken."""
    free = os.dup(least)
    os.close(free)
    return free


def test_a_thread_that_cannot_be_started_costs_one_connection(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with ExitStack() as stack:
        monkeypatch.setattr(threading.Thread, "start", fail)
        assert hung_up(case.silent(stack))
        monkeypatch.undo()
    assert case.answers()
    assert eventually(lambda: case.server.connections == 0)
