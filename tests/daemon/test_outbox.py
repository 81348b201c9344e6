"""The outbox: what the engine has to say is sent once, and a packet that fails costs no other.

The tests in tests/traffic show that real packets leave, wherever a host is told of something.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from nfmasq.daemon import outbox
from nfmasq.daemon.outbox import Outbox
from tests.packets import UNREACHABLE, destination_address, icmp

UNREACHED = "10.77.0.66"


class RawSocket:
    """A socket that takes packets in place of the kernel, but none for `UNREACHED`."""

    def __init__(self, *_: object) -> None:
        self.sent: list[tuple[bytes, tuple[str, int]]] = []

    def sendto(self, packet: bytes, destination: tuple[str, int]) -> None:
        if destination[0] == UNREACHED:
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        self.sent.append((packet, destination))

    def setsockopt(self, *_: object) -> None:
        """Take any option."""

    setblocking = setsockopt


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> RawSocket:
    """Return the socket that each outbox gets."""
    raw = RawSocket()
    monkeypatch.setattr("nfmasq.daemon.outbox.socket.socket", lambda *_: raw)
    return raw


@pytest.fixture
def switching_often() -> Iterator[None]:
    """Have threads interrupted wherever they can be."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def error_to(host: str) -> bytes:
    return icmp("0.0.0.0", host, UNREACHABLE, 13, bytes(32))


def test_packets_go_to_their_destination_in_their_order(kernel: RawSocket) -> None:
    packets = [error_to("10.77.0.11"), error_to("10.77.0.12"), error_to("10.77.0.11")]
    waiting = deque(packets)
    Outbox(waiting).send()
    assert not waiting
    assert kernel.sent == [(packet, (destination_address(packet), 0)) for packet in packets]


def test_a_packet_that_cannot_be_sent_is_lost_alone_and_logged_a_few_times(
    kernel: RawSocket, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("nfmasq"), "propagate", True)
    monkeypatch.setattr(outbox.log.filters[0], "_kinds", {})
    waiting = deque([error_to(UNREACHED)] * 1000 + [error_to("10.77.0.11")])
    Outbox(waiting).send()
    assert [destination for _, destination in kernel.sent] == [("10.77.0.11", 0)]
    assert len(caplog.records) == 5
    assert f"{UNREACHED} is lost: Network is unreachable" in caplog.text


def test_of_several_threads_each_packet_is_sent_by_one(
    kernel: RawSocket, switching_often: None
) -> None:
    waiting = deque(error_to(f"10.88.{n // 250}.{n % 250 + 1}") for n in range(5000))
    expected = set(waiting)
    ours = Outbox(waiting)
    failures: list[Any] = []

    def send() -> None:
        try:
            ours.send()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(kernel.sent) == len(expected)
    assert {packet for packet, _ in kernel.sent} == expected
