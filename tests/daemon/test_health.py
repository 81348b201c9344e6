"""Health checks of real sockets: who is taken out and brought back, how soon, and why."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from nfmasq.config.health import HealthSettings
from nfmasq.daemon.health import HealthCheck, HealthChecks
from nfmasq.engine.forward.server import Server

LOCALHOST = 0x7F000001


@pytest.fixture
def checks() -> Iterator[HealthChecks]:
    checks = HealthChecks()
    yield checks
    checks.stop()


@contextmanager
def listening(port: int = 0, backlog: int = 128) -> Iterator[socket.socket]:
    """Listen on a TCP port within the block: connections are made there, and nobody answers."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(backlog)
        yield listener


@contextmanager
def web_server(answer: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Run a server that always gives one answer; yields its port, and the requests that came."""
    requests: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                requests.append(client.recv(1000))
                client.sendall(answer)

    with listening() as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield listener.getsockname()[1], requests
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def a_closed_port() -> int:
    with listening() as listener:
        port: int = listener.getsockname()[1]
        return port


def health_check(how: HealthSettings) -> HealthCheck:
    return HealthCheck(how, "tcp:8080")


def comes_true(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_a_server_that_listens_stays(checks: HealthChecks) -> None:
    with listening() as listener:
        server = Server(LOCALHOST, listener.getsockname()[1])
        checks.follow({server: health_check(HealthSettings("tcp", interval=0.1))})
        assert not comes_true(lambda: not server.alive, 0.5)


def test_a_server_that_dies_is_taken_out_soon_after_the_interval_and_brought_back(
    checks: HealthChecks, caplog: pytest.LogCaptureFixture
) -> None:
    """Soon is before two more intervals have passed, which three checks would take without haste.

    With haste three checks take a fifth of an interval, and the first of them comes within another
    interval.
    """
    caplog.set_level(logging.INFO, "nfmasq")
    interval = 2.0
    check = HealthSettings("tcp", interval=interval, rise=3, fall=3)
    with listening() as listener:
        port = listener.getsockname()[1]
        server = Server(LOCALHOST, port)
        checks.follow({server: health_check(check)})
        listener.settimeout(30)
        listener.accept()[0].close()
        assert server.alive
        dying = time.monotonic()
    died = time.monotonic()
    assert comes_true(lambda: len(caplog.messages) == 1)
    known = time.monotonic()
    assert not server.alive
    assert known - dying >= 0.2 * interval
    assert known - died < 2 * interval
    coming = time.monotonic()
    with listening(port):
        back = time.monotonic()
        assert comes_true(lambda: len(caplog.messages) == 2)
        known = time.monotonic()
        assert server.alive
    assert known - coming >= 0.2 * interval
    assert known - back < 2 * interval
    assert caplog.messages == [
        f"tcp:8080: 127.0.0.1:{port} is taken out: connection refused",
        f"tcp:8080: 127.0.0.1:{port} is back",
    ]


@pytest.mark.parametrize(
    ("answer", "alive"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.0 302 Found\r\nLocation: /elsewhere\r\n\r\n", True),
        (b"HTTP/1.1 204\r\n\r\n", True),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", False),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False),
        (b"HTTP/1.1 2000 Odd\r\n\r\n", False),
        (b"220 mail.example ESMTP\r\n", False),
        (b"HTTP/1.1 200 OK", False),
        (b"x" * 5000, False),
        (b"", False),
    ],
)
def test_over_http_a_server_is_alive_whose_status_is_2xx_or_3xx(
    checks: HealthChecks, answer: bytes, alive: bool
) -> None:
    with web_server(answer) as (port, requests):
        server = Server(LOCALHOST, port)
        server.alive = not alive
        checks.follow({server: health_check(HealthSettings("http", "/health", interval=0.2))})
        assert comes_true(lambda: server.alive is alive)
    head, *fields = requests[0].decode().split("\r\n")
    assert head == "GET /health HTTP/1.1"
    assert f"Host: 127.0.0.1:{port}" in fields


def test_a_server_that_takes_connections_and_says_nothing_is_dead_over_http(
    checks: HealthChecks, caplog: pytest.LogCaptureFixture
) -> None:
    with listening() as listener:
        server = Server(LOCALHOST, listener.getsockname()[1])
        checks.follow({server: health_check(HealthSettings("http", interval=0.2, timeout=0.3))})
        assert comes_true(lambda: not server.alive)
    assert "no answer in 0.3 s" in caplog.text


def test_a_single_failure_is_forgiven(checks: HealthChecks) -> None:
    """After a failure the server is asked again soon, and a good answer ends the doubt."""
    answers = iter([b"HTTP/1.1 500 Oops\r\n\r\n"] + [b"HTTP/1.1 200 OK\r\n\r\n"] * 1000)
    asked = threading.Event()

    def serve(listener: socket.socket) -> None:
        for count, answer in enumerate(answers):
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                client.recv(1000)
                client.sendall(answer)
            if count == 4:
                asked.set()

    with listening() as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        server = Server(LOCALHOST, listener.getsockname()[1])
        checks.follow({server: health_check(HealthSettings("http", interval=0.1))})
        taken_out = comes_true(lambda: not server.alive, 0.6)
        assert asked.wait(30)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert not taken_out


def test_a_hundred_silent_servers_hold_up_no_other_server(checks: HealthChecks) -> None:
    with listening() as silent:
        port = silent.getsockname()[1]
        slow = health_check(HealthSettings("http", interval=0.2, timeout=60))
        dead = Server(LOCALHOST, a_closed_port())
        servers = {Server(LOCALHOST, port): slow for _ in range(100)}
        checks.follow({**servers, dead: health_check(HealthSettings("tcp", interval=0.2))})
        # Each check of a silent server lasts for a minute.
        assert comes_true(lambda: not dead.alive, 30)


def test_a_server_that_is_no_longer_checked_passes_for_alive(checks: HealthChecks) -> None:
    server = Server(LOCALHOST, a_closed_port())
    checks.follow({server: health_check(HealthSettings("tcp", interval=0.1))})
    assert comes_true(lambda: not server.alive)
    checks.follow({})
    assert server.alive
    assert not comes_true(lambda: not server.alive, 0.3)


def test_another_check_takes_over_and_the_server_stays_out_until_it_answers(
    checks: HealthChecks,
) -> None:
    with web_server(b"HTTP/1.1 500 Oops\r\n\r\n") as (port, _):
        server = Server(LOCALHOST, port)
        checks.follow({server: health_check(HealthSettings("http", interval=0.2, timeout=0.3))})
        assert comes_true(lambda: not server.alive)
    checks.follow({server: health_check(HealthSettings("tcp", interval=0.2))})
    assert not comes_true(lambda: server.alive, 0.5)
    with listening(port):
        assert comes_true(lambda: server.alive)


def test_it_stops_whenever_it_is_told_to() -> None:
    """A cancellation may meet a check at any point."""
    closed = a_closed_port()
    for delay in range(30):
        checks = HealthChecks()
        for _ in range(2):
            servers = {Server(LOCALHOST, closed): health_check(HealthSettings("tcp", interval=0.1))}
            checks.follow(servers)
            time.sleep(delay / 1000)
        checks.stop()


def test_it_stops_at_once_whatever_is_under_way() -> None:
    checks = HealthChecks()
    with listening() as listener:
        server = Server(LOCALHOST, listener.getsockname()[1])
        checks.follow({server: health_check(HealthSettings("http", interval=0.1, timeout=60))})
        listener.settimeout(30)
        with listener.accept()[0]:
            began = time.monotonic()
            checks.stop()
            assert time.monotonic() - began < 30  # and not when the check gives up, after a minute
