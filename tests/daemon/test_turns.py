"""Reading the queue in turns: who sends little does not wait for who sends much."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.daemon import turns
from nfmasq.daemon.lines import PATIENCE, Lines
from nfmasq.daemon.receive import Receiver
from nfmasq.daemon.turns import AHEAD, FEW, LOOK, SHARED, Turns

BATCH = 32
FLOOD, QUIET = 1, 2


class Kernel:
    """A queue in the kernel; a message's first byte is its host, the next four are its number."""

    def __init__(self, room: int = 1000) -> None:
        self.waiting: deque[bytes] = deque()
        self.dropped: list[bytes] = []
        self.held: list[int] = []
        self.sent = 0
        self.turns = Turns(
            cast(Receiver, self),
            BATCH,
            Lines(room),
            lambda message: message[0],
            self.dropped.append,
            self.held.append,
        )

    def send(self, host: int, count: int = 1) -> list[bytes]:
        new = [bytes([host]) + (self.sent + n).to_bytes(4, "big") for n in range(count)]
        self.sent += count
        self.waiting += new
        return new

    def receive(self) -> list[bytes]:
        batch = [self.waiting.popleft() for _ in range(min(BATCH, len(self.waiting)))]
        return batch[::-1]

    receive_waiting = receive

    def handle(self) -> list[bytes]:
        """Return what is handled next, in order."""
        return self.turns.receive()[::-1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(turns, "monotonic", lambda: now[0])
    return now


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 80), st.integers(0, 9))))
def test_each_packet_is_handled_or_dropped_and_hosts_keep_their_order(
    steps: list[tuple[int, int, int]],
) -> None:
    kernel = Kernel(room=64)
    handled: list[bytes] = []
    for host, packets, rounds in steps:
        kernel.send(host, packets)
        for _ in range(rounds):
            handled += kernel.handle()
    while batch := kernel.handle():
        handled += batch
    assert len(handled) + len(kernel.dropped) == kernel.sent
    by_host = defaultdict(list)
    for message in handled:
        by_host[message[0]].append(message)
    assert all(messages == sorted(messages) for messages in by_host.values())


def test_packets_that_do_not_pile_up_are_handled_as_they_come(clock: list[float]) -> None:
    kernel = Kernel()
    for _ in range(100):
        sent = kernel.send(FLOOD, FEW // 2) + kernel.send(QUIET, FEW // 2)
        assert kernel.handle() == sent


def test_a_host_that_is_alone_loses_nothing_here_and_is_not_held(clock: list[float]) -> None:
    """What is too much for the kernel's queue is lost there, where it costs nothing."""
    kernel = Kernel(room=10)
    for _ in range(1000):
        clock[0] += PATIENCE
        kernel.send(FLOOD, BATCH)
        assert len(kernel.handle()) == BATCH
    assert not kernel.dropped
    assert not kernel.held


def test_who_sends_little_waits_for_few_packets_of_who_floods(clock: list[float]) -> None:
    kernel = Kernel()

    kernel.send(FLOOD, 5000)
    while QUIET not in {message[0] for message in kernel.handle()}:
        kernel.send(QUIET)
        kernel.send(FLOOD, BATCH)
    while kernel.waiting or QUIET in {message[0] for message in kernel.handle()}:
        kernel.handle()
    for _ in range(100):
        clock[0] += SHARED / 200
        kernel.send(FLOOD, 2 * FEW)
        sent = kernel.send(QUIET)
        between = kernel.handle() + kernel.handle()
        assert sent[0] in between
    assert len(kernel.dropped) > 100
    assert all(message[0] == FLOOD for message in kernel.dropped)
    assert kernel.held
    assert set(kernel.held) == {FLOOD}


def test_turns_end_when_a_host_has_been_alone_for_long(clock: list[float]) -> None:
    kernel = Kernel()
    for _ in range(2 * LOOK):
        kernel.send(QUIET, BATCH // 2)
        kernel.send(FLOOD, BATCH // 2)
        kernel.handle()
    assert kernel.turns._lines.waiting
    clock[0] += 2 * SHARED
    kernel.send(FLOOD, AHEAD * BATCH * 10)
    for _ in range(AHEAD * BATCH):
        kernel.handle()
    kernel.send(FLOOD, BATCH)
    assert not kernel.turns._lines.waiting
