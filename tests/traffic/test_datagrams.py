"""Datagrams of any size come back whole: UDP echo and ping, far beyond what fits into one frame."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from nfmasq.lab import Host, Lab
from tests.traffic.conftest import taking
from tests.traffic.servers import ECHO_PORT, Visitor, udp_echo

data_path = taking("queue", "no-gso", "routed", "direct")


@pytest.fixture(scope="module", autouse=True)
def _masquerading(lab: Lab) -> Iterator[None]:
    with lab.masquerading():
        yield


@pytest.fixture(scope="module")
def visitors(lab: Lab) -> Iterator[list[Visitor]]:
    """Run a UDP echo server outside for the whole module; yields the list of its visitors."""
    with udp_echo(lab.outside[0]) as visitors:
        yield visitors


def udp(host: Host) -> socket.socket:
    return host.socket(socket.AF_INET, socket.SOCK_DGRAM)


@pytest.mark.usefixtures("visitors")
@pytest.mark.parametrize("size", [100, 1472, 1473, 3000, 8000, 30_000, 65_507])
def test_udp_echo(lab: Lab, size: int) -> None:
    with udp(lab.inside[0]) as client:
        for _ in range(3):
            sent = os.urandom(size)
            client.sendto(sent, (lab.outside[0].address, ECHO_PORT))
            received, server = client.recvfrom(65535)
            assert server == (lab.outside[0].address, ECHO_PORT)
            assert received == sent


@pytest.mark.parametrize("size", [56, 60_000])
def test_ping(lab: Lab, size: int) -> None:
    command = ["ping", "-c", "3", "-i", "0.1", "-W", "10", "-s", str(size)]
    told = lab.inside[0].run([*command, lab.outside[0].address]).stdout
    assert "3 received, 0% packet loss" in told
    assert f"{size + 8} bytes from {lab.outside[0].address}" in told


def test_hosts_with_the_same_source_port_get_each_its_own_answer(
    lab: Lab, visitors: list[Visitor]
) -> None:
    visitors.clear()
    with udp(lab.inside[0]) as one, udp(lab.inside[1]) as two:
        for client in (one, two):
            client.bind(("", 40_000))
            client.sendto(str(client.fileno()).encode(), (lab.outside[0].address, ECHO_PORT))
        for client in (two, one):
            assert client.recv(100) == str(client.fileno()).encode()
    assert {address for address, _ in visitors} == {"198.51.100.2"}
    assert len({port for _, port in visitors}) == 2
