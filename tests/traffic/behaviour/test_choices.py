"""What other choices than the default change, packet by packet, and what they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nfmasq.lab import Daemon
from tests.packets import ACK, FIN, SYN, icmp, source, tcp, udp
from tests.traffic.behaviour.stations import CLIENT, GATEWAY, SERVER, Station, Stations, is_like
from tests.traffic.observed import entries

Masquerade = Callable[..., Daemon]

OPEN = ("--filtering", "endpoint-independent")


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


# ---- the same in every case ---------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["sequential", "preserve", "random"])
def test_mapping_and_filtering_are_the_same_when_source_ports_collide(
    net: Stations, masquerade: Masquerade, outside: Station, stranger: Station, selection: str
) -> None:
    """With `preserve` the second host cannot have the port that the first one has kept."""
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


def test_mapping_and_filtering_are_the_same_when_no_port_is_left(
    net: Stations, masquerade: Masquerade, outside: Station, stranger: Station
) -> None:
    """Who has a port keeps it and goes on by it; nobody else gets in by it, or is put on it."""
    masquerade(ports="61000-61001")
    clients = [host.port(40_000) for host in net.inside]
    mapped = [
        source(net.passed(udp(client, SERVER), host, outside))
        for client, host in zip(clients, net.inside, strict=True)
    ]
    net.inside[0].send(udp(net.inside[0].port(40_001), SERVER))
    for client, host, port in zip(clients, net.inside, mapped, strict=True):
        for flow in (SERVER, outside.port(53)):
            assert is_like(net.passed(udp(client, flow), host, outside), udp(port, flow))
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
        (entry,) = entries(daemon)
        given.append(round(entry["expires"], -2))

    mapped = source(net.passed(tcp(CLIENT, SERVER, SYN), inside, outside))
    note()
    net.passed(tcp(SERVER, mapped, SYN | ACK), outside, inside)
    note()
    net.passed(tcp(CLIENT, SERVER, FIN | ACK), inside, outside)
    note()
    net.passed(tcp(SERVER, mapped, FIN | ACK), outside, inside)
    note()
    assert given == [1000, 8000, 9000, 2000]
