"""Unreachable: the ICMP error reaches the program that has sent the packet, inside or outside."""

from __future__ import annotations

from collections.abc import Iterator
from socket import AF_INET, IPPROTO_IP, SOCK_DGRAM, SOCK_STREAM, socket

import pytest

from nfmasq.lab import Lab
from tests.packets import quoted, source_address

CLOSED_PORT = 9
IP_RECVERR = 11
"""The option by which a program asks to hear of errors that may pass (ip(7))."""

NOBODY = "198.51.100.77"
"""An address on the gateway's own outside network, where no host is."""


@pytest.fixture(scope="module", autouse=True)
def _masquerading(lab: Lab) -> Iterator[None]:
    with lab.masquerading():
        yield


@pytest.fixture
def _impatient(lab: Lab) -> None:
    """Have the gateway find out within a moment that a neighbour does not answer."""
    lab.gateway.sysctl("net.ipv4.neigh.wan.retrans_time_ms", 50)


def test_a_closed_port_outside_refuses_an_inside_program(lab: Lab) -> None:
    with lab.inside[0].socket(AF_INET, SOCK_DGRAM) as client:
        client.connect((lab.outside[0].address, CLOSED_PORT))
        client.send(b"anyone?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(100)


def test_a_program_that_is_gone_inside_refuses_an_outside_one(lab: Lab) -> None:
    """The error that the outside host gets has no inside address anywhere."""
    with lab.outside[0].socket(AF_INET, SOCK_DGRAM) as server:
        server.bind((lab.outside[0].address, 4000))
        with lab.inside[0].socket(AF_INET, SOCK_DGRAM) as client:
            client.sendto(b"and gone", server.getsockname())
            _, visitor = server.recvfrom(100)
        server.connect(visitor)
        with lab.capture(lab.outside[0], "eth0", "icmp") as errors:
            server.send(b"still there?")
            with pytest.raises(ConnectionRefusedError):
                server.recv(100)
    (error,) = errors
    assert source_address(error.data) == "198.51.100.2"
    assert bytes([10, 77, 0]) not in error.data


def ask(client: socket) -> None:
    client.connect((NOBODY, CLOSED_PORT))
    client.send(b"anyone?")
    client.recv(100)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("kind", [SOCK_DGRAM, SOCK_STREAM], ids=["udp", "tcp"])
def test_a_host_that_the_gateway_cannot_reach(lab: Lab, kind: int) -> None:
    """The gateway finds out after the rewriting, so its error quotes a packet "of its own"."""
    with (
        lab.capture(lab.inside[0], "eth0", "icmp") as errors,
        lab.inside[0].socket(AF_INET, kind) as client,
    ):
        client.setsockopt(IPPROTO_IP, IP_RECVERR, 1)
        with pytest.raises(OSError, match="No route to host"):
            ask(client)
    assert errors
    for error in errors:
        assert source_address(quoted(error.data)) == lab.inside[0].address


@pytest.mark.usefixtures("_impatient")
def test_ping_is_told_of_a_host_that_the_gateway_cannot_reach(lab: Lab) -> None:
    ping = ["ping", "-c", "1", "-W", "10", NOBODY]
    assert "Destination Host Unreachable" in lab.inside[0].run(ping, check=False).stdout
