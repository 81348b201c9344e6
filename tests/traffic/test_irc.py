"""IRC with a real server: a client inside offers a file by DCC, and one outside fetches it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from nfmasq.lab import Daemon, Host, Lab
from tests.programs import program

DATA = os.urandom(500_000)
DCC_PORT = 40_001

CONFIGURATION = """
[Global]
Name = irc.example.net
Info = a test
Listen = 0.0.0.0
ServerUID = root
ServerGID = root
[Options]
DNS = no
Ident = no
PAM = no
"""


@pytest.fixture(scope="module")
def ngircd(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    configuration = tmp_path_factory.mktemp("ngircd") / "ngircd.conf"
    configuration.write_text(CONFIGURATION)
    line = [program("ngircd", "ngircd"), "--nodaemon", "--config", str(configuration)]
    silent = subprocess.DEVNULL
    with lab.outside[0].popen(line, stdout=silent, stderr=silent) as process:
        lab.outside[0].wait_until_bound(6667)
        yield
        process.terminate()


class Client:
    """An IRC client that says lines and waits for lines."""

    def __init__(self, lab: Lab, host: Host, nick: str) -> None:
        self._connection = host.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._connection.connect((lab.outside[0].address, 6667))
        self._lines = self._connection.makefile("rb")
        self.say(f"NICK {nick}")
        self.say(f"USER {nick} 0 * :{nick}")
        self.hears(rb" 001 ")

    def say(self, line: str) -> None:
        self._connection.sendall(line.encode() + b"\r\n")

    def hears(self, pattern: bytes) -> re.Match[bytes]:
        """Return the match in the next line in which the pattern is found."""
        for line in self._lines:
            if line.startswith(b"PING"):
                self.say("PONG" + line[4:].decode().rstrip())
            match = re.search(pattern, line)
            if match:
                return match
        raise AssertionError(f"nothing came with {pattern!r}")

    def close(self) -> None:
        """Leave the server, and wait until it has let go of the nick: another test takes it."""
        with suppress(OSError):
            self.say("QUIT")
            self._lines.read()
        self._lines.close()
        self._connection.close()


@pytest.fixture
def offering(lab: Lab, ngircd: None) -> Iterator[Callable[[], tuple[Client, Client]]]:
    """Yield a function that returns a client inside, which has offered its file, and one outside.

    The function is to be called when the masquerade runs.
    """
    clients: list[Client] = []

    def offer() -> tuple[Client, Client]:
        giver, taker = Client(lab, lab.inside[0], "giver"), Client(lab, lab.outside[1], "taker")
        clients.extend((giver, taker))
        own = int.from_bytes(socket.inet_aton(lab.inside[0].address), "big")
        giver.say(f"PRIVMSG taker :\x01DCC SEND file {own} {DCC_PORT} {len(DATA)}\x01")
        return giver, taker

    yield offer
    for client in clients:
        client.close()


def test_a_file_goes_over_from_where_it_was_left(
    lab: Lab,
    masquerade: Callable[..., Daemon],
    offering: Callable[[], tuple[Client, Client]],
) -> None:
    masquerade("--app", "irc")
    with lab.inside[0].socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("", DCC_PORT))
        listening.listen()
        giver, taker = offering()
        offer = taker.hears(rb"DCC SEND file (\d+) (\d+) ")
        address, port = socket.inet_ntoa(int(offer[1]).to_bytes(4, "big")), int(offer[2])
        assert address == lab.gateway.address
        taker.say(f"PRIVMSG giver :\x01DCC RESUME file {port} 1000\x01")
        assert int(giver.hears(rb"DCC RESUME file (\d+) 1000")[1]) == DCC_PORT
        giver.say(f"PRIVMSG taker :\x01DCC ACCEPT file {DCC_PORT} 1000\x01")
        assert int(taker.hears(rb"DCC ACCEPT file (\d+) 1000")[1]) == port
        with lab.outside[1].socket(socket.AF_INET, socket.SOCK_STREAM) as fetching:
            fetching.connect((address, port))
            sending, fetcher = listening.accept()
            sending.settimeout(20)
            assert fetcher[0] == lab.outside[1].address
            with ThreadPoolExecutor(max_workers=1) as executor:
                fetched = executor.submit(fetching.makefile("rb").read)
                with sending:
                    sending.sendall(DATA[1000:])
            assert fetched.result() == DATA[1000:]


def test_with_the_helper_off_the_offer_passes_unchanged(
    lab: Lab, masquerade: Callable[..., Daemon], offering: Callable[[], tuple[Client, Client]]
) -> None:
    masquerade()
    _, taker = offering()
    offer = taker.hears(rb"DCC SEND file (\d+) (\d+) ")
    assert socket.inet_ntoa(int(offer[1]).to_bytes(4, "big")) == lab.inside[0].address
    assert int(offer[2]) == DCC_PORT
