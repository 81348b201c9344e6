"""UDP through the masquerade as it is by default, packet by packet (RFC 4787, RFC 7857)."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from nfmasq.lab import Daemon, Lab
from tests.packets import (
    PARAMETER_PROBLEM,
    SOURCE_QUENCH,
    SYN,
    TIME_EXCEEDED,
    UNREACHABLE,
    Endpoint,
    checksums_are_right,
    destination,
    error,
    fragmentable,
    identification,
    quoted,
    source,
    source_address,
    tcp,
    udp,
)
from tests.traffic.behaviour.stations import (
    CLIENT,
    GATEWAY,
    SERVER,
    Station,
    Stations,
    is_like,
)
from tests.traffic.observed import entries

FIVE_MINUTES = 300

NARROW = 1280
"""Bytes that a packet may have on the gateway's outside link, in tests that make it narrow."""


def expires(daemon: Daemon) -> float:
    """Return the seconds that the only entry of UDP has left."""
    (entry,) = entries(daemon, protocol="udp")
    return float(entry["expires"])


def a_second_later(daemon: Daemon) -> float:
    """Wait a second; returns the seconds that the only entry of UDP has left then."""
    time.sleep(1)
    left = expires(daemon)
    assert left < FIVE_MINUTES - 0.5
    return left


# ---- mapping and filtering ----------------------------------------------------------------------


def test_one_inside_endpoint_is_the_same_to_every_outside_endpoint(
    net: Stations, inside: Station, mapped: Endpoint
) -> None:
    assert mapped[0] == GATEWAY
    for outside in net.outside:
        for port in (53, 5000):
            seen = net.passed(udp(CLIENT, outside.port(port), b"hello"), inside, outside)
            assert is_like(seen, udp(mapped, outside.port(port), b"hello"))


def test_two_inside_hosts_never_share_a_port(
    net: Stations, outside: Station, mapped: Endpoint
) -> None:
    other = net.inside[1]
    seen = net.passed(udp(other.port(CLIENT[1]), SERVER, b"hello"), other, outside)
    assert source(seen) != mapped
    answer = udp(SERVER, source(seen), b"answer")
    assert is_like(
        net.passed(answer, outside, other), udp(SERVER, other.port(CLIENT[1]), b"answer")
    )


def test_an_outside_host_that_was_sent_to_may_answer_from_any_port(
    net: Stations, inside: Station, outside: Station, mapped: Endpoint
) -> None:
    for port in (5000, 5001, 53):
        seen = net.passed(udp(outside.port(port), mapped, b"answer"), outside, inside)
        assert is_like(seen, udp(outside.port(port), CLIENT, b"answer"))


def test_a_stranger_gets_nothing_in(
    net: Stations, inside: Station, stranger: Station, mapped: Endpoint
) -> None:
    stranger.send(udp(stranger.port(5000), mapped, b"knock"))
    assert net.heard_nothing(inside)


@pytest.mark.usefixtures("daemon")
@pytest.mark.parametrize("port", [69, 137, 5060])
def test_no_payload_is_looked_into(
    net: Stations, inside: Station, outside: Station, port: int
) -> None:
    """Not even on the ports of protocols whose payloads name addresses."""
    names = b"INVITE sip:me@10.77.0.11:40000\r\nc=IN IP4 10.77.0.11\r\n"
    seen = net.passed(udp(CLIENT, outside.port(port), names), inside, outside)
    assert is_like(seen, udp(source(seen), outside.port(port), names))


# ---- timers -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mapped")
def test_a_session_lives_for_five_minutes_without_a_packet(daemon: Daemon) -> None:
    assert FIVE_MINUTES - 2 < expires(daemon) <= FIVE_MINUTES


@pytest.mark.usefixtures("mapped")
def test_a_packet_from_inside_restarts_the_timer(
    net: Stations, daemon: Daemon, inside: Station, outside: Station
) -> None:
    aged = a_second_later(daemon)
    net.passed(udp(CLIENT, SERVER), inside, outside)
    assert expires(daemon) > aged + 0.5


def test_a_packet_from_outside_restarts_the_timer(
    net: Stations, daemon: Daemon, inside: Station, outside: Station, mapped: Endpoint
) -> None:
    aged = a_second_later(daemon)
    net.passed(udp(SERVER, mapped), outside, inside)
    assert expires(daemon) > aged + 0.5


def test_a_packet_that_the_filtering_drops_does_not_restart_the_timer(
    net: Stations, daemon: Daemon, inside: Station, stranger: Station, mapped: Endpoint
) -> None:
    aged = a_second_later(daemon)
    stranger.send(udp(stranger.port(5000), mapped, b"knock"))
    assert net.heard_nothing(inside)
    assert expires(daemon) <= aged


# ---- ICMP errors --------------------------------------------------------------------------------

ERRORS = [
    *((UNREACHABLE, code) for code in range(16)),
    (TIME_EXCEEDED, 0),
    (TIME_EXCEEDED, 1),
    (PARAMETER_PROBLEM, 0),
    (SOURCE_QUENCH, 0),
]


def test_no_icmp_error_ends_a_mapping_or_restarts_its_timer(
    net: Stations, daemon: Daemon, inside: Station, outside: Station, mapped: Endpoint
) -> None:
    sent, answered = udp(mapped, SERVER), udp(SERVER, CLIENT)
    aged = a_second_later(daemon)
    for kind, code in ERRORS:
        outside.send(error(outside.address, GATEWAY, sent, kind, code))
        inside.send(error(inside.address, outside.address, answered, kind, code))
    net.settle()
    assert expires(daemon) <= aged
    assert is_like(net.passed(udp(SERVER, mapped), outside, inside), udp(SERVER, CLIENT))


def test_an_icmp_error_may_come_from_any_host(
    net: Stations, inside: Station, stranger: Station, mapped: Endpoint
) -> None:
    told = error(stranger.address, GATEWAY, udp(mapped, SERVER, b"hello"))
    seen = net.passed(told, stranger, inside)
    assert is_like(seen, error(stranger.address, inside.address, udp(CLIENT, SERVER, b"hello")))


# ---- packets larger than the outside link -------------------------------------------------------


@pytest.fixture
def _narrow(lab: Lab, daemon: Daemon) -> Iterator[None]:
    lab.gateway.ip(f"link set wan mtu {NARROW}")
    yield
    lab.gateway.ip("link set wan mtu 1500")


@pytest.mark.usefixtures("_narrow")
def test_who_sends_too_large_a_packet_that_must_not_be_fragmented_is_told(inside: Station) -> None:
    inside.send(udp(CLIENT, SERVER, bytes(NARROW)))
    told = inside.receive()
    assert (told[20], told[21]) == (UNREACHABLE, 4)
    assert int.from_bytes(told[26:28], "big") == NARROW
    assert source_address(told) == "10.77.0.1"
    assert (source(quoted(told)), destination(quoted(told))) == (CLIENT, SERVER)
    assert checksums_are_right(told)


@pytest.mark.usefixtures("_narrow")
def test_too_large_a_packet_that_may_be_fragmented_arrives_in_pieces_in_order(
    inside: Station, outside: Station
) -> None:
    payload = bytes(range(256)) * 5
    inside.send(fragmentable(udp(CLIENT, SERVER, payload)))
    first, last = outside.receive(), outside.receive()
    assert first[6:8] == b"\x20\x00"
    assert int.from_bytes(last[6:8], "big") * 8 == len(first) - 20
    assert first[4:6] == last[4:6]
    assert source_address(first) == source_address(last) == GATEWAY
    assert (first[20:] + last[20:])[8:] == payload


@pytest.mark.usefixtures("_narrow")
def test_pieces_of_two_hosts_packets_are_not_mixed_up(net: Stations, outside: Station) -> None:
    """Though both hosts chose the same identification."""
    pieces = []
    for host in net.inside:
        host.send(fragmentable(udp(host.port(4000), SERVER, host.address.encode() * 130)))
        pieces += [outside.receive(), outside.receive()]
    assert len({identification(piece) for piece in pieces}) == len(net.inside)
    for first, last in zip(pieces[::2], pieces[1::2], strict=True):
        assert identification(first) == identification(last)


# ---- other protocols ----------------------------------------------------------------------------


def test_a_mapping_of_udp_does_not_serve_tcp(
    net: Stations, inside: Station, outside: Station, mapped: Endpoint
) -> None:
    """TCP does not come in by the mapping, and the same inside endpoint gets another port for TCP.

    This test comes last: after six seconds the server is told that its SYN was not wanted.
    """
    outside.send(tcp(SERVER, mapped, SYN))
    assert net.heard_nothing(inside)
    outside.forget()
    assert source(net.passed(tcp(CLIENT, SERVER, SYN), inside, outside)) != mapped
    assert source(net.passed(udp(CLIENT, SERVER), inside, outside)) == mapped
