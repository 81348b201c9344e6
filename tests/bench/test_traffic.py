"""The programs that make traffic: what they send, and how they end a connection."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import traffic

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    """Run `traffic.http`; returns its address and port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address: tuple[str, int] = free.getsockname()
    process = program("http", address[1])
    try:
        _wait_for(address)
        yield address
    finally:
        process.terminate()
        process.communicate()


class TestRequestsOverHttp:
    def test_the_answer_is_whole_and_then_the_server_closes(self, server: tuple[str, int]) -> None:
        with socket.create_connection(server, timeout=20) as client:
            client.sendall(traffic.REQUEST)

            # A reset instead of a FIN would raise.
            assert b"".join(iter(lambda: client.recv(4096), b"")) == traffic.RESPONSE

    def test_the_length_in_the_answer_is_true(self) -> None:
        head, _, body = traffic.RESPONSE.partition(b"\r\n\r\n")

        assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")

    def test_requests_that_were_answered_count(self, server: tuple[str, int]) -> None:
        fetching = program("fetch", *server, 2, 0.3)
        output, _ = fetching.communicate(timeout=60)

        assert json.loads(output) > 0

    def test_what_nobody_answers_does_not_count(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            fetching = program("fetch", *silent.getsockname(), 2, 0.3)
            output, _ = fetching.communicate(timeout=60)

        assert json.loads(output) == 0


class TestDatagramsSpreadOverFlows:
    @given(st.integers(1, 500))
    def test_each_flow_has_as_many_datagrams_as_any_other(self, flows: int) -> None:
        sent = Counter(destinations(7001, flows))

        assert sent.keys() == {(7001, traffic.SCATTERED + number) for number in range(flows)}
        assert len(set(sent.values())) == 1

    @given(st.integers(1, 500))
    def test_a_batch_is_full_unless_it_is_the_last(self, flows: int) -> None:
        batches = [len(batch) // 16 for batch in traffic._destinations(7001, flows)]

        assert all(count == traffic.BATCH for count in batches[:-1])
        assert sum(batches) > traffic.BATCH // 2

    def test_flows_that_follow_one_another_do_not_lie_side_by_side(self) -> None:
        assert list(destinations(7001, 1000)) != sorted(destinations(7001, 1000))


def destinations(port: int, flows: int) -> Iterator[tuple[int, int]]:
    """Yield the port and the address of each datagram that is sent from a source port."""
    for batch in traffic._destinations(port, flows):
        for family, to_port, address in struct.iter_unpack("!2sHI8x", batch):
            assert family == struct.pack("=H", socket.AF_INET)
            yield to_port, address


def program(name: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program of `traffic.py`."""
    line = [sys.executable, "-m", "bench.traffic", name, *map(json.dumps, arguments)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _wait_for(server: tuple[str, int]) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(server).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            return
