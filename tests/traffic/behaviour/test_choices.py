"""What settings other than the defaults change on the wire, and what they do not change."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nfmasq.lab import Daemon
from tests.packets import (
    ACK,
    FIN,
    SYN,
    UNREACHABLE,
    checksums_are_right,
    destination_address,
    icmp,
    internet_checksum,
    query,
    quoted,
    source,
    source_address,
    tcp,
    udp,
)
from tests.traffic.behaviour.stations import CLIENT, GATEWAY, SERVER, Station, Stations, is_like
from tests.traffic.observed import entries

Masquerade = Callable[..., Daemon]

OPEN = ("--filtering", "endpoint-independent")


def left(daemon: Daemon) -> float:
    """Return the seconds that the only entry has left."""
    (entry,) = entries(daemon)
    return float(entry["expires"])


@pytest.fixture(autouse=True)
def _silence(net: Stations) -> None:
    for station in (*net.inside, *net.outside):
        station.forget()


# ---- endpoint-independent filtering -------------------------------------------------------------


def test_an_open_udp_port_is_open_to_every_stranger(
    net: Stations, masquerade: Masquerade, inside: Station, outside: Station, stranger: Station
) -> None:
    masquerade(*OPEN)
    mapped = source(net.passed(udp(CLIENT, SERVER), inside, outside))
    caller = stranger.port(7777)
    assert is_like(net.passed(udp(caller, mapped), stranger, inside), udp(caller, CLIENT))
    assert is_like(net.passed(udp(CLIENT, caller), inside, stranger), udp(mapped, caller))


def test_an_open_tcp_port_takes_connections_of_every_stranger(
    net: Stations, masquerade: Masquerade, inside: Station, outside: Station, stranger: Station
) -> None:
    masquerade(*OPEN)
    mapped = source(net.passed(tcp(CLIENT, SERVER, SYN), inside, outside))
    caller = stranger.port(7777)
    for flags, answer in ((SYN, SYN | ACK), (ACK, ACK), (FIN | ACK, ACK), (ACK, FIN | ACK)):
        seen = net.passed(tcp(caller, mapped, flags), stranger, inside)
        assert is_like(seen, tcp(caller, CLIENT, flags))
        seen = net.passed(tcp(CLIENT, caller, answer), inside, stranger)
        assert is_like(seen, tcp(mapped, caller, answer))


def test_both_sides_of_a_connection_may_open_at_once_the_outside_first(
    net: Stations, masquerade: Masquerade, inside: Station, outside: Station, stranger: Station
) -> None:
    masquerade(*OPEN)
    mapped = source(net.passed(tcp(CLIENT, SERVER, SYN), inside, outside))
    caller = stranger.port(7777)
    net.passed(tcp(caller, mapped, SYN), stranger, inside)
    for flags in (SYN, SYN | ACK, ACK):
        seen = net.passed(tcp(CLIENT, caller, flags), inside, stranger)
        assert is_like(seen, tcp(mapped, caller, flags))


def test_a_port_that_is_open_over_one_protocol_is_closed_over_the_others(
    net: Stations, masquerade: Masquerade, inside: Station, outside: Station, stranger: Station
) -> None:
    masquerade(*OPEN)
    over_udp = source(net.passed(udp(CLIENT, SERVER), inside, outside))
    over_tcp = source(net.passed(tcp(CLIENT, SERVER, SYN), inside, outside))
    stranger.send(tcp(stranger.port(7777), over_udp, SYN))
    stranger.send(udp(stranger.port(7777), over_tcp))
    stranger.send(icmp(stranger.address, GATEWAY, 0, 0, over_udp[1].to_bytes(4, "big")))
    assert net.heard_nothing(inside)


BY_PROTOCOL = """
[filtering]
udp = "endpoint-independent"
tcp = "address-and-port-dependent"
"""


def test_filtering_may_differ_by_protocol(
    net: Stations, masquerade: Masquerade, inside: Station, outside: Station, tmp_path: Path
) -> None:
    file = tmp_path / "nfmasq.toml"
    file.write_text(BY_PROTOCOL)
    masquerade("--config", str(file))
    over_udp = source(net.passed(udp(CLIENT, SERVER), inside, outside))
    over_tcp = source(net.passed(tcp(CLIENT, SERVER, SYN), inside, outside))
    other = outside.port(SERVER[1] + 1)
    outside.send(tcp(other, over_tcp, SYN))
    assert is_like(net.passed(udp(other, over_udp), outside, inside), udp(other, CLIENT))


# ---- the same in every case ---------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["sequential", "preserve", "random"])
def test_mapping_and_filtering_are_the_same_when_source_ports_collide(
    net: Stations, masquerade: Masquerade, outside: Station, stranger: Station, selection: str
) -> None:
    """With `preserve` the second host cannot have the port that the first host has kept."""
    masquerade("--port-selection", selection)
    seen = set()
    for host in net.inside:
        client = host.port(62_000)
        mapped = {
            source(net.passed(udp(client, server.port(port)), host, server))
            for server, port in ((outside, 53), (outside, 5000), (stranger, 53))
        }
        assert len(mapped) == 1
        seen |= mapped
        (mapped_to,) = mapped
        for server in (outside, stranger):
            answer = net.passed(udp(server.port(9), mapped_to), server, host)
            assert is_like(answer, udp(server.port(9), client))
    assert len(seen) == len(net.inside)


@pytest.mark.parametrize("when_ports_run_out", ["overlap", "refuse"])
def test_mapping_and_filtering_are_the_same_when_no_port_is_left(
    net: Stations,
    masquerade: Masquerade,
    outside: Station,
    stranger: Station,
    when_ports_run_out: str,
) -> None:
    """A host that has a port keeps it, and no stranger gets in by it."""
    masquerade("--when-ports-run-out", when_ports_run_out, ports="61000-61001")
    clients = [host.port(40_000) for host in net.inside]
    mapped = [
        source(net.passed(udp(client, SERVER), host, outside))
        for client, host in zip(clients, net.inside, strict=True)
    ]
    refused = net.passed(udp(net.inside[0].port(40_001), SERVER), net.inside[0], net.inside[0])
    assert refused[20:22] == bytes([UNREACHABLE, 13])
    for client, host, port in zip(clients, net.inside, mapped, strict=True):
        for server in (SERVER, outside.port(53)):
            assert is_like(net.passed(udp(client, server), host, outside), udp(port, server))
        stranger.send(udp(stranger.port(53), port))
        assert is_like(net.passed(udp(SERVER, port), outside, host), udp(SERVER, client))


# ---- timeouts -----------------------------------------------------------------------------------

TIMEOUTS = """
[timeouts]
tcp-syn-sent = 1000
tcp-established = 8000
tcp-fin-wait = 9000
tcp-time-wait = 2000
"""


def test_opening_established_and_closing_have_timeouts_of_their_own(
    net: Stations, masquerade: Masquerade, inside: Station, outside: Station, tmp_path: Path
) -> None:
    file = tmp_path / "nfmasq.toml"
    file.write_text(TIMEOUTS)
    daemon = masquerade("--config", str(file))
    given = []

    def note() -> None:
        given.append(round(left(daemon), -2))

    mapped = source(net.passed(tcp(CLIENT, SERVER, SYN), inside, outside))
    note()
    net.passed(tcp(SERVER, mapped, SYN | ACK), outside, inside)
    net.passed(tcp(CLIENT, SERVER, ACK), inside, outside)
    note()
    net.passed(tcp(CLIENT, SERVER, FIN | ACK), inside, outside)
    note()
    net.passed(tcp(SERVER, mapped, FIN | ACK), outside, inside)
    note()
    assert given == [1000, 8000, 9000, 2000]


@pytest.mark.parametrize("refresh", [True, False], ids=["inbound refresh", "outbound only"])
def test_a_packet_from_outside_restarts_the_timer_by_choice(
    net: Stations, masquerade: Masquerade, inside: Station, outside: Station, refresh: bool
) -> None:
    daemon = masquerade("--inbound-refresh" if refresh else "--no-inbound-refresh")
    mapped = source(net.passed(udp(CLIENT, SERVER), inside, outside))
    time.sleep(1)
    net.passed(udp(SERVER, mapped), outside, inside)
    assert (left(daemon) > 299.5) == refresh
    net.passed(udp(CLIENT, SERVER), inside, outside)
    assert left(daemon) > 299.5


# ---- sessions that cannot be had ----------------------------------------------------------------

ONE_ENTRY = ("--max-entries-per-host", "1")
LOW_DELAY, INTERNETWORK_CONTROL = 0x10, 0xC0


@pytest.mark.parametrize(
    "packet",
    [udp(CLIENT, SERVER, b"hello"), tcp(CLIENT, SERVER, SYN), query(CLIENT, SERVER[0])],
    ids=["udp", "tcp", "icmp"],
)
def test_who_cannot_have_a_session_is_told_that_it_is_prohibited(
    net: Stations, masquerade: Masquerade, inside: Station, outside: Station, packet: bytes
) -> None:
    """The error comes from the gateway, with the packet's type of service (RFC 1812, 4.3.2.5)."""
    masquerade(*ONE_ENTRY)
    net.passed(udp(inside.port(9), outside.port(9)), inside, outside)
    packet = with_type_of_service(packet, LOW_DELAY)
    inside.send(packet)
    told = inside.receive()
    assert (told[20], told[21]) == (UNREACHABLE, 13)
    assert (source_address(told), destination_address(told)) == ("10.77.0.1", CLIENT[0])
    assert told[1] == LOW_DELAY | INTERNETWORK_CONTROL
    assert is_like(quoted(told), packet)
    assert checksums_are_right(told)


def with_type_of_service(packet: bytes, service: int) -> bytes:
    header = packet[:1] + bytes([service]) + packet[2:10] + bytes(2) + packet[12:20]
    checksum = internet_checksum(header).to_bytes(2, "big")
    return header[:10] + checksum + header[12:] + packet[20:]


def test_one_port_serves_many_destinations_where_the_mapping_depends_on_them(
    net: Stations, masquerade: Masquerade, outside: Station, stranger: Station
) -> None:
    """Two inside hosts do not share the port to one destination: their answers would look alike."""
    masquerade("--mapping", "address-and-port-dependent", ports="61000-61000")
    first, second = net.inside
    sessions = [
        (first, outside.port(5300)),
        (first, outside.port(5400)),
        (second, stranger.port(5300)),
    ]
    for host, server in sessions:
        station = outside if server[0] == outside.address else stranger
        seen = net.passed(udp(host.port(4000), server), host, station)
        assert is_like(seen, udp((GATEWAY, 61_000), server))
    for host, server in sessions:
        station = outside if server[0] == outside.address else stranger
        seen = net.passed(udp(server, (GATEWAY, 61_000)), station, host)
        assert is_like(seen, udp(server, host.port(4000)))
    second.send(udp(second.port(4000), outside.port(5300)))
    assert second.receive()[20:22] == bytes([UNREACHABLE, 13])
