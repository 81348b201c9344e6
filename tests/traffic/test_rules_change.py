"""Rules that change while packets pass: nothing is lost by it, and nothing leaks."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from nfmasq.lab import Host, Lab
from tests.traffic.conftest import taking
from tests.traffic.observed import eventually

data_path = taking("queue", "routed")

CHANGES = [
    ["--no-checksum-fill"],
    ["--clamp-mss", "--only-inside"],
    ["--other-protocols", "--no-checksum-fill"],
    ["--forward=tcp:8080", "--reserve"],
    ["--only-answers"],
    ["--no-ipv6-forward"],
    ["--ports=61000-65000", "--masquerade-address=192.0.2.7"],
    ["--inside=dmz", "--outside=ppp+"],
    ["--no-flow-cache", "--only-answers"],
]


@pytest.fixture(params=["iptables-nft", "iptables-legacy"])
def iptables(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class Echoes:
    """UDP echoes of the inside hosts, some thousands a second, from construction to `close`."""

    def __init__(self, lab: Lab) -> None:
        self.lost = self.leaked = self.sent = 0
        self._enough, self._ended = threading.Event(), threading.Event()
        self._stack = ExitStack()
        server = (lab.outside[0].address, 7)
        self._server = self._open(lab, lab.outside[0])
        self._server.bind(server)
        self._clients = [self._open(lab, host) for host in lab.inside]
        self._wire = lab.router.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        self._stack.callback(self._wire.close)
        self._wire.bind(("wan", 0x0800))
        self._wire.settimeout(0.1)
        self._outside = [threading.Thread(target=each) for each in (self._serve, self._look)]
        self._inside = [threading.Thread(target=self._ask, args=(each,)) for each in self._clients]
        for client in self._clients:
            client.connect(server)
        for thread in (*self._outside, *self._inside):
            thread.start()

    def go_on(self) -> bool:
        """Wait until more echoes have come back; say whether they have come."""
        before = self.sent
        return eventually(lambda: self.sent > before + 100)

    def _open(self, lab: Lab, host: Host) -> socket.socket:
        opened = host.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._stack.callback(opened.close)
        opened.settimeout(0.1)
        return opened

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                self._server.sendto(*self._server.recvfrom(100))
            except TimeoutError:
                continue

    def _look(self) -> None:
        while not self._ended.is_set():
            try:
                self.leaked += self._wire.recv(64)[12:15] == b"\x0a\x4d\x00"
            except TimeoutError:
                continue

    def _ask(self, client: socket.socket) -> None:
        """Have some echoes on their way at any time, and wait for each of them in the end."""
        client.settimeout(10)
        while not self._enough.is_set():
            for _ in range(8):
                client.send(b"x")
            self.sent += 8
            try:
                for _ in range(8):
                    client.recv(100)
            except TimeoutError:
                self.lost += 1

    def close(self) -> None:
        for ended, threads in ((self._enough, self._inside), (self._ended, self._outside)):
            ended.set()
            for thread in threads:
                thread.join()
        self._stack.close()


@contextmanager
def echoes(lab: Lab) -> Iterator[Echoes]:
    traffic = Echoes(lab)
    try:
        assert traffic.go_on()
        yield traffic
    finally:
        traffic.close()


def test_no_echo_is_lost_and_nothing_leaks_while_options_change_back_and_forth(
    lab: Lab, iptables: str
) -> None:
    lab.rules("up", IPTABLES=iptables)
    daemon = lab.nfmasq()
    try:
        with echoes(lab) as traffic:
            for options in CHANGES:
                for each in (options, []):
                    lab.rules("up", *each, IPTABLES=iptables)
                    assert traffic.go_on(), each
                    assert (traffic.lost, traffic.leaked) == (0, 0), each
            for _ in range(3):
                lab.rules("restart", IPTABLES=iptables)
                assert traffic.go_on()
        assert (traffic.lost, traffic.leaked) == (0, 0)
    finally:
        daemon.stop()
        lab.rules("down", IPTABLES=iptables)
