"""A second uplink: the way out moves to another interface while both stay up.

Each provider lets only its own addresses out (BCP 38), so what leaves by the wrong one is lost.
Some tests run with the kernel's MASQUERADE, too, in the same lab.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from socket import AF_INET, SOCK_DGRAM, SOCK_STREAM, socket

import pytest

from nfmasq.lab import Daemon, Lab
from tests.traffic.clients import answered, connected, echoed
from tests.traffic.observed import entries, eventually, figure
from tests.traffic.servers import ECHO_PORT, TCP_PORT, Visitor, udp_echo, web_server

FIRST, SECOND = "198.51.100.2", "192.0.2.2"
ROUTERS = {FIRST: "198.51.100.1", SECOND: "192.0.2.1"}
INTERFACES = {FIRST: "wan", SECOND: "wan2"}
RULES = ["--outside", "wan2"]
RESET = 56  # curl's exit status

Masquerade = Callable[..., Daemon]


@pytest.fixture(scope="module")
def lab(data_path: tuple[str, ...]) -> Iterator[Lab]:
    with Lab(inside=1, outside=2, options=data_path) as lab:
        gateway, router = lab.gateway, lab.router
        gateway.ip(f"link add wan2 type veth peer name wan2 netns {router.namespace}")
        for host, address in ((gateway, SECOND), (router, ROUTERS[SECOND])):
            host.ip(f"address add {address}/24 dev wan2")
            host.ip("link set wan2 up")
        for host in lab.outside:
            host.ip(f"route add 192.0.2.0/24 via {router.interfaces['net']}")
        gateway.sysctl("net.ipv4.conf.all.rp_filter", 0)
        for interface in ("wan", "wan2"):
            gateway.sysctl(f"net.ipv4.conf.{interface}.rp_filter", 0)
        gateway.run(["ping", "-q", "-c", "1", "-i", "0.05", "-w", "20", ROUTERS[SECOND]])
        yield lab


@pytest.fixture(autouse=True)
def _by_the_first_uplink(lab: Lab) -> Iterator[None]:
    go_by(lab, FIRST)
    yield
    go_by(lab, FIRST)


def go_by(lab: Lab, address: str) -> None:
    """Move the default route to the uplink with this address."""
    lab.gateway.ip(f"route replace default via {ROUTERS[address]}")


@pytest.fixture
def providers(lab: Lab) -> Iterator[None]:
    """Have each provider let only its own addresses out."""
    rules = [
        ["FORWARD", "-i", interface, "!", "-s", f"{address}/24", "-j", "DROP"]
        for address, interface in INTERFACES.items()
    ]
    with ExitStack() as stack:
        for rule in rules:
            lab.router.run(["iptables", "-A", *rule])
            stack.callback(lab.router.run, ["iptables", "-D", *rule])
        yield


@contextmanager
def kernel(lab: Lab) -> Iterator[None]:
    """Have the kernel masquerade within the block."""
    with ExitStack() as stack:
        for interface in INTERFACES.values():
            rule = ["POSTROUTING", "-o", interface, "-j", "MASQUERADE"]
            lab.gateway.run(["iptables", "-t", "nat", "-A", *rule])
            stack.callback(lab.gateway.run, ["iptables", "-t", "nat", "-D", *rule])
        yield


@pytest.fixture(params=["kernel", "nfmasq"])
def masqueraded(lab: Lab, providers: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """Masquerade, the kernel or nfmasq; yields which of them does it."""
    by = lab.masquerading(rules=RULES) if request.param == "nfmasq" else kernel(lab)
    with by:
        yield request.param


@pytest.fixture
def client(lab: Lab, stack: ExitStack) -> Callable[..., socket]:
    """Return a function that makes connected sockets of the inside host."""

    def connect(kind: int, port: int) -> socket:
        return stack.enter_context(connected(lab.inside[0], kind, lab.outside[0], port))

    return connect


def test_a_client_that_never_pauses_goes_on_at_once(
    lab: Lab, masqueraded: str, visitors: list[Visitor], client: Callable[..., socket]
) -> None:
    """Back and forth. The kernel loses the packet by which it finds out, nfmasq none."""
    ours = client(SOCK_DGRAM, ECHO_PORT)
    for address in (FIRST, SECOND, FIRST, SECOND):
        go_by(lab, address)
        if masqueraded == "kernel" and visitors:
            ours.send(b"lost")
        for _ in range(20):
            assert echoed(ours)
        assert visitors[-1][0] == address


def test_a_tcp_client_is_reset_by_what_it_sends_and_the_next_connection_works(
    lab: Lab, masqueraded: str, listener: socket, client: Callable[..., socket]
) -> None:
    """The kernel lets a stray segment out, so that the server refuses it; nfmasq answers itself."""
    ours, theirs = client(SOCK_STREAM, TCP_PORT), listener.accept()[0]
    with theirs:
        assert answered(ours, theirs)
        go_by(lab, SECOND)
        ours.sendall(b"is anyone there?")
        with pytest.raises(ConnectionResetError):
            ours.recv(100)
    another = client(SOCK_STREAM, TCP_PORT)
    server, visitor = listener.accept()
    with server:
        assert answered(another, server)
    assert visitor[0] == SECOND


def test_a_download_ends_at_once_and_the_next_one_works(
    lab: Lab, masquerade: Masquerade, providers: None
) -> None:
    """Though the client only acknowledges. Behind the kernel's MASQUERADE it waits in vain."""
    masquerade(rules=RULES)
    with web_server(lab.outside[0]) as web:
        web.files["/large"] = bytes(1 << 24)
        line = ["curl", "-sS", "-o", "/dev/null", "--max-time", "50", f"{web.url}/large"]
        slow = lab.inside[0].popen([*line, "--limit-rate", "2M"], stderr=subprocess.PIPE)
        assert eventually(lambda: bool(web.visitors))
        go_by(lab, SECOND)
        assert slow.wait(60) == RESET
        assert lab.inside[0].run(line).returncode == 0
    assert [address for address, _ in web.visitors] == [FIRST, SECOND]


def test_a_ping_goes_on(lab: Lab, masqueraded: str) -> None:
    ping = ["ping", "-i", "0.02", "-c", "40", lab.outside[0].address]
    process = lab.inside[0].popen(ping, stdout=subprocess.PIPE)
    assert process.stdout
    for line in process.stdout:
        if "icmp_seq=5 " in line:
            go_by(lab, SECOND)
        if "received" in line:
            lost = 40 - int(line.split()[3])
    assert lost <= (1 if masqueraded == "kernel" else 0)


def test_it_is_counted_and_leaves_nothing_behind(
    lab: Lab,
    masquerade: Masquerade,
    providers: None,
    visitors: list[Visitor],
    client: Callable[..., socket],
) -> None:
    daemon = masquerade(rules=RULES)
    free = figure(daemon, "nfmasq_ports_free", protocol="udp")
    ours = client(SOCK_DGRAM, ECHO_PORT)
    for n in range(11):
        go_by(lab, (FIRST, SECOND)[n % 2])
        assert echoed(ours)
    assert [entry["maddr"] for entry in entries(daemon)] == [FIRST]
    assert figure(daemon, "nfmasq_ports_free", protocol="udp") == free - 1
    assert figure(daemon, "nfmasq_entries_ended_total", reason="address") == 10


def test_without_resets_the_server_refuses_what_the_client_goes_on_with(
    lab: Lab,
    masquerade: Masquerade,
    providers: None,
    listener: socket,
    client: Callable[..., socket],
) -> None:
    # Of connections from ports that others have used the server may remember something.
    masquerade("--no-reset-on-address-change", rules=RULES, ports="62000-62099")
    ours, theirs = client(SOCK_STREAM, TCP_PORT), listener.accept()[0]
    with theirs:
        assert answered(ours, theirs)
        go_by(lab, SECOND)
        ours.sendall(b"is anyone there?")
        with pytest.raises(ConnectionResetError):
            ours.recv(100)


def test_a_client_of_a_forwarded_port_is_answered_by_the_address_that_it_asked(
    lab: Lab, masquerade: Masquerade
) -> None:
    """Over UDP and TCP. The answers leave by either uplink, as the gateway routes them."""
    forwards = [f"{protocol}:8080=10.77.0.11:7" for protocol in ("udp", "tcp")]
    rules = [*RULES, "--forward", "tcp:8080", "--forward", "udp:8080"]
    options = [option for forward in forwards for option in ("--forward", forward)]
    daemon = masquerade(*options, rules=rules)
    with udp_echo(lab.inside[0]), lab.inside[0].socket(AF_INET, SOCK_STREAM) as listener:
        listener.bind(("", ECHO_PORT))
        listener.listen()
        for asked in (FIRST, SECOND):
            with (
                lab.outside[0].socket(AF_INET, SOCK_DGRAM) as datagrams,
                lab.outside[0].socket(AF_INET, SOCK_STREAM) as stream,
            ):
                datagrams.connect((asked, 8080))
                stream.connect((asked, 8080))
                with listener.accept()[0] as server:
                    for by in (FIRST, SECOND, FIRST):
                        go_by(lab, by)
                        assert echoed(datagrams)
                        assert answered(stream, server)
    assert figure(daemon, "nfmasq_entries_ended_total", reason="address") == 0


def test_flows_that_are_routed_by_mark_stay_on_their_uplinks(
    lab: Lab,
    masquerade: Masquerade,
    providers: None,
    stack: ExitStack,
    data_path: tuple[str, ...],
) -> None:
    """One inside endpoint sends by both uplinks at once; then one of its flows is moved.

    With the flow cache direct, a known flow passes by the rule that marks it.
    """
    daemon = masquerade(rules=RULES)
    gateway, (first, second) = lab.gateway, lab.outside
    mark = ["PREROUTING", "-i", "lan", "-d", second.address, "-j", "MARK", "--set-mark", "2"]
    gateway.run(["iptables", "-t", "mangle", "-A", *mark])
    stack.callback(gateway.run, ["iptables", "-t", "mangle", "-D", *mark])
    gateway.ip(f"route add default via {ROUTERS[SECOND]} table 2")
    gateway.ip("rule add fwmark 2 table 2")
    stack.callback(gateway.ip, "rule delete fwmark 2 table 2")
    visits = {host: stack.enter_context(udp_echo(host)) for host in (first, second)}
    ours = stack.enter_context(lab.inside[0].socket(AF_INET, SOCK_DGRAM))

    def converse() -> dict[str, str]:
        """Exchange datagrams with both hosts by turns; returns who was seen as whom."""
        for _ in range(10):
            for host in (first, second):
                ours.sendto(b"hello", (host.address, ECHO_PORT))
                assert ours.recvfrom(100) == (b"hello", (host.address, ECHO_PORT))
        return {host.name: visits[host][-1][0] for host in (first, second)}

    assert converse() == {"outside1": FIRST, "outside2": SECOND}
    assert figure(daemon, "nfmasq_entries_ended_total", reason="address") == 0
    go_by(lab, SECOND)
    assert converse() == {"outside1": SECOND, "outside2": SECOND}
    assert figure(daemon, "nfmasq_entries_ended_total", reason="address") == 1
    gateway.ip(f"route replace default via {ROUTERS[FIRST]} table 2")
    if "--flow-cache=direct" in data_path:
        assert converse() == {"outside1": SECOND, "outside2": SECOND}
        return
    assert converse() == {"outside1": SECOND, "outside2": FIRST}
    assert figure(daemon, "nfmasq_entries_ended_total", reason="address") == 2


def test_an_interface_s_other_address_moves_no_session(
    lab: Lab,
    masquerade: Masquerade,
    visitors: list[Visitor],
    client: Callable[..., socket],
    stack: ExitStack,
) -> None:
    """New sessions get the address that the kernel prefers by now; the old ones stay, as theirs."""
    other = "198.51.100.77"
    lab.gateway.ip(f"address add {other}/24 dev wan")
    stack.callback(lab.gateway.ip, f"address delete {other}/24 dev wan")
    daemon = masquerade(rules=RULES)
    before = client(SOCK_DGRAM, ECHO_PORT)
    assert echoed(before)
    lab.gateway.ip(f"route replace default via {ROUTERS[FIRST]} src {other}")

    def arrives_as(ours: socket) -> str:
        assert echoed(ours)
        return visitors[-1][0]

    assert eventually(lambda: arrives_as(client(SOCK_DGRAM, ECHO_PORT)) == other)
    assert arrives_as(before) == FIRST
    assert figure(daemon, "nfmasq_entries_ended_total", reason="address") == 0
