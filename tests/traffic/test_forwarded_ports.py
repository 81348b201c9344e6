"""Forwarded ports: clients outside reach servers inside, at the gateway's address."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from socket import AF_INET, IPPROTO_RAW, SO_REUSEADDR, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM, SOL_SOCKET

import pytest

from nfmasq.lab import Daemon, Host, Lab
from tests.packets import SYN, tcp
from tests.traffic.clients import BRIEFLY, PATIENCE
from tests.traffic.observed import entries, eventually
from tests.traffic.servers import ECHO_PORT, Visitor, WebServer, udp_echo, web_server

GATEWAY, SECOND_ADDRESS = "198.51.100.2", "198.51.100.3"
LISTENED = f"http://{GATEWAY}:8080"
LARGE = 5_000_000  # bytes

Masquerade = Callable[..., Daemon]


@pytest.fixture
def web(lab: Lab) -> Iterator[WebServer]:
    """Run a Web server on the first inside host."""
    with web_server(lab.inside[0]) as web:
        web.files["/"] = b"Hello from the inside."
        yield web


@pytest.fixture
def forwarded(masquerade: Masquerade, web: WebServer) -> Daemon:
    """Masquerade, with TCP port 8080 forwarded to the Web server."""
    return masquerade("--forward", "tcp:8080=10.77.0.11:80", rules=["--forward", "tcp:8080"])


def fetch(host: Host, url: str = LISTENED, *options: str | Path) -> str:
    return host.run(["curl", "-sSf", "--max-time", "50", *options, url]).stdout


def fails(host: Host, url: str = LISTENED) -> bool:
    line = ["curl", "-sS", "--max-time", "2", url]
    return host.run(line, check=False).returncode != 0


@contextmanager
def second_address(lab: Lab) -> Iterator[None]:
    """Give the gateway one more address within the block."""
    lab.gateway.ip(f"address add {SECOND_ADDRESS}/24 dev wan")
    try:
        yield
    finally:
        lab.gateway.ip(f"address del {SECOND_ADDRESS}/24 dev wan")


def echoed(client: Host, to: Visitor, text: bytes) -> Visitor:
    """Verify that a datagram comes back from its destination; returns the client's endpoint."""
    with client.socket(AF_INET, SOCK_DGRAM) as opened:
        opened.bind((client.address, 0))
        own: Visitor = opened.getsockname()
        opened.sendto(text, to)
        assert opened.recvfrom(65535) == (text, to)
        return own


# -- what the server and the client see -----------------------------------------------


def test_the_server_sees_the_clients_own_address_and_port(
    lab: Lab, forwarded: Daemon, web: WebServer
) -> None:
    client = lab.outside[0]
    done = fetch(client, LISTENED, "-w", " %{local_port}")
    text, _, port = done.rpartition(" ")
    assert text == "Hello from the inside."
    assert web.visitors == [(client.address, int(port))]
    (entry,) = entries(forwarded, mport=8080)
    assert (entry["saddr"], entry["sport"]) == ("10.77.0.11", 80)
    assert (entry["maddr"], entry["daddr"]) == (GATEWAY, client.address)
    assert "OUTSIDE" in entry["flags"]


@pytest.mark.usefixtures("forwarded")
def test_large_files_arrive_as_they_were_sent_in_both_directions(
    lab: Lab, web: WebServer, tmp_path: Path
) -> None:
    web.files["/large"] = os.urandom(LARGE)
    fetch(lab.outside[0], f"{LISTENED}/large", "-o", tmp_path / "large")
    received = (tmp_path / "large").read_bytes()
    assert sha256(received).digest() == sha256(web.files["/large"]).digest()
    fetch(lab.outside[0], f"{LISTENED}/back", "-T", tmp_path / "large")
    assert sha256(web.files["/back"]).digest() == sha256(received).digest()


@pytest.mark.usefixtures("forwarded", "web")
def test_no_inside_address_is_seen_outside(lab: Lab) -> None:
    client = lab.outside[0]
    with (
        lab.capture(client, "eth0", "net 10.77.0.0/24") as leaked,
        lab.capture(client, "eth0", f"src {GATEWAY} and tcp src port 8080") as answers,
    ):
        fetch(client)
    assert leaked == []
    assert answers


def test_a_port_on_which_no_server_listens_is_closed_to_the_client(
    lab: Lab, masquerade: Masquerade
) -> None:
    masquerade("--forward", "tcp:8080=10.77.0.12:80", rules=["--forward", "tcp:8080"])
    with (
        lab.outside[0].socket(AF_INET, SOCK_STREAM) as client,
        pytest.raises(ConnectionRefusedError),
    ):
        client.connect((GATEWAY, 8080))


def test_ports_of_a_range_lead_to_those_of_the_server(lab: Lab, masquerade: Masquerade) -> None:
    masquerade(
        *("--forward", "tcp:8000-8002=10.77.0.11:9000-9002"),
        rules=["--forward", "tcp:8000-8002"],
    )
    for offset in range(3):
        with (
            lab.inside[0].socket(AF_INET, SOCK_STREAM) as listener,
            lab.outside[0].socket(AF_INET, SOCK_STREAM) as client,
        ):
            listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            listener.bind(("", 9000 + offset))
            listener.listen()
            client.connect((GATEWAY, 8000 + offset))
            accepted, visitor = listener.accept()
            with accepted:
                assert visitor == client.getsockname()


@pytest.mark.parametrize("size", [1, 1472, 3000, 65507])
def test_datagrams_come_and_are_answered(lab: Lab, masquerade: Masquerade, size: int) -> None:
    masquerade("--forward", f"udp:7007=10.77.0.11:{ECHO_PORT}", rules=["--forward", "udp:7007"])
    with udp_echo(lab.inside[0]) as visitors:
        own = echoed(lab.outside[0], (GATEWAY, 7007), b"x" * size)
        assert visitors == [own]


def test_servers_on_one_port_of_two_addresses(lab: Lab, masquerade: Masquerade) -> None:
    """Both answer from the address that the client asked, whichever the kernel would pick."""
    with ExitStack() as stack:
        stack.enter_context(second_address(lab))
        for host, name in zip(lab.inside, (b"first", b"second"), strict=False):
            stack.enter_context(web_server(host)).files["/"] = name
        masquerade(
            *("--forward", f"tcp:{GATEWAY}:80=10.77.0.11:80"),
            *("--forward", f"tcp:{SECOND_ADDRESS}:80=10.77.0.12:80"),
            rules=["--forward", "tcp:80"],
        )
        for client in lab.outside:
            assert fetch(client, f"http://{GATEWAY}/") == "first"
            assert fetch(client, f"http://{SECOND_ADDRESS}/") == "second"


def test_a_forward_without_an_address_is_on_all_addresses(
    lab: Lab, forwarded: Daemon, web: WebServer
) -> None:
    with second_address(lab):
        for address in (GATEWAY, SECOND_ADDRESS):
            for _ in range(2):  # the second time nfmasq has surely heard of the address
                fetch(
                    lab.outside[0], f"http://{address}:8080/", "--retry", "3", "--retry-all-errors"
                )


def test_a_server_opens_connections_of_its_own_like_any_host(lab: Lab, forwarded: Daemon) -> None:
    with web_server(lab.outside[1]) as elsewhere:
        elsewhere.files["/"] = b"Hello from the outside."
        fetch(lab.outside[0])
        assert fetch(lab.inside[0], elsewhere.url) == "Hello from the outside."
        ((address, port),) = elsewhere.visitors
        assert address == GATEWAY
        assert 61000 <= port <= 65095


def test_path_mtu_discovery_of_an_upload_from_outside(
    lab: Lab, forwarded: Daemon, web: WebServer, tmp_path: Path
) -> None:
    """The gateway says that the inside is narrow, and quotes what the client has sent."""
    (tmp_path / "text").write_bytes(b"Path MTU discovery.\n" * 50_000)
    client = lab.outside[0]
    lab.gateway.ip("link set lan mtu 1200")
    try:
        with lab.capture(client, "eth0", "icmp[0] == 3 and icmp[1] == 4") as told:
            fetch(client, f"{LISTENED}/text", "-T", tmp_path / "text")
    finally:
        lab.gateway.ip("link set lan mtu 1500")
        client.ip("route flush cache")
    assert told
    assert web.files["/text"] == (tmp_path / "text").read_bytes()


# -- from the inside ----------------------------------------------------------------------


@pytest.mark.usefixtures("forwarded")
@pytest.mark.parametrize("host", [0, 1], ids=["the server itself", "its neighbour"])
def test_an_inside_host_reaches_the_server_by_the_outside_address(
    lab: Lab, web: WebServer, host: int, tmp_path: Path
) -> None:
    web.files["/large"] = os.urandom(LARGE)
    fetch(lab.inside[host], f"{LISTENED}/large", "-o", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == web.files["/large"]
    ((address, port),) = web.visitors
    assert address == GATEWAY
    assert 61000 <= port <= 65095


def test_an_inside_host_reaches_a_server_on_one_address_by_that_address(
    lab: Lab, masquerade: Masquerade, web: WebServer
) -> None:
    with second_address(lab):
        masquerade(
            *("--forward", f"tcp:{SECOND_ADDRESS}:80=10.77.0.11:80"),
            rules=["--forward", "tcp:80"],
        )
        assert fetch(lab.inside[1], f"http://{SECOND_ADDRESS}/") == "Hello from the inside."
        with web_server(lab.gateway) as own:
            own.files["/"] = b"Hello from the gateway."
            assert fetch(lab.inside[1], f"http://{GATEWAY}/") == "Hello from the gateway."


def test_a_forwarded_port_stays_the_gateways_own_on_its_inside_address(
    lab: Lab, masquerade: Masquerade, web: WebServer
) -> None:
    masquerade("--forward", "tcp:80=10.77.0.11:80", rules=["--forward", "tcp:80"])
    with web_server(lab.gateway, "10.77.0.1") as own:
        own.files["/"] = b"Hello from the gateway."
        assert fetch(lab.inside[1], "http://10.77.0.1/") == "Hello from the gateway."
        assert fetch(lab.inside[1], f"http://{GATEWAY}/") == "Hello from the inside."


# -- beside others ----------------------------------------------------------------------


FIREWALL = """\
*filter
:INPUT ACCEPT
:FORWARD DROP
:OUTPUT ACCEPT
-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A FORWARD -m conntrack --ctstate INVALID -j DROP
-A FORWARD -i wan -d 10.77.0.11 -p tcp --dport 80 -m conntrack --ctstate NEW -j ACCEPT
COMMIT
"""


@pytest.mark.usefixtures("web")
def test_a_stateful_firewall_decides_by_the_servers_own_address(
    lab: Lab, masquerade: Masquerade
) -> None:
    masquerade(
        *("--forward", "tcp:8080=10.77.0.11:80"),
        *("--forward", "tcp:8081=10.77.0.12:80"),
        rules=["--forward", "tcp:8080-8081"],
    )
    # Connection tracking does not see what is forwarded directly (docs/flow-cache.md).
    lab.gateway.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", 1)
    lab.gateway.run(["iptables-restore"], input=FIREWALL)
    try:
        with web_server(lab.inside[1]):
            assert fetch(lab.outside[0]) == "Hello from the inside."
            assert fails(lab.outside[0], f"http://{GATEWAY}:8081/")
    finally:
        lab.gateway.run(["iptables-restore"], input="*filter\nCOMMIT\n")
        lab.gateway.run(["conntrack", "-F"])


DNAT = ["PREROUTING", "-i", "wan", "-p", "tcp", "--dport", "9090"]


@pytest.mark.usefixtures("forwarded", "web")
def test_what_another_program_forwards_by_the_kernel_goes_on_beside_it(
    lab: Lab, stack: ExitStack
) -> None:
    """Docker and miniupnpd load such rules."""
    foreign = stack.enter_context(web_server(lab.inside[1]))
    foreign.files["/"] = b"Hello from a container."
    rule = [*DNAT, "-j", "DNAT", "--to-destination", "10.77.0.12:80"]
    stack.callback(lab.gateway.run, ["conntrack", "-F"])
    stack.callback(lab.gateway.run, ["iptables", "-t", "nat", "-F", "PREROUTING"])
    lab.gateway.run(["iptables", "-t", "nat", "-A", *rule])
    for _ in range(3):
        assert fetch(lab.outside[0], f"http://{GATEWAY}:9090/") == "Hello from a container."
        assert fetch(lab.outside[0]) == "Hello from the inside."


@pytest.mark.usefixtures("web")
def test_a_flood_of_syns_keeps_nobody_away(lab: Lab, masquerade: Masquerade) -> None:
    daemon = masquerade(
        *("--forward", "tcp:8080=10.77.0.11:80", "--max-entries", "100"),
        rules=["--forward", "tcp:8080"],
    )
    with lab.outside[1].socket(AF_INET, SOCK_RAW, IPPROTO_RAW) as flood:
        for n in range(1000):
            nobody = (f"100.64.{n // 250}.{n % 250 + 1}", 1024 + n)
            flood.sendto(tcp(nobody, (GATEWAY, 8080), SYN), (GATEWAY, 0))
            if n % 100 == 0:
                assert fetch(lab.outside[0]) == "Hello from the inside."
    assert fetch(lab.outside[0]) == "Hello from the inside."
    # A server may repeat the last segment of an earlier test's connection, which is an entry, too.
    made = [entry for entry in entries(daemon, protocol="tcp") if "OUTSIDE" in entry["flags"]]
    assert len(made) <= 50


# -- triggers -----------------------------------------------------------------------------

TRIGGER = """
[[trigger]]
outbound = "tcp:6112"
opens = "udp:27000-27001"
seconds = 1
"""


def called_back(caller: Host, callee: Host, port: int, patience: float = PATIENCE) -> bool:
    """Say whether a datagram from outside to a port of the gateway reaches an inside host.

    The answer of the inside host has to come back, too.
    """
    with caller.socket(AF_INET, SOCK_DGRAM) as sender, callee.socket(AF_INET, SOCK_DGRAM) as there:
        there.bind(("", port))
        there.settimeout(patience)
        sender.sendto(b"player two", (GATEWAY, port))
        try:
            said, visitor = there.recvfrom(100)
        except TimeoutError:
            return False
        there.sendto(said, visitor)
        return sender.recvfrom(100) == (b"player two", (GATEWAY, port))


def test_a_game_opens_ports_for_those_who_call_back(
    lab: Lab, masquerade: Masquerade, tmp_path: Path
) -> None:
    """The ports are open while the player is connected to the outside server, and for a second."""
    file = tmp_path / "nfmasq.toml"
    file.write_text(TRIGGER)
    daemon = masquerade("--config", str(file), rules=["--forward", "udp:27000-27001"])
    player, neighbour = lab.inside
    game, other = lab.outside
    assert not called_back(other, player, 27000, BRIEFLY)
    with game.socket(AF_INET, SOCK_STREAM) as listener:
        listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        listener.bind(("", 6112))
        listener.listen()
        with player.socket(AF_INET, SOCK_STREAM) as connection:
            connection.connect((game.address, 6112))
            assert called_back(other, player, 27000)
            assert called_back(game, player, 27001)
            assert not called_back(other, neighbour, 27001, BRIEFLY)
            with neighbour.socket(AF_INET, SOCK_STREAM) as second:
                second.connect((game.address, 6112))
                assert not called_back(game, neighbour, 27000, BRIEFLY)
    daemon.ask("flush")
    assert eventually(lambda: not called_back(other, player, 27000, BRIEFLY))
