"""The fast path and the plain way give the same packets, counters and timers, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nfmasq.engine import BEHAVIOURS, Masquerade
from tests.gateway import GATEWAY, NEW_ADDRESS, masquerade_with
from tests.packets import (
    ACK,
    FIN,
    MORE_FRAGMENTS,
    PSH,
    RST,
    SYN,
    URG,
    Endpoint,
    number,
    source,
    source_address,
    tcp,
    udp,
    with_checksum,
    with_data_offset,
    with_header,
    with_udp_length,
)

INSIDE = "10.0.0.2", "10.0.0.3"
OUTSIDE = "198.51.100.7", "198.51.100.7", "198.51.100.7", "198.51.100.8"
SPORTS, DPORTS = (7, 7, 7, 8), (80, 80, 80, 81)
MPORTS = range(61000, 61003)
NO_OPERATION = b"\x01"

SERVER: Endpoint = (OUTSIDE[0], 80)
CLIENTS: tuple[Endpoint, ...] = tuple((host, 7) for host in INSIDE)
TCP_MPORTS, UDP_MPORTS = (61000, 61002), (61001, 61000)
"""The masquerade ports of CLIENTS' sessions with SERVER, as `greet` opens them."""

checksums = st.sampled_from((0, 1, 0x1234, 0xFFFE, 0xFFFF)) | st.integers(0, 0xFFFF)
flag_bytes = st.sampled_from((SYN, SYN | ACK, ACK, ACK, ACK, PSH | ACK, FIN | ACK, RST, 0, URG))
# The long ones repeat a short one: Hypothesis gives up examples with thousands of drawn bytes.
payloads = st.binary(max_size=40) | st.builds(
    lambda piece, length: (piece * length)[:length],
    st.binary(min_size=1, max_size=40),
    st.integers(4000, 4200),
)

ODD_HEADERS: tuple[dict[str, int], ...] = (
    *({},) * 12,
    {"option_words": 1},
    {"option_words": 10},
    {"fragment": MORE_FRAGMENTS},
    {"fragment": 1},
    {"fragment": 0},
    {"lie": 1},
    {"lie": -1},
    {"version": 6},
)
"""What may be odd about an IP header; `lie` is added to its total length."""


@st.composite
def odd_transports(draw: st.DrawFn, src: Endpoint, dst: Endpoint, options: bytes) -> bytes:
    """Draw a packet with any checksum, and perhaps with a wrong length in its transport header."""
    payload = draw(payloads)
    if draw(st.booleans()):
        lie = draw(st.sampled_from((0,) * 6 + (-8, -1, 1, 2000)))
        packet = udp(src, dst, payload, options=options)
        packet = with_udp_length(packet, 8 + len(payload) + lie)
    else:
        words = draw(st.sampled_from((5,) * 6 + (0, 4, 6, 15)))
        packet = with_data_offset(tcp(src, dst, draw(flag_bytes), payload, options=options), words)
    return with_checksum(packet, draw(checksums))


@st.composite
def odd_packets(draw: st.DrawFn) -> tuple[bool, bytes]:
    """Draw a direction (true: from the inside) and a packet, perhaps odd, perhaps cut short."""
    outbound = draw(st.booleans())
    if outbound:
        src = draw(st.sampled_from(INSIDE)), draw(st.sampled_from(SPORTS))
        dst = draw(st.sampled_from(OUTSIDE)), draw(st.sampled_from(DPORTS))
    else:
        src = draw(st.sampled_from(OUTSIDE)), draw(st.sampled_from(DPORTS))
        dst = GATEWAY, draw(st.sampled_from(MPORTS))
    odd = dict(draw(st.sampled_from(ODD_HEADERS)))
    lie, options = odd.pop("lie", 0), 4 * NO_OPERATION * odd.pop("option_words", 0)
    packet = draw(odd_transports(src, dst, options))
    packet = with_header(packet, total_length=len(packet) + lie, **odd)
    return outbound, packet[: draw(st.sampled_from((None,) * 12 + (0, 5, 19, 20, 27, 28, 39)))]


@st.composite
def quiet_packets(draw: st.DrawFn) -> tuple[bool, bytes]:
    """Draw a direction (true: from the inside) and a packet of a session that `greet` opens."""
    host, payload = draw(st.integers(0, 1)), draw(payloads)
    outbound, over_tcp = draw(st.booleans()), draw(st.booleans())
    mport = (TCP_MPORTS if over_tcp else UDP_MPORTS)[host]
    src, dst = (CLIENTS[host], SERVER) if outbound else (SERVER, (GATEWAY, mport))
    packet = tcp(src, dst, ACK, payload) if over_tcp else udp(src, dst, payload)
    return outbound, with_checksum(packet, draw(checksums))


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "mapping": st.sampled_from(BEHAVIOURS),
        "filtering": st.sampled_from(BEHAVIOURS),
        "inbound_refresh": st.just(False),
        "unsolicited": st.just("accept"),
        "other_protocols": st.just("by-address"),
        "max_new_per_host": st.just(2),
    },
)
"""Settings of the engine that may tell on what becomes of a packet."""


def state(masquerade: Masquerade) -> Sequence[object]:
    """List all that a packet may change, but for the slots of the timing wheel."""
    entries = [
        (
            (ms.protocol, ms.saddr, ms.sport, ms.maddr, ms.mport, ms.daddr, ms.dport),
            (ms.state, ms.flags, ms.refcnt, ms.timer, ms.timeout),
            (ms.packets_out, ms.packets_in, ms.bytes_out, ms.bytes_in),
            (ms.numbers_out, ms.window_out, ms.numbers_in, ms.window_in, ms.scales, ms.offered),
        )
        for ms in masquerade.sessions.entries()
    ]
    counters = masquerade.sessions.counters
    traffic = [
        (name, row.accepted, row.dropped, row.bytes)
        for direction in (counters.outbound, counters.inbound)
        for name, row in direction.items()
    ]
    return [
        entries,
        traffic,
        counters.errors,
        counters.created,
        counters.ended,
        counters.unbelieved,
        [*masquerade.outbox],
    ]


def greet(masquerade: Masquerade) -> None:
    """Open a session over TCP and one over UDP from each of CLIENTS to SERVER.

    The TCP session has two packets each way, the UDP session one.
    """

    def send(packet: bytes) -> Endpoint:
        sent = masquerade.ip_fw_masquerade(packet, number(GATEWAY), 1.0)
        assert sent is not None
        return source(sent)

    for client in CLIENTS:
        for ask, answer in ((SYN, SYN | ACK), (ACK, ACK)):
            mapped = send(tcp(client, SERVER, ask))
            masquerade.ip_fw_demasquerade(tcp(SERVER, mapped, answer), 1.0)
        masquerade.ip_fw_demasquerade(udp(SERVER, send(udp(client, SERVER))), 1.0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(quiet_packets() | odd_packets(), st.booleans()), min_size=10, max_size=40),
    st.sampled_from((GATEWAY, NEW_ADDRESS)),
    SETTINGS,
)
def test_the_fast_path_and_the_plain_way_agree(
    traffic: list[tuple[tuple[bool, bytes], bool]], later_address: str, choices: dict[str, Any]
) -> None:
    fast = masquerade_with(ports=MPORTS, **choices)
    plain = masquerade_with(ports=MPORTS, fast=False, **choices)
    fast.inbound.maddrs = plain.inbound.maddrs = {number(GATEWAY)}
    plain.identification = deepcopy(fast.identification)
    greet(fast)
    greet(plain)
    for at, ((outbound, packet), unsummed) in enumerate(traffic):
        now = 1000.0 + at
        maddr = GATEWAY if at < 20 else later_address
        if outbound:
            sent = fast.ip_fw_masquerade(packet, number(maddr), now, unsummed)
            assert sent == plain.ip_fw_masquerade(packet, number(maddr), now, unsummed)
            assert sent is None or source_address(sent) == maddr or at >= 20
        else:
            sent = fast.ip_fw_demasquerade(packet, now, unsummed)
            assert sent == plain.ip_fw_demasquerade(packet, now, unsummed)
        assert state(fast) == state(plain)


def test_a_quiet_flow_does_take_the_fast_path() -> None:
    masquerade = Masquerade()
    request = udp(CLIENTS[0], SERVER, b"request")
    answer = udp(SERVER, (GATEWAY, 61000), b"answer")
    for now in (1.0, 2.0):
        masquerade.ip_fw_masquerade(request, number(GATEWAY), now)
        masquerade.ip_fw_demasquerade(answer, now)
    masquerade.sessions.tables.ip_masq_out_get_unlocked = None  # type: ignore[assignment,method-assign]
    masquerade.sessions.tables.ip_masq_in_get_unlocked = None  # type: ignore[assignment,method-assign]
    assert masquerade.ip_fw_masquerade(request, number(GATEWAY), 3.0) is not None
    assert masquerade.ip_fw_demasquerade(answer, 3.0) is not None


def test_every_checksum_comes_out_alike() -> None:
    """A UDP checksum of 0 says that there is none, and stays 0; a computed 0 is written 0xFFFF."""
    fast, plain = masquerade_with(ports=MPORTS), masquerade_with(ports=MPORTS, fast=False)
    greet(fast)
    greet(plain)
    maddr = number(GATEWAY)
    request, answer = udp(CLIENTS[0], SERVER), udp(SERVER, (GATEWAY, UDP_MPORTS[0]))
    for checksum in range(0x10000):
        asked, answered = with_checksum(request, checksum), with_checksum(answer, checksum)
        sent = fast.ip_fw_masquerade(asked, maddr, 2.0)
        assert sent == plain.ip_fw_masquerade(asked, maddr, 2.0)
        assert sent is not None
        assert (sent[26:28] == b"\0\0") == (checksum == 0)
        assert fast.ip_fw_demasquerade(answered, 2.0) == plain.ip_fw_demasquerade(answered, 2.0)
