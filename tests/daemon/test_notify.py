"""What systemd is told: that nfmasq serves, goes on serving, and ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nfmasq.daemon.notify import ServiceManager


@pytest.fixture(params=["file", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    name = f"@{tmp_path}" if request.param == "abstract" else str(tmp_path / "notify")
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listening:
        listening.bind(name.replace("@", "\0") if name[0] == "@" else name)
        listening.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield listening


def turning() -> Callable[[], int]:
    """Return a loop that turns between any two looks."""
    numbers = iter(range(1 << 30))
    return lambda: next(numbers)


def test_it_is_ready_lives_and_stops(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    nfmasq = ServiceManager(turning())
    nfmasq.ready()
    assert [manager.recv(99) for _ in range(4)] == [b"READY=1", *[b"WATCHDOG=1"] * 3]
    nfmasq.stop()
    rest = iter(lambda: manager.recv(99), b"STOPPING=1")
    assert set(rest) <= {b"WATCHDOG=1"}


def test_a_loop_that_stands_still_is_told_of_by_silence(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "40000")
    nfmasq = ServiceManager(lambda: 7)
    nfmasq.ready()
    assert [manager.recv(99) for _ in range(2)] == [b"READY=1", b"WATCHDOG=1"]
    manager.settimeout(0.5)
    with pytest.raises(TimeoutError):
        manager.recv(99)
    nfmasq.stop()
    assert manager.recv(99) == b"STOPPING=1"


@pytest.mark.parametrize(
    "environment", [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}]
)
def test_without_a_watchdog_it_only_begins_and_ends(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    nfmasq = ServiceManager(turning())
    nfmasq.ready()
    nfmasq.stop()
    assert [manager.recv(99) for _ in range(2)] == [b"READY=1", b"STOPPING=1"]


def test_nobody_need_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", str(tmp_path / "nobody")):
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        nfmasq = ServiceManager(turning())
        nfmasq.ready()
        nfmasq.stop()
    assert os.environ["NOTIFY_SOCKET"]
