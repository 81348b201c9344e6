"""NAT behaviour discovery (RFC 5780) finds what is configured, in all combinations.

Server and client are coturn's. The server has two addresses and two ports; the client speaks UDP.
Over TCP a server cannot answer from another address, so there is no discovery of the filtering. And
Debian has no client for TCP, so the test itself asks the server about the mapping.
"""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from socket import AF_INET, SO_LINGER, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET
from struct import pack, unpack_from

import pytest

from nfmasq.engine.table.mapping import ADDRESS_AND_PORT_DEPENDENT, BEHAVIOURS, ENDPOINT_INDEPENDENT
from nfmasq.lab import Daemon, Host, Lab
from tests.packets import Endpoint
from tests.programs import program
from tests.traffic.observed import eventually

FIRST, OTHER = "203.0.113.11", "203.0.113.99"
PORT, OTHER_PORT = 3478, 3479
ENDPOINTS = [(FIRST, PORT), (OTHER, PORT), (OTHER, OTHER_PORT)]

BINDING_REQUEST, XOR_MAPPED_ADDRESS, MAGIC_COOKIE = 1, 0x20, 0x2112A442  # RFC 8489

Masquerade = Callable[..., Daemon]


@pytest.fixture(scope="module", autouse=True)
def _server(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run a STUN server outside, whose files are all in a folder of its own."""
    host, folder = lab.outside[0], tmp_path_factory.mktemp("coturn")
    host.ip(f"address add {OTHER}/24 dev eth0")
    only_stun = ["--stun-only", "--no-auth", "--no-tls", "--no-dtls", "--no-cli"]
    files = [f"--pidfile={folder}/pid", f"--userdb={folder}/db", f"--log-file={folder}/log"]
    turnserver = [program("turnserver", "coturn"), "-n", "-L", FIRST, "-L", OTHER]
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with host.popen([*turnserver, *only_stun, *files, "--simple-log"], **nowhere) as server:
        assert eventually(lambda: serves(host))
        yield
        server.terminate()
    host.ip(f"address delete {OTHER}/24 dev eth0")


def serves(host: Host) -> bool:
    """Say whether the server has all its sockets."""
    bound = [host.run(["ss", "-l", "-n", kind]).stdout for kind in ("--udp", "--tcp")]
    return all(f" {address}:{port} " in each for each in bound for address, port in ENDPOINTS)


def discovered(host: Host, *behaviours: str) -> str:
    """Return what the client finds out: "-m" the mapping, "-f" the filtering, "-H" hairpinning."""
    return host.run([program("turnutils_natdiscovery", "coturn"), *behaviours, FIRST]).stdout


def behaviour(found: str, kind: str) -> str:
    """Return the behaviour that a discovery of the "Mapping" or the "Filtering" has found."""
    match = re.search(rf"^NAT with (.*) {kind}!$", found, re.MULTILINE)
    assert match, found
    return match[1].lower().replace(" ", "-")


@pytest.mark.parametrize("filtering", BEHAVIOURS)
@pytest.mark.parametrize("mapping", BEHAVIOURS)
def test_discovery_agrees_with_the_configured_mapping_and_filtering(
    lab: Lab, masquerade: Masquerade, mapping: str, filtering: str
) -> None:
    masquerade("--mapping", mapping, "--filtering", filtering)
    found = discovered(lab.inside[0], "-m", "-f")
    assert behaviour(found, "Mapping") == mapping
    assert behaviour(found, "Filtering") == filtering


def test_discovery_by_datagrams_in_fragments_finds_the_same(
    lab: Lab, masquerade: Masquerade
) -> None:
    masquerade("--filtering", ENDPOINT_INDEPENDENT)
    with lab.capture(lab.outside[0], "eth0", "ip[6:2] & 0x3fff != 0") as seen:
        found = discovered(lab.inside[0], "-m", "-f", "-P")
    assert seen
    assert behaviour(found, "Mapping") == ENDPOINT_INDEPENDENT
    assert behaviour(found, "Filtering") == ENDPOINT_INDEPENDENT


@pytest.mark.parametrize("filtering", BEHAVIOURS)
@pytest.mark.parametrize("mapping", BEHAVIOURS)
def test_discovery_finds_hairpinning(
    lab: Lab, masquerade: Masquerade, mapping: str, filtering: str
) -> None:
    """The client sends from another port of its host to its own outside endpoint."""
    masquerade("--mapping", mapping, "--filtering", filtering)
    assert "a successful hairpinning" in discovered(lab.inside[0], "-H")


@pytest.mark.parametrize("mapping", BEHAVIOURS)
def test_over_tcp_the_server_sees_the_configured_mapping(
    lab: Lab, masquerade: Masquerade, mapping: str
) -> None:
    masquerade("--mapping", mapping)
    with ExitStack() as stack:
        first, other_address, other_port = (
            mapped_address(stack.enter_context(connection(lab.inside[0], server)))
            for server in ENDPOINTS
        )
    assert {address for address, _ in (first, other_address, other_port)} == {"198.51.100.2"}
    assert (first == other_address) == (mapping == ENDPOINT_INDEPENDENT)
    assert (other_address == other_port) == (mapping != ADDRESS_AND_PORT_DEPENDENT)


def connection(host: Host, server: Endpoint) -> socket.socket:
    """Connect to the server, always from one port. The connection ends with an RST, at once."""
    client = host.socket(AF_INET, SOCK_STREAM)
    client.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    client.setsockopt(SOL_SOCKET, SO_LINGER, pack("@ii", 1, 0))
    client.bind((host.address, 5000))
    client.connect(server)
    return client


def mapped_address(client: socket.socket) -> Endpoint:
    """Return where the server sees the client, by a binding request and its answer (RFC 8489)."""
    client.sendall(pack("!HHI12s", BINDING_REQUEST, 0, MAGIC_COOKIE, b"transaction!"))
    answer = client.recv(1500)
    at = 20
    while unpack_from("!H", answer, at) != (XOR_MAPPED_ADDRESS,):
        at += 4 + unpack_from("!H", answer, at + 2)[0]
    port, address = unpack_from("!HI", answer, at + 6)
    return socket.inet_ntoa(pack("!I", address ^ MAGIC_COOKIE)), port ^ MAGIC_COOKIE >> 16
