"""Two servers share a forwarded port, one goes, and its clients always use the same port.

Over UDP a server answers each datagram with its name. Over TCP it says its name to whoever comes,
and once more whenever it is asked to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from socket import (
    AF_INET,
    IPPROTO_TCP,
    SO_LINGER,
    SO_REUSEADDR,
    SOCK_DGRAM,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)

import pytest

from nfmasq.daemon.control import request
from nfmasq.lab import Daemon, Host, Lab
from tests.traffic.clients import BRIEFLY, PATIENCE, RESET_AT_THE_END
from tests.traffic.observed import entries, eventually, figure

GATEWAY = "198.51.100.2"
PORT, SERVED, CLIENTS_OWN = 8080, 80, 33_000
FIRST, SECOND = "10.77.0.11", "10.77.0.12"
TCP_REPAIR = 19  # a socket that is closed in this mode says nothing to the other end
CHECK = 'check = { kind = "tcp", interval = 0.2 }\n'

Masquerade = Callable[..., Daemon]


class Server:
    """A server on a host, over UDP and TCP, from construction to `close`."""

    def __init__(self, host: Host) -> None:
        self._name = host.address.encode()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        datagrams = host.socket(AF_INET, SOCK_DGRAM)
        listener = host.socket(AF_INET, SOCK_STREAM)
        listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        for opened in (datagrams, listener):
            opened.bind(("", SERVED))
        listener.listen()
        self._repeat(self._answer, datagrams)
        self._repeat(self._accept, listener)

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, step: Callable[[socket], bool], opened: socket) -> None:
        """Take steps with a socket, in a thread of its own, as long as they return true."""

        def work() -> None:
            opened.settimeout(0.1)
            goes_on = True
            with opened:
                while goes_on and not self._closing.is_set():
                    with suppress(TimeoutError):
                        goes_on = step(opened)

        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()

    def _answer(self, datagrams: socket) -> bool:
        _, client = datagrams.recvfrom(100)
        datagrams.sendto(self._name, client)
        return True

    def _accept(self, listener: socket) -> bool:
        connection, _ = listener.accept()
        connection.setsockopt(SOL_SOCKET, SO_LINGER, RESET_AT_THE_END)
        connection.sendall(self._name)
        self._repeat(self._say_again, connection)
        return True

    def _say_again(self, connection: socket) -> bool:
        try:
            asked = connection.recv(100)
            if asked:
                connection.sendall(self._name)
        except ConnectionError:
            return False
        return asked != b""


@contextmanager
def cut_off(host: Host) -> Iterator[None]:
    """Take a host off its network within the block: it goes without a word."""
    host.ip("link set eth0 down")
    try:
        yield
    finally:
        host.ip("link set eth0 up")
        host.ip("route replace default via 10.77.0.1")


class Forwarded:
    """A running nfmasq that forwards UDP and TCP to the servers in its file."""

    def __init__(self, masquerade: Masquerade, file: Path) -> None:
        self._file = file
        self.write(FIRST, SECOND)
        ports = ["--forward", f"udp:{PORT}", "--forward", f"tcp:{PORT}"]
        self.daemon = masquerade("--config", str(file), rules=ports)

    def write(self, *servers: str, port: int = PORT) -> None:
        listed = ", ".join(f'"{server}:{SERVED}"' for server in servers)
        self._file.write_text(
            "".join(
                f'[[forward]]\nlisten = "{protocol}:{port}"\nservers = [{listed}]\n{CHECK}'
                for protocol in ("udp", "tcp")
            )
        )

    def reload(self, *servers: str, port: int = PORT) -> None:
        self.write(*servers, port=port)
        self.daemon.ask("reload")

    def drain(self, server: str) -> None:
        for protocol in ("udp", "tcp"):
            name = f"{protocol}:{PORT}", f"{server}:{SERVED}"
            self.daemon.ask("servers", *name, "--weight", "0")

    def is_down(self, server: str) -> bool:
        rows = request(self.daemon.control, "servers")
        states = {row["state"] for row in rows if row["server"] == f"{server}:{SERVED}"}
        return states == {"down"}

    @property
    def given_up(self) -> float:
        return figure(self.daemon, "nfmasq_entries_ended_total", reason="server")


@pytest.fixture
def forwarded(masquerade: Masquerade, tmp_path: Path) -> Forwarded:
    return Forwarded(masquerade, tmp_path / "nfmasq.toml")


@pytest.fixture
def servers(lab: Lab) -> Iterator[None]:
    with closing(Server(lab.inside[0])), closing(Server(lab.inside[1])):
        yield


@pytest.fixture
def client(lab: Lab) -> Iterator[socket]:
    """Open a UDP socket of an outside host that keeps its port."""
    with lab.outside[0].socket(AF_INET, SOCK_DGRAM) as client:
        client.bind(("", CLIENTS_OWN))
        client.settimeout(PATIENCE)
        yield client


def answer(client: socket) -> str:
    """Ask by a datagram; returns the server that answers."""
    client.sendto(b"who?", (GATEWAY, PORT))
    said, sender = client.recvfrom(100)
    assert sender == (GATEWAY, PORT)
    return said.decode()


def other(server: str) -> str:
    return SECOND if server == FIRST else FIRST


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("how", ["drained", "removed", "dead"])
def test_a_udp_client_with_a_fixed_port_is_given_another_server(
    lab: Lab, forwarded: Forwarded, client: socket, stack: ExitStack, how: str
) -> None:
    before = answer(client)
    assert {answer(client) for _ in range(3)} == {before}
    if how == "drained":
        forwarded.drain(before)
    elif how == "removed":
        forwarded.reload(other(before))
    else:
        (host,) = (host for host in lab.inside if host.address == before)
        stack.enter_context(cut_off(host))
        assert eventually(lambda: forwarded.is_down(before))
    assert {answer(client) for _ in range(3)} == {other(before)}
    assert forwarded.given_up == 1


@pytest.mark.usefixtures("servers")
def test_a_udp_client_of_a_port_that_is_forwarded_no_more_reaches_nobody(
    forwarded: Forwarded, client: socket
) -> None:
    answer(client)
    forwarded.reload(FIRST, SECOND, port=PORT + 1)
    client.settimeout(BRIEFLY)
    with pytest.raises((TimeoutError, ConnectionRefusedError)):
        answer(client)
    assert entries(forwarded.daemon, protocol="udp") == []


@contextmanager
def greeted(host: Host) -> Iterator[tuple[socket, str]]:
    """Connect from the client's own port; yields the connection and the server at its other end.

    The connection ends without a word.
    """
    with host.socket(AF_INET, SOCK_STREAM) as connection:
        connection.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        connection.bind((host.address, CLIENTS_OWN))
        connection.settimeout(PATIENCE)
        connection.connect((GATEWAY, PORT))
        yield connection, connection.recv(100).decode()
        connection.setsockopt(IPPROTO_TCP, TCP_REPAIR, 1)


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("how", ["removed", "dead"])
def test_a_tcp_client_that_uses_its_port_again_is_given_another_server(
    lab: Lab, forwarded: Forwarded, stack: ExitStack, how: str
) -> None:
    """Neither end has said that the first connection is over."""
    with greeted(lab.outside[0]) as (_, before):
        (host,) = (host for host in lab.inside if host.address == before)
    stack.enter_context(cut_off(host))
    if how == "removed":
        forwarded.reload(other(before))
    else:
        assert eventually(lambda: forwarded.is_down(before))
    (entry,) = entries(forwarded.daemon, protocol="tcp", dport=CLIENTS_OWN)
    assert (entry["saddr"], entry["state"]) == (before, "ESTABLISHED")
    with greeted(lab.outside[0]) as (_, after):
        assert after == other(before)
    assert forwarded.given_up == 1


@pytest.mark.usefixtures("servers")
def test_a_connection_goes_on_with_a_server_that_was_taken_out(
    lab: Lab, forwarded: Forwarded
) -> None:
    with greeted(lab.outside[0]) as (connection, before):
        forwarded.drain(before)
        forwarded.reload(other(before))
        connection.sendall(b"again")
        assert connection.recv(100).decode() == before
    assert forwarded.given_up == 0
