"""The fast path and the plain way give the same packets, counters and timers, to the byte."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nfmasq.engine import BEHAVIOURS, Masquerade
from nfmasq.engine.wire.checksum import checksum
from tests.gateway import masquerade_with

GATEWAY = 0xC6336402
INSIDE = (0x0A4D000B, 0x0A4D000C)
OUTSIDE = (0xCB00710B, 0xCB00710B, 0xCB00710B, 0xCB00710C)
SPORTS, DPORTS = (7, 7, 7, 8), (80, 80, 80, 81)
MPORTS = range(61000, 61003)

FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32


def ip(protocol: int, source: int, destination: int, transport: bytes, **odd: int) -> bytes:
    """An IPv4 packet; `odd` spoils or decorates it."""
    options = bytes((1,)) * 4 * odd.get("options", 0)
    header = struct.pack(
        "!BBHHHBBHII",
        odd.get("version", 0x45) + odd.get("options", 0),
        0,
        20 + len(options) + len(transport) + odd.get("lie", 0),
        99,
        odd.get("fragment", 0x4000),
        64,
        protocol,
        0,
        source,
        destination,
    )
    check = checksum(header + options)
    return header[:10] + check.to_bytes(2, "big") + header[12:] + options + transport


def udp(sport: int, dport: int, payload: bytes, check: int, lie: int) -> bytes:
    return struct.pack("!HHHH", sport, dport, 8 + len(payload) + lie, check) + payload


def tcp(sport: int, dport: int, payload: bytes, check: int, flags: int, words: int) -> bytes:
    return struct.pack("!HHIIBBHHH", sport, dport, 5, 6, words << 4, flags, 99, check, 0) + payload


checks = st.sampled_from((0, 1, 0x1234, 0xFFFE, 0xFFFF)) | st.integers(0, 0xFFFF)
flag_bytes = st.sampled_from((SYN, SYN | ACK, ACK, ACK, ACK, PSH | ACK, FIN | ACK, RST, 0, URG))
# The long ones repeat a short one: Hypothesis gives up examples with thousands of drawn bytes.
payloads = st.binary(max_size=40) | st.builds(
    lambda piece, length: (piece * length)[:length],
    st.binary(min_size=1, max_size=40),
    st.integers(4000, 4200),
)

ODDITIES: tuple[dict[str, int], ...] = (
    *({},) * 12,
    {"options": 1},
    {"options": 10},
    {"fragment": 0x2000},
    {"fragment": 1},
    {"fragment": 0},
    {"lie": 1},
    {"lie": -1},
    {"version": 0x65},
)


@st.composite
def transports(draw: st.DrawFn, sport: int, dport: int) -> tuple[int, bytes]:
    if draw(st.booleans()):
        lie = draw(st.sampled_from((0,) * 6 + (-8, -1, 1, 2000)))
        return 17, udp(sport, dport, draw(payloads), draw(checks), max(lie, -8))
    words = draw(st.sampled_from((5,) * 6 + (0, 4, 6, 15)))
    return 6, tcp(sport, dport, draw(payloads), draw(checks), draw(flag_bytes), words)


@st.composite
def odd_packets(draw: st.DrawFn) -> tuple[bool, bytes]:
    """A direction (true: from the inside) and a packet with something about it, perhaps."""
    outbound = draw(st.booleans())
    if outbound:
        source, destination = draw(st.sampled_from(INSIDE)), draw(st.sampled_from(OUTSIDE))
        ports = draw(st.sampled_from(SPORTS)), draw(st.sampled_from(DPORTS))
    else:
        source, destination = draw(st.sampled_from(OUTSIDE)), GATEWAY
        ports = draw(st.sampled_from(DPORTS)), draw(st.sampled_from(MPORTS))
    protocol, transport = draw(transports(*ports))
    packet = ip(protocol, source, destination, transport, **draw(st.sampled_from(ODDITIES)))
    return outbound, packet[: draw(st.sampled_from((None,) * 12 + (0, 5, 19, 20, 27, 28, 39)))]


@st.composite
def quiet_packets(draw: st.DrawFn) -> tuple[bool, bytes]:
    """A packet of one of the flows that `greet` opened."""
    host = draw(st.integers(0, 1))
    payload, check = draw(payloads), draw(checks)
    if draw(st.booleans()):
        protocol, mport = 6, (61000, 61002)[host]
        out, back = (tcp(*p, payload, check, ACK, 5) for p in ((7, 80), (80, mport)))
    else:
        protocol, mport = 17, (61001, 61000)[host]
        out, back = (udp(*p, payload, check, 0) for p in ((7, 80), (80, mport)))
    if draw(st.booleans()):
        return True, ip(protocol, INSIDE[host], OUTSIDE[0], out)
    return False, ip(protocol, OUTSIDE[0], GATEWAY, back)


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
    """All that a packet may change, but for the slots of the wheel, which are its own affair."""
    entries = [
        (
            (ms.protocol, ms.saddr, ms.sport, ms.maddr, ms.mport, ms.daddr, ms.dport),
            (ms.state, ms.flags, ms.refcnt, ms.timer, ms.timeout),
            (ms.packets_out, ms.packets_in, ms.bytes_out, ms.bytes_in),
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
        [*masquerade.outbox],
    ]


def greet(masquerade: Masquerade) -> None:
    """Open a TCP connection and a UDP flow from each inside host, with two packets each way."""
    for host in INSIDE:
        for ask, answer in ((SYN, SYN | ACK), (ACK, ACK)):
            request = ip(6, host, OUTSIDE[0], tcp(7, 80, b"", 1, ask, 5))
            sent = masquerade.ip_fw_masquerade(request, GATEWAY, 1.0)
            assert sent is not None
            reply = tcp(80, int.from_bytes(sent[20:22], "big"), b"", 1, answer, 5)
            masquerade.ip_fw_demasquerade(ip(6, OUTSIDE[0], GATEWAY, reply), 1.0)

            request = ip(17, host, OUTSIDE[0], udp(7, 80, b"", 1, 0))
            sent = masquerade.ip_fw_masquerade(request, GATEWAY, 1.0)
            assert sent is not None
            reply = udp(80, int.from_bytes(sent[20:22], "big"), b"", 1, 0)
            masquerade.ip_fw_demasquerade(ip(17, OUTSIDE[0], GATEWAY, reply), 1.0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(quiet_packets() | odd_packets(), st.booleans()), min_size=10, max_size=40),
    st.sampled_from((GATEWAY, GATEWAY + 1)),
    SETTINGS,
)
def test_the_fast_path_and_the_plain_way_agree(
    traffic: list[tuple[tuple[bool, bytes], bool]], later_address: int, choices: dict[str, Any]
) -> None:
    fast = masquerade_with(ports=MPORTS, **choices)
    plain = masquerade_with(ports=MPORTS, fast=False, **choices)
    fast.inbound.maddrs = plain.inbound.maddrs = {GATEWAY}
    plain.identification = deepcopy(fast.identification)
    greet(fast)
    greet(plain)
    for number, ((outbound, packet), unsummed) in enumerate(traffic):
        now = 1000.0 + number
        maddr = GATEWAY if number < 20 else later_address
        if outbound:
            sent = fast.ip_fw_masquerade(packet, maddr, now, unsummed)
            assert sent == plain.ip_fw_masquerade(packet, maddr, now, unsummed)
            assert sent is None or sent[12:16] == maddr.to_bytes(4, "big") or number >= 20
        else:
            sent = fast.ip_fw_demasquerade(packet, now, unsummed)
            assert sent == plain.ip_fw_demasquerade(packet, now, unsummed)
        assert state(fast) == state(plain)


def test_a_quiet_flow_does_take_the_fast_path() -> None:
    masquerade = Masquerade()
    request = ip(17, INSIDE[0], OUTSIDE[0], udp(7, 80, b"request", 0x1111, 0))
    answer = ip(17, OUTSIDE[0], GATEWAY, udp(80, 61000, b"answer", 0x1111, 0))
    for now in (1.0, 2.0):
        masquerade.ip_fw_masquerade(request, GATEWAY, now)
        masquerade.ip_fw_demasquerade(answer, now)
    masquerade.sessions.tables.ip_masq_out_get_unlocked = None  # type: ignore[assignment,method-assign]
    masquerade.sessions.tables.ip_masq_in_get_unlocked = None  # type: ignore[assignment,method-assign]
    assert masquerade.ip_fw_masquerade(request, GATEWAY, 3.0) is not None
    assert masquerade.ip_fw_demasquerade(answer, 3.0) is not None


def test_every_checksum_comes_out_alike() -> None:
    """Over UDP 0 is none and stays 0, and a computed 0 is written 0xFFFF."""
    fast, plain = masquerade_with(ports=MPORTS), masquerade_with(ports=MPORTS, fast=False)
    greet(fast)
    greet(plain)
    for check in range(0x10000):
        request = ip(17, INSIDE[0], OUTSIDE[0], udp(7, 80, b"", check, 0))
        answer = ip(17, OUTSIDE[0], GATEWAY, udp(80, 61001, b"", check, 0))
        sent = fast.ip_fw_masquerade(request, GATEWAY, 2.0)
        assert sent == plain.ip_fw_masquerade(request, GATEWAY, 2.0)
        assert sent is not None
        assert (sent[26:28] == b"\0\0") == (check == 0)
        assert fast.ip_fw_demasquerade(answer, 2.0) == plain.ip_fw_demasquerade(answer, 2.0)
