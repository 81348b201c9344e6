"""ICMP errors: each side sees only addresses it knows, in the error and in what it quotes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import ICMP, TCP, Masquerade
from nfmasq.engine.wire.sequence import IpMasqSeq
from tests.packets import (
    ACK,
    ECHO,
    INFORMATION,
    MASK,
    PARAMETER_PROBLEM,
    REDIRECT,
    SOURCE_QUENCH,
    SYN,
    TIME_EXCEEDED,
    TIMESTAMP,
    UNREACHABLE,
    Endpoint,
    checksums_are_right,
    cut,
    destination,
    destination_address,
    error,
    header_checksum_is_right,
    icmp,
    ip,
    number,
    query,
    quoted,
    reply,
    source,
    source_address,
    tcp,
    udp,
)

INSIDE: Endpoint = ("10.0.0.2", 40000)
OUTSIDE: Endpoint = ("198.51.100.7", 53)
GATEWAY = "203.0.113.1"
MADDR = number(GATEWAY)
ROUTER = "192.0.2.254"
LAN_ROUTER = "10.0.0.99"
GATEWAY_INSIDE = "10.0.0.1"

ERRORS = pytest.mark.parametrize(
    "kind", [UNREACHABLE, SOURCE_QUENCH, TIME_EXCEEDED, PARAMETER_PROBLEM]
)
IP_OPTIONS = b"\x94\x04\x00\x00"


class Wire:
    """A session of each protocol, and its packets on either side of the gateway."""

    def __init__(self) -> None:
        self.masq = Masquerade()
        self.sent = {
            "tcp": tcp(INSIDE, OUTSIDE, SYN),
            "udp": udp(INSIDE, OUTSIDE, b"question"),
            "udp without checksum": udp(INSIDE, OUTSIDE, b"question", checksum=False),
            "udp with ip options": udp(INSIDE, OUTSIDE, b"question", options=IP_OPTIONS),
            "icmp": query(INSIDE, OUTSIDE[0]),
        }
        self.left = {name: self.outbound(packet) for name, packet in self.sent.items()}
        self.came = {
            "tcp": tcp(OUTSIDE, source(self.left["tcp"]), SYN | ACK),
            "udp": udp(OUTSIDE, source(self.left["udp"]), b"answer"),
            "udp without checksum": udp(OUTSIDE, source(self.left["udp"]), b"a", checksum=False),
            "udp with ip options": udp(OUTSIDE, source(self.left["udp"]), options=IP_OPTIONS),
            "icmp": reply(OUTSIDE[0], source(self.left["icmp"])),
        }
        self.delivered = {name: self.inbound(packet) for name, packet in self.came.items()}

    def outbound(self, packet: bytes) -> bytes:
        sent = self.masq.ip_fw_masquerade(packet, MADDR, 0.0)
        assert sent is not None
        return sent

    def inbound(self, packet: bytes) -> bytes:
        sent = self.masq.ip_fw_demasquerade(packet, 0.0)
        assert sent is not None
        return sent

    def own_error(self, packet: bytes) -> bytes:
        sent = self.masq.ip_fw_own(packet, 0.0)
        assert sent is not None
        return sent

    def entries(self) -> list[tuple[object, ...]]:
        """List all that there is to know of the entries."""
        names = ("state", "timer", "timeout", "refcnt", "flags", "packets_in", "packets_out")
        return [
            tuple(getattr(ms, name) for name in ("maddr", "mport", *names))
            for ms in self.masq.sessions.entries()
        ]


@pytest.fixture
def wire() -> Wire:
    return Wire()


SESSIONS = pytest.mark.parametrize(
    "name", ["tcp", "udp", "udp without checksum", "udp with ip options", "icmp"]
)
QUOTING = pytest.mark.parametrize("quote", [cut, bytes], ids=["8 bytes quoted", "all quoted"])


# -- about packets that went out ------------------------------------------------------


@SESSIONS
@QUOTING
def test_an_error_from_outside_reaches_the_inside_machine_and_quotes_what_it_sent(
    wire: Wire, name: str, quote: type[bytes]
) -> None:
    received = wire.inbound(error(ROUTER, GATEWAY, quote(wire.left[name])))
    assert received == error(ROUTER, INSIDE[0], quote(wire.sent[name]))


@ERRORS
def test_every_kind_of_error_comes_through(wire: Wire, kind: int) -> None:
    received = wire.inbound(error(ROUTER, GATEWAY, wire.left["udp"], kind, 1))
    assert received == error(ROUTER, INSIDE[0], wire.sent["udp"], kind, 1)


def test_the_next_hop_s_mtu_comes_through(wire: Wire) -> None:
    too_big = icmp(ROUTER, GATEWAY, UNREACHABLE, 4, b"\x00\x00\x05\x00" + cut(wire.left["tcp"]))
    assert wire.inbound(too_big) == icmp(
        ROUTER, INSIDE[0], UNREACHABLE, 4, b"\x00\x00\x05\x00" + cut(wire.sent["tcp"])
    )


def test_an_error_with_ip_options_of_its_own_comes_through(wire: Wire) -> None:
    received = wire.inbound(error(ROUTER, GATEWAY, wire.left["udp"], options=IP_OPTIONS))
    assert received == error(ROUTER, INSIDE[0], wire.sent["udp"], options=IP_OPTIONS)


@given(st.integers(8, 60))
def test_a_quote_cut_anywhere_past_8_bytes_has_a_right_header_checksum(length: int) -> None:
    wire = Wire()
    received = wire.inbound(error(ROUTER, GATEWAY, cut(wire.left["tcp"], length)))
    assert checksums_are_right(received)
    assert header_checksum_is_right(quoted(received))
    assert source(quoted(received)) == INSIDE


@pytest.mark.parametrize("kind", [ECHO, TIMESTAMP, INFORMATION, MASK])
def test_an_error_about_any_query_finds_who_asked(wire: Wire, kind: int) -> None:
    asked = query(INSIDE, OUTSIDE[0], kind)
    received = wire.inbound(error(ROUTER, GATEWAY, cut(wire.outbound(asked)), TIME_EXCEEDED, 0))
    assert received == error(ROUTER, INSIDE[0], cut(asked), TIME_EXCEEDED, 0)


# -- about packets that came in -------------------------------------------------------


@SESSIONS
@QUOTING
def test_an_error_from_inside_comes_from_the_gateway_and_quotes_what_the_outside_sent(
    wire: Wire, name: str, quote: type[bytes]
) -> None:
    sent = wire.outbound(error(INSIDE[0], OUTSIDE[0], quote(wire.delivered[name])))
    assert sent == error(GATEWAY, OUTSIDE[0], quote(wire.came[name]))


def test_an_error_from_a_router_inside_does_not_show_the_router(wire: Wire) -> None:
    sent = wire.outbound(error(LAN_ROUTER, OUTSIDE[0], cut(wire.delivered["tcp"])))
    assert sent == error(GATEWAY, OUTSIDE[0], cut(wire.came["tcp"]))


# -- the gateway's own ----------------------------------------------------------------


@SESSIONS
@QUOTING
def test_the_gateway_s_error_about_what_could_not_go_on_inside_quotes_what_the_outside_sent(
    wire: Wire, name: str, quote: type[bytes]
) -> None:
    sent = wire.own_error(error(GATEWAY, OUTSIDE[0], quote(wire.delivered[name])))
    assert sent == error(GATEWAY, OUTSIDE[0], quote(wire.came[name]))


@SESSIONS
@QUOTING
def test_the_gateway_s_error_to_itself_about_what_could_not_go_out_reaches_the_inside_machine(
    wire: Wire, name: str, quote: type[bytes]
) -> None:
    sent = wire.own_error(error(GATEWAY, GATEWAY, quote(wire.left[name]), code=1))
    assert sent == error(GATEWAY, INSIDE[0], quote(wire.sent[name]), code=1)


@pytest.mark.parametrize(
    "own",
    [
        error(GATEWAY, OUTSIDE[0], udp(OUTSIDE, (GATEWAY, 5353), b"to a closed port")),
        error(GATEWAY, GATEWAY, tcp((GATEWAY, 40001), ("198.51.100.9", 80), SYN), code=1),
        error(
            GATEWAY_INSIDE,
            GATEWAY_INSIDE,
            tcp((GATEWAY_INSIDE, 40001), ("10.0.0.77", 22), SYN),
            code=1,
        ),
        query((GATEWAY, 77), OUTSIDE[0]),
        tcp((GATEWAY, 40001), OUTSIDE, SYN),
    ],
    ids=["closed port", "host outside away", "host inside away", "ping", "no icmp"],
)
def test_the_gateway_s_own_business_is_left_alone(wire: Wire, own: bytes) -> None:
    assert wire.masq.ip_fw_own(own, 0.0) is own


@pytest.mark.parametrize(
    "stray",
    [
        udp(OUTSIDE, ("10.0.0.55", 9)),
        cut(tcp(OUTSIDE, ("172.16.9.9", 9))),
        query((OUTSIDE[0], 9), "192.168.1.1"),
        ip(OUTSIDE[0], "100.64.1.1", 47, b"a tunnel, cut"),
    ],
)
def test_the_gateway_s_error_with_an_inside_address_of_no_session_is_dropped(
    wire: Wire, stray: bytes
) -> None:
    assert wire.masq.ip_fw_own(error(GATEWAY, OUTSIDE[0], stray), 0.0) is None
    assert wire.masq.sessions.counters.errors["unknown"] == 1


# -- of no session --------------------------------------------------------------------

STRAYS = pytest.mark.parametrize(
    "stray",
    [
        udp((GATEWAY, 40001), OUTSIDE),
        tcp((GATEWAY, 64999), OUTSIDE),
        query((GATEWAY, 99), OUTSIDE[0]),
        ip(GATEWAY, OUTSIDE[0], 47, b"gre tunnel"),
        ip(GATEWAY, OUTSIDE[0], 41, b"6in4 tunnel"),
        error(GATEWAY, OUTSIDE[0], udp(OUTSIDE, (GATEWAY, 1))),
    ],
    ids=["udp", "tcp", "ping", "gre", "6in4", "error"],
)


@STRAYS
def test_an_error_from_outside_about_none_of_ours_is_left_alone(wire: Wire, stray: bytes) -> None:
    packet = error(ROUTER, GATEWAY, stray)
    assert wire.inbound(packet) is packet


@STRAYS
def test_an_error_from_inside_about_none_of_ours_is_dropped(wire: Wire, stray: bytes) -> None:
    assert wire.masq.ip_fw_masquerade(error(INSIDE[0], OUTSIDE[0], stray), MADDR, 0.0) is None
    assert wire.masq.sessions.counters.errors["unknown"] == 1


def test_a_later_fragment_quoted_belongs_to_no_session(wire: Wire) -> None:
    later = bytearray(wire.left["udp"])
    later[6:8] = b"\x00\x10"
    packet = error(ROUTER, GATEWAY, bytes(later))
    assert wire.inbound(packet) is packet


def test_a_redirect_is_no_error_and_does_not_leave(wire: Wire) -> None:
    inside = error(INSIDE[0], OUTSIDE[0], wire.delivered["udp"], REDIRECT)
    assert wire.masq.ip_fw_masquerade(inside, MADDR, 0.0) is None
    outside = error(ROUTER, GATEWAY, wire.left["udp"], REDIRECT)
    assert wire.inbound(outside) is outside


@pytest.mark.parametrize("way", ["ip_fw_demasquerade", "ip_fw_own"])
@pytest.mark.parametrize("quote", [b"", b"\x45" + bytes(18), cut(tcp(INSIDE, OUTSIDE), 7)])
def test_an_error_that_quotes_too_little_is_malformed(wire: Wire, way: str, quote: bytes) -> None:
    assert getattr(wire.masq, way)(error(ROUTER, GATEWAY, quote), 0.0) is None
    assert wire.masq.sessions.counters.errors["malformed"] == 1


def test_an_error_with_a_wrong_checksum_is_malformed_and_not_made_right(wire: Wire) -> None:
    packet = bytearray(error(ROUTER, GATEWAY, wire.left["udp"]))
    packet[-1] ^= 1
    assert wire.masq.ip_fw_demasquerade(bytes(packet), 0.0) is None
    assert wire.masq.sessions.counters.errors["malformed"] == 1


# -- what an error does to entries: nothing -------------------------------------------


@SESSIONS
def test_an_error_neither_makes_refreshes_nor_ends_an_entry(wire: Wire, name: str) -> None:
    before = wire.entries()
    later = 50.0
    wire.masq.ip_fw_demasquerade(error(ROUTER, GATEWAY, wire.left[name]), later)
    wire.masq.ip_fw_masquerade(error(INSIDE[0], OUTSIDE[0], wire.delivered[name]), MADDR, later)
    wire.masq.ip_fw_own(error(GATEWAY, OUTSIDE[0], wire.delivered[name]), later)
    wire.masq.ip_fw_own(error(GATEWAY, GATEWAY, wire.left[name]), later)
    assert wire.entries() == before


@STRAYS
def test_an_error_about_nothing_known_makes_no_entry(wire: Wire, stray: bytes) -> None:
    before = wire.entries()
    wire.masq.ip_fw_demasquerade(error(ROUTER, GATEWAY, stray), 0.0)
    wire.masq.ip_fw_masquerade(error(INSIDE[0], OUTSIDE[0], stray), MADDR, 0.0)
    wire.masq.ip_fw_own(error(GATEWAY, GATEWAY, stray), 0.0)
    assert wire.entries() == before


def test_a_query_kept_alive_by_errors_alone_expires(wire: Wire) -> None:
    for second in range(0, 70, 5):
        wire.masq.ip_fw_demasquerade(error(ROUTER, GATEWAY, wire.left["icmp"]), float(second))
        wire.masq.sweep(float(second), 100)
    assert wire.masq.sessions.entry_count(ICMP) == 0
    packet = error(ROUTER, GATEWAY, wire.left["icmp"])
    assert wire.inbound(packet) is packet


def test_an_error_about_a_shifted_stream_quotes_the_sender_s_own_numbers(wire: Wire) -> None:
    (entry,) = (ms for ms in wire.masq.sessions.entries() if ms.protocol == TCP)
    entry.out_seq, entry.rewrite = IpMasqSeq(), None
    entry.out_seq.change(500, 510, bytes(17))
    sent = tcp(INSIDE, OUTSIDE, ACK, b"data", seq=1000)
    left = wire.outbound(sent)
    assert left == tcp(source(left), OUTSIDE, ACK, b"data", seq=1007)
    received = wire.inbound(error(ROUTER, GATEWAY, cut(left, 20)))
    assert received == error(ROUTER, INSIDE[0], cut(sent, 20))


def test_both_addresses_of_an_error_are_known_to_its_receiver(wire: Wire) -> None:
    received = wire.inbound(error(ROUTER, GATEWAY, wire.left["tcp"]))
    assert (source_address(received), destination_address(received)) == (ROUTER, INSIDE[0])
    assert (source(quoted(received)), destination(quoted(received))) == (INSIDE, OUTSIDE)


@pytest.mark.parametrize("length", [8, 20, 24])
def test_a_shifted_acknowledgement_is_quoted_as_its_sender_wrote_it(
    wire: Wire, length: int
) -> None:
    """In both directions, as far as the packet is quoted."""
    (entry,) = (ms for ms in wire.masq.sessions.entries() if ms.protocol == TCP)
    entry.out_seq, entry.in_seq, entry.rewrite = IpMasqSeq(), IpMasqSeq(), None
    entry.out_seq.change(500, 510, bytes(17))
    entry.in_seq.change(600, 610, bytes(7))
    mapped = source(wire.left["tcp"])
    sent = tcp(INSIDE, OUTSIDE, ACK, b"data", seq=1000, ack=2000)
    came = tcp(OUTSIDE, mapped, ACK, b"data", seq=2003, ack=1007)
    left, arrived = wire.outbound(sent), wire.inbound(came)
    assert left == tcp(mapped, OUTSIDE, ACK, b"data", seq=1007, ack=2003)
    assert arrived == tcp(OUTSIDE, INSIDE, ACK, b"data", seq=2000, ack=1000)
    told_inside = wire.inbound(error(ROUTER, GATEWAY, cut(left, length)))
    told_outside = wire.outbound(error(INSIDE[0], OUTSIDE[0], cut(arrived, length)))
    assert quoted(told_inside) == cut(sent, length)
    assert quoted(told_outside) == cut(came, length)
