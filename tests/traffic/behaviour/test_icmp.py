"""ICMP through the masquerade as it is by default, packet by packet (RFC 5508)."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from nfmasq.lab import Daemon
from tests.packets import (
    ECHO,
    INFORMATION,
    MASK,
    PARAMETER_PROBLEM,
    REDIRECT,
    SYN,
    TIME_EXCEEDED,
    TIMESTAMP,
    UNREACHABLE,
    checksums_are_right,
    cut,
    destination_address,
    error,
    header_checksum_is_right,
    header_length,
    icmp,
    internet_checksum,
    query,
    quoted,
    reply,
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

A_MINUTE = 60

NO_OPERATIONS = b"\x01\x01\x01\x00"
"""IP options that ask for nothing."""

ROUTER_SOLICITATION, PHOTURIS, EXPERIMENT = 10, 40, 253


def expires(daemon: Daemon) -> float:
    """Return the seconds that the only entry of ICMP has left."""
    (entry,) = entries(daemon, protocol="icmp")
    return float(entry["expires"])


# ---- queries ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("daemon")
@pytest.mark.parametrize("kind", [ECHO, TIMESTAMP, MASK], ids=["echo", "timestamp", "mask"])
def test_a_query_goes_out_and_its_reply_comes_back(
    net: Stations, inside: Station, outside: Station, kind: int
) -> None:
    seen = net.passed(query(CLIENT, outside.address, kind), inside, outside)
    assert is_like(seen, query(source(seen), outside.address, kind))
    assert source_address(seen) == GATEWAY
    answer_kind = kind + 1 if kind != ECHO else 0
    answer = net.passed(reply(outside.address, source(seen), answer_kind), outside, inside)
    assert is_like(answer, reply(outside.address, CLIENT, answer_kind))


@pytest.mark.usefixtures("daemon")
def test_one_identifier_is_the_same_to_every_outside_host(net: Stations, inside: Station) -> None:
    seen = [net.passed(query(CLIENT, host.address), inside, host) for host in net.outside]
    assert len({source(packet) for packet in seen}) == 1


@pytest.mark.usefixtures("daemon")
def test_two_inside_hosts_never_share_an_identifier(net: Stations, outside: Station) -> None:
    asked = [
        net.passed(query(host.port(77), outside.address), host, outside) for host in net.inside
    ]
    for host, packet in zip(net.inside, asked, strict=True):
        answer = net.passed(reply(outside.address, source(packet)), outside, host)
        assert is_like(answer, reply(outside.address, host.port(77)))


def test_a_query_s_session_lives_for_a_minute(
    net: Stations, daemon: Daemon, inside: Station, outside: Station
) -> None:
    net.passed(query(CLIENT, outside.address), inside, outside)
    assert A_MINUTE - 2 < expires(daemon) <= A_MINUTE


# ---- errors -------------------------------------------------------------------------------------


class Session:
    """A session: a packet of CLIENT and the answer of SERVER, each as inside and outside see it."""

    def __init__(
        self, net: Stations, question: Callable[..., bytes], answer: Callable[..., bytes]
    ) -> None:
        inside, outside = net.inside[0], net.outside[0]
        self.sent = question(CLIENT)
        self.left = net.passed(self.sent, inside, outside)
        self.came = answer(source(self.left))
        self.delivered = net.passed(self.came, outside, inside)


QUESTIONS: dict[str, tuple[Callable[..., bytes], Callable[..., bytes]]] = {
    "udp": (
        lambda client: udp(client, SERVER, b"question"),
        lambda client: udp(SERVER, client, b"answer"),
    ),
    "udp with IP options": (
        lambda client: udp(client, SERVER, b"question", options=NO_OPERATIONS),
        lambda client: udp(SERVER, client, b"answer", options=NO_OPERATIONS),
    ),
    "tcp": (
        lambda client: tcp(client, SERVER, SYN),
        lambda client: tcp(SERVER, client, SYN | 0x10),
    ),
    "icmp": (
        lambda client: query(client, SERVER[0]),
        lambda client: reply(SERVER[0], client),
    ),
}


@pytest.fixture(params=QUESTIONS)
def session(request: pytest.FixtureRequest, net: Stations, daemon: Daemon) -> Session:
    """Return a session; tests run once for each protocol."""
    return Session(net, *QUESTIONS[request.param])


@pytest.fixture
def udp_session(net: Stations, daemon: Daemon) -> Session:
    return Session(net, *QUESTIONS["udp"])


KINDS = [
    *((UNREACHABLE, code) for code in range(16)),
    (TIME_EXCEEDED, 0),
    (TIME_EXCEEDED, 1),
    (PARAMETER_PROBLEM, 0),
]


@pytest.mark.parametrize("quote", [cut, bytes], ids=["8 bytes quoted", "all quoted"])
def test_an_error_from_outside_quotes_what_the_inside_host_sent(
    net: Stations,
    inside: Station,
    stranger: Station,
    session: Session,
    quote: Callable[[bytes], bytes],
) -> None:
    told = error(stranger.address, GATEWAY, quote(session.left), UNREACHABLE, 1)
    seen = net.passed(told, stranger, inside)
    assert (source_address(seen), destination_address(seen)) == (stranger.address, CLIENT[0])
    assert is_like(quoted(seen), quote(session.sent))
    assert checksums_are_right(seen)


@pytest.mark.parametrize("quote", [cut, bytes], ids=["8 bytes quoted", "all quoted"])
def test_an_error_from_inside_quotes_what_the_outside_host_sent(
    net: Stations,
    inside: Station,
    outside: Station,
    session: Session,
    quote: Callable[[bytes], bytes],
) -> None:
    told = error(inside.address, outside.address, quote(session.delivered), UNREACHABLE, 1)
    seen = net.passed(told, inside, outside)
    assert (source_address(seen), destination_address(seen)) == (GATEWAY, SERVER[0])
    assert is_like(quoted(seen), quote(session.came))
    assert checksums_are_right(seen)


def test_type_and_code_of_an_error_stay_as_they_are(
    net: Stations, inside: Station, outside: Station, udp_session: Session
) -> None:
    for kind, code in KINDS:
        told = error(outside.address, GATEWAY, udp_session.left, kind, code)
        seen = net.passed(told, outside, inside)
        assert (seen[20], seen[21]) == (kind, code)
        told = error(inside.address, outside.address, udp_session.delivered, kind, code)
        seen = net.passed(told, inside, outside)
        assert (seen[20], seen[21]) == (kind, code)


def test_an_error_of_a_router_inside_comes_from_the_gateway(
    net: Stations, outside: Station, udp_session: Session
) -> None:
    router = net.inside[1]
    told = error(router.address, outside.address, udp_session.delivered, UNREACHABLE, 1)
    assert source_address(net.passed(told, router, outside)) == GATEWAY


def damaged(packet: bytes, at: int) -> bytes:
    return packet[:at] + bytes([packet[at] ^ 0x55]) + packet[at + 1 :]


def test_a_damaged_error_does_not_come_through(
    net: Stations, inside: Station, outside: Station, udp_session: Session
) -> None:
    outside.send(damaged(error(outside.address, GATEWAY, udp_session.left), 22))
    assert net.heard_nothing(inside)
    inside.send(damaged(error(inside.address, outside.address, udp_session.delivered), 22))
    assert net.heard_nothing(outside)


def test_an_error_that_quotes_a_damaged_header_does_not_come_through(
    net: Stations, inside: Station, outside: Station, udp_session: Session
) -> None:
    header_checksum = 10
    outside.send(error(outside.address, GATEWAY, damaged(udp_session.left, header_checksum)))
    assert net.heard_nothing(inside)
    quote = damaged(udp_session.delivered, header_checksum)
    inside.send(error(inside.address, outside.address, quote))
    assert net.heard_nothing(outside)


def test_the_payload_of_a_quoted_packet_may_be_damaged(
    net: Stations, inside: Station, outside: Station, udp_session: Session
) -> None:
    """Nobody verifies its transport checksum, which changes with the addresses and stays wrong."""
    quote = damaged(udp_session.left, len(udp_session.left) - 1)
    seen = net.passed(error(outside.address, GATEWAY, quote), outside, inside)
    assert is_like(quoted(seen), damaged(udp_session.sent, len(udp_session.sent) - 1))


def test_the_extensions_of_an_error_come_through(
    net: Stations, inside: Station, outside: Station, udp_session: Session
) -> None:
    """RFC 4884: the quote is padded to 128 bytes, before a structure with a checksum of its own."""
    label = b"\x00\x08\x01\x01\x12\x34\x51\x01"
    structure = b"\x20\x00\x00\x00" + label
    checksum = internet_checksum(structure).to_bytes(2, "big")
    extensions = structure[:2] + checksum + label

    def extended(quote: bytes) -> bytes:
        return b"\x00\x20\x00\x00" + quote.ljust(128, b"\x00") + extensions

    told = icmp(outside.address, GATEWAY, TIME_EXCEEDED, 0, extended(udp_session.left))
    seen = net.passed(told, outside, inside)
    assert checksums_are_right(seen)
    assert seen[24:28] == b"\x00\x20\x00\x00"
    assert is_like(quoted(seen)[: len(udp_session.sent)], udp_session.sent)
    assert quoted(seen)[len(udp_session.sent) :] == told[28 + len(udp_session.left) :]


def test_ip_options_in_a_quote_are_passed_over(
    net: Stations, inside: Station, outside: Station, daemon: Daemon
) -> None:
    session = Session(net, *QUESTIONS["udp with IP options"])
    assert header_length(session.left) == 24
    seen = net.passed(error(outside.address, GATEWAY, cut(session.left)), outside, inside)
    assert source(quoted(seen)) == CLIENT
    assert header_checksum_is_right(quoted(seen))


def test_an_error_about_no_session_goes_nowhere(
    net: Stations, inside: Station, outside: Station, udp_session: Session
) -> None:
    stray = udp((GATEWAY, source(udp_session.left)[1] + 1), SERVER)
    outside.send(error(outside.address, GATEWAY, stray))
    assert net.heard_nothing(inside)
    inside.send(error(inside.address, outside.address, udp(SERVER, ("10.77.0.11", 9))))
    assert net.heard_nothing(outside)


def test_an_error_about_an_error_goes_nowhere(
    net: Stations, inside: Station, outside: Station, udp_session: Session
) -> None:
    told = error(GATEWAY, outside.address, udp_session.came)
    outside.send(error(outside.address, GATEWAY, told))
    assert net.heard_nothing(inside)


def test_an_error_about_a_query_neither_ends_nor_refreshes_its_session(
    net: Stations, daemon: Daemon, inside: Station, outside: Station
) -> None:
    session = Session(net, *QUESTIONS["icmp"])
    time.sleep(1)
    aged = expires(daemon)
    for kind, code in KINDS:
        net.passed(error(outside.address, GATEWAY, session.left, kind, code), outside, inside)
        told = error(inside.address, outside.address, session.delivered, kind, code)
        net.passed(told, inside, outside)
    assert 0 < expires(daemon) <= aged
    assert is_like(net.passed(session.came, outside, inside), session.delivered)


# ---- what is neither query nor error ------------------------------------------------------------


@pytest.mark.parametrize("kind", [REDIRECT, ROUTER_SOLICITATION, PHOTURIS, EXPERIMENT])
def test_other_messages_do_not_leave(
    net: Stations, inside: Station, outside: Station, udp_session: Session, kind: int
) -> None:
    inside.send(icmp(inside.address, outside.address, kind, 0, bytes(4) + udp_session.delivered))
    assert net.heard_nothing(outside)


@pytest.mark.parametrize("kind", [REDIRECT, ROUTER_SOLICITATION, PHOTURIS, EXPERIMENT])
def test_other_messages_do_not_come_in(
    net: Stations, inside: Station, outside: Station, udp_session: Session, kind: int
) -> None:
    outside.send(icmp(outside.address, GATEWAY, kind, 0, bytes(4) + udp_session.left))
    assert net.heard_nothing(inside)


@pytest.mark.usefixtures("daemon")
def test_an_information_request_is_not_answered(net: Stations, outside: Station) -> None:
    outside.send(query(outside.port(7), GATEWAY, INFORMATION))
    assert net.heard_nothing(outside)
