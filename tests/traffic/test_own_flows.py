"""The gateway's own questions and pings, from ports that the masquerade uses for inside hosts.

Both ask the same server from the same port of the gateway's address, and each gets its answer.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from socket import AF_INET, SOCK_DGRAM, SOCK_STREAM, socket

import pytest

from nfmasq.lab import Daemon, Host, Lab
from tests.traffic.clients import PATIENCE
from tests.traffic.observed import entries
from tests.traffic.servers import ECHO_PORT, WEB_PORT, udp_echo, web_server

GATEWAY = "198.51.100.2"
FEW_PORTS = "61000-61007"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def asker(stack: ExitStack, host: Host, server: Host, port: int = 0) -> socket:
    """Return a UDP socket that is connected to the echo server of another host."""
    client = stack.enter_context(host.socket(AF_INET, SOCK_DGRAM))
    if port:
        client.bind((GATEWAY, port))
    client.connect((server.address, ECHO_PORT))
    client.settimeout(PATIENCE)
    return client


def exchange(client: socket, text: bytes) -> bool:
    client.send(text)
    return client.recv(100) == text


@pytest.mark.parametrize("first", ["inside", "gateway"])
def test_both_ask_one_server_from_one_port(lab: Lab, stack: ExitStack, first: str) -> None:
    with lab.masquerading(ports=FEW_PORTS) as daemon, udp_echo(lab.outside[0]) as visitors:
        inside = asker(stack, lab.inside[0], lab.outside[0])
        if first == "inside":
            assert exchange(inside, b"inside")
            (entry,) = entries(daemon)
            mine = asker(stack, lab.gateway, lab.outside[0], entry["mport"])
        else:
            mine = asker(stack, lab.gateway, lab.outside[0], 61000)
        for _ in range(5):
            assert exchange(mine, b"gateway")
            assert exchange(inside, b"inside")
        assert len({*visitors}) == 2
        assert {address for address, _ in visitors} == {GATEWAY}


def test_both_ping_one_host_with_one_identifier(lab: Lab) -> None:
    with lab.masquerading(ports=FEW_PORTS) as daemon:
        server = lab.outside[0].address
        ping = lab.inside[0].popen(["ping", "-q", "-i", "0.2", "-w", "60", server], stdout=-1)
        (entry,) = entries_of_icmp(daemon)
        told = lab.gateway.run(["ping", "-e", str(entry["mport"]), "-c", "5", "-i", "0.2", server])
        assert " 5 received" in told.stdout
        ping.send_signal(signal.SIGINT)
        output, _ = ping.communicate()
        assert " 0% packet loss" in output, output
        assert len(entries(daemon, protocol="icmp")) == 2


def entries_of_icmp(daemon: Daemon) -> list[dict[str, object]]:
    deadline = time.monotonic() + PATIENCE
    while not (found := entries(daemon, protocol="icmp")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_resolver_on_the_gateway_that_has_but_ports_of_the_masquerade(
    lab: Lab, stack: ExitStack
) -> None:
    """Inside hosts ask the resolver outside themselves, from the same few ports."""
    resolver = lab.outside[0]
    dnsmasq = ["dnsmasq", "--keep-in-foreground", "--user=root", "--pid-file="]
    dnsmasq += ["--conf-file=/dev/null", "--no-resolv", "--no-hosts"]
    outside = resolver.popen([*dnsmasq, "--host-record=www.example.net,203.0.113.80"])
    resolver.wait_until_bound(53, "udp")
    ports = ["--min-port=61000", "--max-port=61007", "--cache-size=0"]
    forwarder = lab.gateway.popen([*dnsmasq, *ports, f"--server={resolver.address}"])
    lab.gateway.wait_until_bound(53, "udp")
    with lab.masquerading(ports=FEW_PORTS):
        for server in [resolver.address, "10.77.0.1"] * 10:
            question = ["dig", f"@{server}", "+tries=1", "+time=20", "+short", "www.example.net"]
            assert lab.inside[0].run(question).stdout == "203.0.113.80\n"
    for process in (outside, forwarder):
        process.terminate()
        process.wait()


def test_a_connection_of_the_gateway_from_a_port_of_the_masquerade(
    lab: Lab, stack: ExitStack
) -> None:
    """One connection keeps its port, and another has to leave by another port."""
    with lab.masquerading(ports=FEW_PORTS) as daemon, web_server(lab.outside[0]) as web:
        web.files["/data"] = bytes(3_000_000)
        lab.inside[0].run(["curl", "-sS", "-o", "/dev/null", f"{web.url}/data"])
        (entry,) = entries(daemon, protocol="tcp")
        for port in (61007, entry["mport"]):
            mine = stack.enter_context(lab.gateway.socket(AF_INET, SOCK_STREAM))
            mine.bind((GATEWAY, port))
            mine.connect((lab.outside[0].address, WEB_PORT))
            mine.sendall(b"GET /data HTTP/1.0\r\n\r\n")
            received = 0
            while piece := mine.recv(65536):
                received += len(piece)
            assert received > 3_000_000
        own = [e for e in entries(daemon, protocol="tcp") if e["saddr"] == GATEWAY]
        assert sorted(e["sport"] == e["mport"] for e in own) == [False, True]
