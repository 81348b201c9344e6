"""The gateway's outside address is replaced while connections are open, as DHCP and PPP do it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from socket import SOCK_DGRAM, SOCK_STREAM, socket

import pytest

from nfmasq.daemon.addresses import RoutedAddresses
from nfmasq.lab import Daemon, Host, Lab
from tests.packets import number
from tests.traffic.clients import BRIEFLY, answered, connected, echoed
from tests.traffic.observed import entries, eventually, figure
from tests.traffic.servers import ECHO_PORT, TCP_PORT, Visitor

OLD, NEW = "198.51.100.2", "198.51.100.3"
SILENT_PORT = 9
RESETS = "tcp[tcpflags] & tcp-rst != 0"

Masquerade = Callable[..., Daemon]


@pytest.fixture
def client(lab: Lab, stack: ExitStack) -> Callable[..., socket]:
    """Return a function that makes connected sockets of an inside host."""

    def connect(kind: int, port: int, server: Host = lab.outside[0]) -> socket:
        return stack.enter_context(connected(lab.inside[0], kind, server, port))

    return connect


@pytest.fixture(autouse=True)
def _the_old_address_again(lab: Lab) -> Iterator[None]:
    yield
    take_away_address(lab)
    give_address(lab, OLD)


def take_away_address(lab: Lab) -> None:
    lab.gateway.ip("address flush dev wan")


def give_address(lab: Lab, address: str) -> None:
    """Give the gateway an address, and the default route, which was lost with the last address."""
    lab.gateway.ip(f"address add {address}/24 dev wan")
    give_default_route(lab)


def give_default_route(lab: Lab) -> None:
    lab.gateway.ip("route add default via 198.51.100.1")


def replace_address(lab: Lab, daemon: Daemon) -> None:
    """Replace the old address by the new one, and wait until nfmasq knows."""
    take_away_address(lab)
    give_address(lab, NEW)
    assert eventually(lambda: f"wan has the addresses: {NEW}" in daemon.log.read_text())


def ended(daemon: Daemon) -> float:
    return figure(daemon, "nfmasq_entries_ended_total", reason="address")


def test_a_tcp_connection_is_reset_at_once_and_the_next_one_works(
    lab: Lab, masquerade: Masquerade, listener: socket, client: Callable[..., socket]
) -> None:
    """Though neither end sends anything: the inside end just waits for data."""
    daemon = masquerade()
    ours, theirs = client(SOCK_STREAM, TCP_PORT), listener.accept()[0]
    with theirs:
        assert answered(ours, theirs)

        replace_address(lab, daemon)
        with pytest.raises(ConnectionResetError):
            ours.recv(100)
        assert ended(daemon) == 1
        assert eventually(lambda: "198.51.100.2 is gone" in daemon.log.read_text())

    another = client(SOCK_STREAM, TCP_PORT)
    server, visitor = listener.accept()
    with server:
        assert answered(another, server)
    assert visitor[0] == NEW


def test_an_idle_connection_is_reset_where_the_default_route_comes_late(
    lab: Lab, masquerade: Masquerade, listener: socket, client: Callable[..., socket]
) -> None:
    """DHCP sets the route late. Until then the kernel drops the inside host's answer to a probe."""
    daemon = masquerade()
    ours, theirs = client(SOCK_STREAM, TCP_PORT), listener.accept()[0]
    with theirs:
        assert answered(ours, theirs)
        take_away_address(lab)
        lab.gateway.ip(f"address add {NEW}/24 dev wan")
        assert eventually(lambda: ended(daemon) == 1)
        time.sleep(0.5)
        give_default_route(lab)
        with pytest.raises(ConnectionResetError):
            ours.recv(100)


def test_a_tcp_connection_that_sends_is_reset_too(
    lab: Lab, masquerade: Masquerade, listener: socket, client: Callable[..., socket]
) -> None:
    masquerade()
    ours, theirs = client(SOCK_STREAM, TCP_PORT), listener.accept()[0]
    with theirs:
        assert answered(ours, theirs)
        take_away_address(lab)
        ours.sendall(b"while there is no address")
        give_address(lab, NEW)
        with pytest.raises(ConnectionResetError):
            ours.recv(100)


def test_without_resets_the_connection_just_ends(
    lab: Lab, masquerade: Masquerade, listener: socket, client: Callable[..., socket]
) -> None:
    daemon = masquerade("--no-reset-on-address-change")
    ours, theirs = client(SOCK_STREAM, TCP_PORT), listener.accept()[0]
    with theirs, lab.capture(lab.inside[0], "eth0", RESETS) as resets:
        assert answered(ours, theirs)
        replace_address(lab, daemon)
        assert eventually(lambda: ended(daemon) == 1)
        ours.settimeout(BRIEFLY)
        with pytest.raises(TimeoutError):
            ours.recv(100)
    assert not resets


def test_udp_goes_on_from_the_new_address(
    lab: Lab, masquerade: Masquerade, visitors: list[Visitor], client: Callable[..., socket]
) -> None:
    """An answered session ends and another begins; an unanswered session goes on."""
    daemon = masquerade()
    talking, calling = client(SOCK_DGRAM, ECHO_PORT), client(SOCK_DGRAM, SILENT_PORT)
    lab.outside[0].run(["iptables", "-A", "INPUT", "-p", "udp", "--dport", "9", "-j", "DROP"])
    assert echoed(talking)
    calling.send(b"anyone?")
    assert eventually(lambda: len(entries(daemon, maddr=OLD)) == 2)

    replace_address(lab, daemon)
    assert eventually(lambda: ended(daemon) == 1)
    (left,) = entries(daemon)
    assert left["dport"] == SILENT_PORT
    created = figure(daemon, "nfmasq_entries_created_total")

    calling.send(b"anyone now?")
    assert eventually(lambda: [e["maddr"] for e in entries(daemon)] == [NEW])
    assert figure(daemon, "nfmasq_entries_created_total") == created
    assert echoed(talking)
    assert visitors[-1][0] == NEW


def test_an_address_that_goes_and_comes_back_keeps_its_connections(
    lab: Lab,
    masquerade: Masquerade,
    listener: socket,
    visitors: list[Visitor],
    client: Callable[..., socket],
) -> None:
    daemon = masquerade()
    ours, theirs = client(SOCK_STREAM, TCP_PORT), listener.accept()[0]
    talking = client(SOCK_DGRAM, ECHO_PORT)
    with theirs:
        assert answered(ours, theirs)
        assert echoed(talking)
        take_away_address(lab)
        assert eventually(lambda: "wan has the addresses: none" in daemon.log.read_text())
        give_address(lab, OLD)
        assert eventually(lambda: f"wan has the addresses: {OLD}" in daemon.log.read_text())
        assert answered(ours, theirs)
        assert echoed(talking)
    assert ended(daemon) == 0
    assert len(set(visitors)) == 1


def test_a_second_address_ends_nothing(
    lab: Lab, masquerade: Masquerade, listener: socket, client: Callable[..., socket]
) -> None:
    daemon = masquerade()
    ours, theirs = client(SOCK_STREAM, TCP_PORT), listener.accept()[0]
    with theirs:
        lab.gateway.ip(f"address add {NEW}/24 dev wan")
        assert eventually(lambda: f"{OLD}, {NEW}" in daemon.log.read_text())
        time.sleep(0.2)
        assert answered(ours, theirs)
    assert ended(daemon) == 0


def test_addresses_are_reported_from_the_start_on_though_there_are_none_yet(lab: Lab) -> None:
    host = lab.outside[1]
    reports: list[Mapping[str, Sequence[int]]] = []
    host.ip("address flush dev eth0")
    followed = host.call(RoutedAddresses, reports.append)
    try:
        at_the_start = list(reports)
    finally:
        host.ip(f"address add {host.address}/24 dev eth0")
        host.ip("route add 198.51.100.0/24 via 203.0.113.1")
    try:
        assert at_the_start == [{}]
        assert eventually(lambda: reports[1:] == [{"eth0": (number(host.address),)}])
    finally:
        followed.close()
