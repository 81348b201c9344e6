"""The masquerade as the wire sees it: what leaves, what comes in, and what does neither."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfmasq.engine import BEHAVIOURS, ICMP, PORT_SELECTIONS, TCP, UDP
from tests.gateway import (
    GATEWAY,
    INSIDE,
    NEIGHBOUR,
    NEW_ADDRESS,
    OTHER_SERVER,
    PORTS,
    SERVER,
    SERVER_OTHER_PORT,
    THREE_PORTS,
    Gateway,
)
from tests.packets import (
    ACK,
    ECHO,
    ECHO_REPLY,
    FIN,
    INFORMATION,
    MASK,
    RST,
    SYN,
    TIMESTAMP,
    Endpoint,
    checksums_are_right,
    cut,
    destination,
    error,
    ip,
    query,
    quoted,
    reply,
    source,
    source_address,
    tcp,
    udp,
)

EI, AD, APD = BEHAVIOURS
SERVERS = (SERVER, SERVER_OTHER_PORT, OTHER_SERVER)


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


# -- out and back ---------------------------------------------------------------------


def test_a_tcp_connection_goes_out_from_the_gateway_and_comes_back_to_the_inside(
    gateway: Gateway,
) -> None:
    sent = gateway.out(tcp(INSIDE, SERVER, SYN, tcp_options=b"\x02\x04\x05\xb4"))
    assert sent is not None
    mapped = source(sent)
    assert mapped[0] == GATEWAY
    assert mapped[1] in PORTS
    assert sent == tcp(mapped, SERVER, SYN, tcp_options=b"\x02\x04\x05\xb4")
    assert gateway.into(tcp(SERVER, mapped, SYN | ACK)) == tcp(SERVER, INSIDE, SYN | ACK)
    assert gateway.out(tcp(INSIDE, SERVER, ACK, b"GET")) == tcp(mapped, SERVER, ACK, b"GET")
    assert gateway.into(tcp(SERVER, mapped, ACK, b"200")) == tcp(SERVER, INSIDE, ACK, b"200")


def test_a_udp_question_goes_out_and_its_answer_comes_back(gateway: Gateway) -> None:
    mapped = gateway.send(INSIDE, SERVER)
    assert mapped[0] == GATEWAY
    assert gateway.into(udp(SERVER, mapped, b"answer")) == udp(SERVER, INSIDE, b"answer")


@pytest.mark.parametrize(
    ("kind", "answer"),
    [(ECHO, ECHO_REPLY), (TIMESTAMP, 14), (INFORMATION, 16), (MASK, 18)],
)
def test_an_icmp_query_goes_out_under_another_identifier_and_its_reply_comes_back(
    gateway: Gateway, kind: int, answer: int
) -> None:
    sent = gateway.out(query(INSIDE, SERVER[0], kind))
    assert sent is not None
    mapped = source(sent)
    assert mapped[0] == GATEWAY
    assert mapped[1] in PORTS
    assert sent == query(mapped, SERVER[0], kind)
    assert gateway.into(reply(SERVER[0], mapped, answer)) == reply(SERVER[0], INSIDE, answer)


def test_an_icmp_identifier_of_zero_is_one_like_any_other(gateway: Gateway) -> None:
    sent = gateway.out(query((INSIDE[0], 0), SERVER[0]))
    assert sent is not None
    answer = gateway.into(reply(SERVER[0], source(sent)))
    assert answer == reply(SERVER[0], (INSIDE[0], 0))
    assert gateway.out(query((INSIDE[0], 0), SERVER[0])) == sent


@given(
    before=st.integers(0, 8),
    option=st.sampled_from([7, 68, 82, 131, 137, 145, 147, 149, 152]),
    content=st.binary(min_size=2, max_size=26),
)
def test_an_ip_option_that_names_addresses_does_not_go_out(
    before: int, option: int, content: bytes
) -> None:
    """The traceroute option has the address that a packet began at (RFC 1393)."""
    gateway = Gateway()
    options = b"\x01" * before + bytes((option, 2 + len(content))) + content
    options += bytes(-len(options) % 4)
    assert gateway.out(udp(INSIDE, SERVER, b"x", options=options)) is None
    assert gateway.errors["ip_option"] == 1


@pytest.mark.parametrize("options", [b"", b"\x94\x04\x00\x00"], ids=["plain", "ip options"])
def test_ip_options_are_kept(gateway: Gateway, options: bytes) -> None:
    sent = gateway.out(udp(INSIDE, SERVER, b"x", options=options))
    assert sent is not None
    assert sent == udp(source(sent), SERVER, b"x", options=options)


def test_two_inside_machines_with_the_same_source_port_are_told_apart(gateway: Gateway) -> None:
    mine, theirs = gateway.send(INSIDE, SERVER), gateway.send(NEIGHBOUR, SERVER)
    assert mine != theirs
    assert gateway.into(udp(SERVER, mine)) == udp(SERVER, INSIDE)
    assert gateway.into(udp(SERVER, theirs)) == udp(SERVER, NEIGHBOUR)


def test_a_session_keeps_its_port(gateway: Gateway) -> None:
    assert gateway.send(INSIDE, SERVER) == gateway.send(INSIDE, SERVER)
    assert gateway.sessions.entry_count(UDP) == 1


@pytest.mark.parametrize(
    "packet",
    [
        udp(SERVER, (GATEWAY, 61000)),
        tcp(SERVER, (GATEWAY, 22), SYN),
        query((SERVER[0], 7), GATEWAY),
        reply(SERVER[0], (GATEWAY, 7)),
        ip(SERVER[0], GATEWAY, 47, b"gre"),
        ip(SERVER[0], GATEWAY, 50, b"esp"),
    ],
    ids=["udp", "tcp", "ping", "reply", "gre", "esp"],
)
def test_a_packet_from_outside_of_no_session_is_left_alone(gateway: Gateway, packet: bytes) -> None:
    assert gateway.into(packet) is packet
    assert gateway.sessions.entries() == []


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (ip(INSIDE[0], SERVER[0], 47, b"gre"), "unsupported"),
        (reply(INSIDE[0], SERVER), "unknown"),
        (udp(INSIDE, SERVER)[:-1], "malformed"),
        (udp((INSIDE[0], 0), SERVER), "malformed"),
        (tcp((INSIDE[0], 0), SERVER), "malformed"),
        (b"", "malformed"),
        (b"\x60" + udp(INSIDE, SERVER)[1:], "malformed"),
        (udp(INSIDE, SERVER)[:6] + b"\x20\x00" + udp(INSIDE, SERVER)[8:], "fragment"),
    ],
)
def test_what_cannot_be_masqueraded_does_not_leave_and_is_counted(
    gateway: Gateway, packet: bytes, reason: str
) -> None:
    assert gateway.out(packet) is None
    assert gateway.errors == {reason: 1}
    assert sum(traffic.dropped for traffic in gateway.sessions.counters.outbound.values()) == 1


def test_every_packet_is_counted_once_by_its_verdict(gateway: Gateway) -> None:
    mapped = gateway.send(INSIDE, SERVER)
    for _ in range(3):
        gateway.into(udp(SERVER, mapped, b"answer"))
    outbound, inbound = (
        gateway.sessions.counters.outbound["udp"],
        gateway.sessions.counters.inbound["udp"],
    )
    assert (outbound.accepted, outbound.dropped, outbound.bytes) == (1, 0, 36)
    assert (inbound.accepted, inbound.dropped, inbound.bytes) == (3, 0, 3 * 34)
    (entry,) = gateway.sessions.entries()
    assert (entry.packets_out, entry.packets_in) == (1, 3)
    assert (entry.bytes_out, entry.bytes_in) == (36, 3 * 34)


# -- states and expiry ----------------------------------------------------------------


def test_a_connection_runs_through_its_states(gateway: Gateway) -> None:
    sent = gateway.out(tcp(INSIDE, SERVER, SYN))
    assert sent is not None
    mapped = source(sent)
    (entry,) = gateway.sessions.entries()
    states = [entry.state_name]
    for way, packet in (
        (gateway.into, tcp(SERVER, mapped, SYN | ACK)),
        (gateway.out, tcp(INSIDE, SERVER, ACK)),
        (gateway.out, tcp(INSIDE, SERVER, FIN | ACK)),
        (gateway.into, tcp(SERVER, mapped, FIN | ACK)),
        (gateway.into, tcp(SERVER, mapped, RST)),
    ):
        way(packet)
        states.append(entry.state_name)
    assert states == [
        "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "TIME_WAIT", "CLOSE"
    ]  # fmt: skip


def test_a_session_expires_at_its_time_and_its_answers_are_no_longer_ours(
    gateway: Gateway,
) -> None:
    mapped = gateway.send(INSIDE, SERVER)
    gateway.passes(299)
    assert gateway.lets_in(SERVER, mapped)
    gateway.passes(299)
    assert gateway.sessions.entry_count(UDP) == 1
    gateway.passes(2)
    assert gateway.sessions.entry_count(UDP) == 0
    assert not gateway.lets_in(SERVER, mapped)
    assert gateway.sessions.counters.created["udp"] == 1
    assert gateway.ended == {"expired": 1}


def test_a_quiet_connection_lasts_two_hours(gateway: Gateway) -> None:
    sent = gateway.out(tcp(INSIDE, SERVER, SYN))
    assert sent is not None
    mapped = source(sent)
    gateway.into(tcp(SERVER, mapped, SYN | ACK))
    gateway.out(tcp(INSIDE, SERVER, ACK))
    gateway.passes(2 * 3600)
    assert gateway.into(tcp(SERVER, mapped, ACK)) == tcp(SERVER, INSIDE, ACK)


# -- out of ports ---------------------------------------------------------------------


@pytest.mark.parametrize("selection", PORT_SELECTIONS)
def test_out_of_ports_a_new_session_is_refused_and_the_others_go_on_until_ports_come_back(
    selection: str,
) -> None:
    gateway = Gateway(ports=THREE_PORTS, port_selection=selection)
    endpoints = [(INSIDE[0], sport) for sport in range(1, 4)]
    mapped = [gateway.send(inside, SERVER) for inside in endpoints]
    assert sorted(mport for _, mport in mapped) == list(THREE_PORTS)
    assert gateway.sessions.ports_free(UDP) == 0

    assert gateway.out(udp(NEIGHBOUR, SERVER)) is None
    assert gateway.errors == {"no_port": 1}
    assert gateway.sessions.counters.outbound["udp"].dropped == 1
    assert [gateway.send(inside, SERVER) for inside in endpoints] == mapped
    assert all(gateway.lets_in(SERVER, endpoint) for endpoint in mapped)

    gateway.passes(301)
    assert gateway.sessions.ports_free(UDP) == len(THREE_PORTS)
    assert gateway.send(NEIGHBOUR, SERVER)[1] in THREE_PORTS


def test_out_of_udp_ports_tcp_has_its_own() -> None:
    gateway = Gateway(ports=range(61000, 61001))
    gateway.send(INSIDE, SERVER)
    assert gateway.out(udp(NEIGHBOUR, SERVER)) is None
    assert gateway.out(tcp(NEIGHBOUR, SERVER, SYN)) is not None
    assert gateway.out(query(NEIGHBOUR, SERVER[0])) is not None


def test_no_more_entries_are_made_than_there_is_room_for() -> None:
    gateway = Gateway(max_entries=2)
    for server in (SERVER, OTHER_SERVER):
        assert gateway.lets_in(server, gateway.send(INSIDE, server))
    assert gateway.out(udp(NEIGHBOUR, SERVER)) is None
    assert gateway.errors == {"no_room": 1}
    gateway.send(INSIDE, SERVER)
    gateway.passes(301)
    gateway.send(NEIGHBOUR, SERVER)


# -- mappings and filterings ----------------------------------------------------------


@pytest.mark.parametrize(
    ("mapping", "mapped_alike"),
    [
        (EI, {(SERVER, SERVER_OTHER_PORT), (SERVER, OTHER_SERVER)}),
        (AD, {(SERVER, SERVER_OTHER_PORT)}),
        (APD, set()),
    ],
)
def test_sessions_of_one_inside_endpoint_share_a_port_as_the_mapping_has_it(
    mapping: str, mapped_alike: set[tuple[Endpoint, Endpoint]]
) -> None:
    gateway = Gateway(mapping=mapping)
    mapped = {server: gateway.send(INSIDE, server) for server in SERVERS}
    assert {
        (SERVER, other) for other in SERVERS[1:] if mapped[other] == mapped[SERVER]
    } == mapped_alike


@pytest.mark.parametrize(
    ("filtering", "admitted"),
    [
        (EI, {SERVER, SERVER_OTHER_PORT, OTHER_SERVER}),
        (AD, {SERVER, SERVER_OTHER_PORT}),
        (APD, {SERVER}),
    ],
)
def test_a_port_in_use_admits_whom_the_filtering_admits(
    filtering: str, admitted: set[Endpoint]
) -> None:
    gateway = Gateway(filtering=filtering)
    mapped = gateway.send(INSIDE, SERVER)
    assert {server for server in SERVERS if gateway.lets_in(server, mapped)} == admitted


def test_who_was_admitted_is_answered_from_the_same_port() -> None:
    gateway = Gateway(filtering=EI)
    mapped = gateway.send(INSIDE, SERVER)
    assert gateway.lets_in(OTHER_SERVER, mapped)
    assert gateway.send(INSIDE, OTHER_SERVER) == mapped


@pytest.mark.parametrize(("flags", "admitted"), [(SYN, True), (ACK, False), (SYN | ACK, False)])
def test_over_tcp_only_the_first_segment_of_a_connection_is_admitted(
    flags: int, admitted: bool
) -> None:
    gateway = Gateway(filtering=EI)
    sent = gateway.out(tcp(INSIDE, SERVER, SYN))
    assert sent is not None
    packet = tcp(OTHER_SERVER, source(sent), flags)
    assert (gateway.into(packet) is not packet) == admitted


def test_with_address_and_port_dependent_mapping_a_port_serves_many_destinations() -> None:
    gateway = Gateway(mapping=APD, ports=range(61000, 61001))
    mapped = [gateway.send(INSIDE, SERVER), gateway.send(NEIGHBOUR, OTHER_SERVER)]
    assert mapped == [(GATEWAY, 61000)] * 2
    assert gateway.into(udp(SERVER, mapped[0])) == udp(SERVER, INSIDE)
    assert gateway.into(udp(OTHER_SERVER, mapped[1])) == udp(OTHER_SERVER, NEIGHBOUR)
    assert gateway.out(udp(NEIGHBOUR, SERVER)) is None


@pytest.mark.parametrize("mapping", [AD, APD])
def test_a_packet_from_outside_cannot_move_a_session_to_another_port(mapping: str) -> None:
    gateway = Gateway(mapping=mapping, filtering=EI)
    first, mapped = gateway.send(INSIDE, SERVER), gateway.send(INSIDE, OTHER_SERVER)
    assert gateway.lets_in(OTHER_SERVER, mapped)
    gateway.lets_in(OTHER_SERVER, first)
    assert gateway.send(INSIDE, OTHER_SERVER) == mapped


def test_preserve_keeps_the_inside_port_where_it_can() -> None:
    gateway = Gateway(port_selection="preserve")
    assert gateway.send((INSIDE[0], 62000), SERVER) == (GATEWAY, 62000)
    assert gateway.send((NEIGHBOUR[0], 62000), SERVER)[1] in set(PORTS) - {62000}


# -- the gateway's address changes ----------------------------------------------------


def test_a_session_without_a_reply_moves_to_the_gateway_s_new_address(gateway: Gateway) -> None:
    old = gateway.send(INSIDE, SERVER)
    gateway.address = NEW_ADDRESS
    new = gateway.send(INSIDE, SERVER)
    assert new == (NEW_ADDRESS, old[1])
    assert not gateway.lets_in(SERVER, old)
    assert gateway.lets_in(SERVER, new)
    assert gateway.sessions.entry_count(UDP) == 1


def test_a_session_that_finds_its_port_taken_on_the_new_address_gets_another() -> None:
    gateway = Gateway(port_selection="preserve")
    gateway.address = NEW_ADDRESS
    taken = gateway.send((NEIGHBOUR[0], 61000), SERVER)
    gateway.address = GATEWAY
    assert gateway.send((INSIDE[0], 61000), SERVER) == (GATEWAY, taken[1])
    gateway.address = NEW_ADDRESS
    moved = gateway.send((INSIDE[0], 61000), SERVER)
    assert moved[0] == NEW_ADDRESS
    assert moved != taken


def test_a_session_that_finds_no_port_on_the_new_address_is_refused_and_counted() -> None:
    gateway = Gateway(ports=range(61000, 61001))
    gateway.send(INSIDE, SERVER)
    gateway.address = NEW_ADDRESS
    gateway.send(NEIGHBOUR, SERVER)
    assert gateway.out(udp(INSIDE, SERVER)) is None
    assert gateway.errors == {"no_port": 1}


# -- the fast way is the plain way ----------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["out", "into", "out", "into", "time", "address"]),
        st.sampled_from([INSIDE, INSIDE, NEIGHBOUR]),
        st.sampled_from([SERVER, SERVER, OTHER_SERVER]),
        st.sampled_from([TCP, UDP, TCP, UDP, ICMP]),
        st.integers(0, 255),
        st.binary(max_size=9),
        st.booleans(),
    ),
    min_size=20,
    max_size=40,
)
ESTABLISHING = [
    (way, inside, SERVER, protocol, flags, b"", False)
    for inside in (INSIDE, NEIGHBOUR)
    for protocol in (TCP, UDP)
    for way, flags in (("out", SYN), ("into", SYN | ACK), ("into", ACK))
]


def play(gateway: Gateway, steps: list[tuple[Any, ...]]) -> list[object]:
    """List what becomes of each packet, and of the entries, in a row of arbitrary events."""
    mapped: dict[tuple[Endpoint, int], Endpoint] = {}
    seen: list[object] = []
    for what, inside, outside, protocol, flags, payload, odd in steps:
        if what == "time":
            gateway.passes(flags)
            continue
        if what == "address":
            gateway.address = NEW_ADDRESS if odd else GATEWAY
            continue
        here = inside if what == "out" else mapped.get((inside, protocol), (GATEWAY, 61000))
        src, dst = (here, outside) if what == "out" else (outside, here)
        if protocol == TCP:
            packet = tcp(src, dst, ACK if odd else flags, payload)
        elif protocol == UDP:
            packet = udp(src, dst, payload, checksum=odd)
        else:
            packet = query(here, outside[0]) if what == "out" else reply(outside[0], here)
        if flags == 255:
            packet = packet[:-1]
        outcome = gateway.out(packet) if what == "out" else gateway.into(packet)
        if what == "out" and outcome is not None:
            mapped[inside, protocol] = source(outcome)
        seen.append(outcome)
    names = (
        "mport", "state", "flags", "timer", "timeout", "packets_out", "packets_in", "bytes_out",
        "bytes_in",
    )  # fmt: skip
    seen.append([[getattr(ms, name) for name in names] for ms in gateway.sessions.entries()])
    seen += [
        {name: (row.accepted, row.dropped, row.bytes) for name, row in traffic.items()}
        for traffic in (
            gateway.sessions.counters.outbound,
            gateway.sessions.counters.inbound,
        )
    ]
    return [*seen, gateway.errors]


@settings(max_examples=150, deadline=None)
@given(STEPS, st.sampled_from(BEHAVIOURS), st.sampled_from(BEHAVIOURS))
def test_the_fast_way_does_what_the_plain_way_does(
    steps: list[tuple[Any, ...]], mapping: str, filtering: str
) -> None:
    fast = Gateway(mapping=mapping, filtering=filtering)
    plain = Gateway(mapping=mapping, filtering=filtering, fast=False)
    steps = ESTABLISHING + steps
    assert play(fast, steps) == play(plain, steps)


# -- whatever comes -------------------------------------------------------------------


def busy_gateway(**settings: Any) -> Gateway:
    """Make a gateway with an established session of each protocol."""
    gateway = Gateway(**settings)
    for packet in (tcp(INSIDE, SERVER, SYN), udp(INSIDE, SERVER), query(INSIDE, SERVER[0])):
        assert gateway.out(packet) is not None
    for _ in range(2):
        for answer in FROM_OUTSIDE[:3]:
            assert gateway.into(answer) is not answer
    return gateway


FROM_INSIDE = [
    tcp(INSIDE, SERVER, ACK, b"data", tcp_options=b"\x05\x0a" + bytes(8) + b"\x01\x01"),
    udp(INSIDE, SERVER, b"data"),
    udp(INSIDE, SERVER, b"data", options=b"\x94\x04\x00\x00", checksum=False),
    query(INSIDE, SERVER[0]),
    error(INSIDE[0], SERVER[0], cut(udp(SERVER, INSIDE))),
    error(INSIDE[0], SERVER[0], tcp(SERVER, INSIDE, ACK, b"data")),
    error(INSIDE[0], SERVER[0], cut(reply(SERVER[0], INSIDE))),
]
FROM_OUTSIDE = [
    tcp(SERVER, (GATEWAY, 61000), SYN | ACK, b"data"),
    udp(SERVER, (GATEWAY, 61001), b"data"),
    reply(SERVER[0], (GATEWAY, 61002)),
    error("192.0.2.9", GATEWAY, cut(tcp((GATEWAY, 61000), SERVER))),
    error("192.0.2.9", GATEWAY, udp((GATEWAY, 61001), SERVER, b"data")),
    error("192.0.2.9", GATEWAY, cut(query((GATEWAY, 61002), SERVER[0]))),
]
OF_THE_GATEWAY = [
    error(GATEWAY, SERVER[0], cut(udp(SERVER, INSIDE))),
    error(GATEWAY, SERVER[0], cut(tcp(SERVER, INSIDE))),
    error(GATEWAY, GATEWAY, cut(udp((GATEWAY, 61001), SERVER))),
]


@st.composite
def mutated(draw: st.DrawFn, packets: list[bytes]) -> bytes:
    """Draw a valid packet with some bytes changed, cut short or with something behind it.

    Half of the packets have their length and ICMP checksum put right, so that they get far.
    """
    packet = bytearray(draw(st.sampled_from(packets)))
    for _ in range(draw(st.integers(0, 4))):
        packet[draw(st.integers(0, len(packet) - 1))] = draw(st.integers(0, 255))
    packet = packet[: draw(st.one_of(st.just(len(packet)), st.integers(0, len(packet))))]
    packet += draw(st.one_of(st.just(b""), st.binary(max_size=9)))
    if draw(st.booleans()):
        return repaired(packet)
    return bytes(packet)


def repaired(packet: bytearray) -> bytes:
    """Put right the total length of a packet and, of ICMP, its checksum, as far as it goes."""
    if len(packet) >= 28:
        packet[2:4] = len(packet).to_bytes(2, "big")
        at = (packet[0] & 0x0F) * 4
        if packet[9] == ICMP and len(packet) >= at + 8:
            packet[at + 2 : at + 4] = bytes(2)
            body = bytes(packet[at:]) + bytes(len(packet) % 2)
            packet[at + 2 : at + 4] = (65535 - int.from_bytes(body, "big") % 65535).to_bytes(
                2, "big"
            )
    return bytes(packet)


def shows_nothing_inside(packet: bytes | None) -> bool:
    """Say whether a packet is dropped, or has no inside address as its source or in its quote."""
    if packet is None:
        return True
    if source_address(packet) != GATEWAY:
        return False
    if packet[9] == ICMP and packet[(packet[0] & 0x0F) * 4] in (3, 4, 11, 12):
        return not any(quoted(packet)[at : at + 3] == b"\x0a\x00\x00" for at in (12, 16))
    return True


@settings(max_examples=400)
@given(st.one_of(mutated(FROM_INSIDE), st.binary(max_size=80)))
def test_a_packet_from_inside_is_dropped_or_comes_from_the_gateway(packet: bytes) -> None:
    assert shows_nothing_inside(busy_gateway().out(packet))


@settings(max_examples=400)
@given(st.one_of(mutated(FROM_OUTSIDE + FROM_INSIDE), st.binary(max_size=80)))
def test_a_packet_from_outside_is_dropped_left_alone_or_goes_inside(packet: bytes) -> None:
    outcome = busy_gateway().into(packet)
    assert outcome is None or outcome is packet or destination(outcome)[0] == INSIDE[0]


@settings(max_examples=400)
@given(st.one_of(mutated(OF_THE_GATEWAY), st.binary(max_size=80)))
def test_the_gateway_s_own_packet_is_dropped_left_alone_or_put_right(packet: bytes) -> None:
    outcome = busy_gateway().masq.ip_fw_own(packet, 1000.0)
    if outcome is not None and outcome is not packet:
        assert len(outcome) == len(packet)


@pytest.mark.parametrize("fast", [True, False])
def test_a_udp_checksum_that_comes_to_zero_is_written_as_all_ones(fast: bool) -> None:
    gateway = busy_gateway(fast=fast)
    mapped = gateway.send(INSIDE, SERVER)
    making_zero = udp(mapped, SERVER, bytes(2))[26:28]
    sent = gateway.out(udp(INSIDE, SERVER, making_zero))
    assert sent == udp(mapped, SERVER, making_zero)
    assert sent[26:28] == b"\xff\xff"
    making_zero = udp(SERVER, INSIDE, bytes(2))[26:28]
    received = gateway.into(udp(SERVER, mapped, making_zero))
    assert received == udp(SERVER, INSIDE, making_zero)
    assert received[26:28] == b"\xff\xff"


@settings(max_examples=300)
@given(mutated(FROM_INSIDE), mutated(FROM_OUTSIDE))
def test_the_fast_way_is_as_wary_as_the_plain_way(outbound: bytes, inbound: bytes) -> None:
    fast, plain = busy_gateway(), busy_gateway(fast=False)
    plain.masq.identification = deepcopy(fast.masq.identification)
    assert fast.out(outbound) == plain.out(outbound)
    assert fast.into(inbound) == plain.into(inbound)
    assert fast.errors == plain.errors


@settings(max_examples=100)
@given(st.lists(st.one_of(mutated(FROM_INSIDE), mutated(FROM_OUTSIDE)), max_size=20))
def test_after_whatever_came_real_traffic_goes_on(packets: list[bytes]) -> None:
    gateway = busy_gateway()
    for packet in packets:
        gateway.out(packet)
        gateway.into(packet)
        gateway.masq.ip_fw_own(packet, gateway.now)
    mapped = gateway.send(("10.0.0.99", 1), ("198.51.100.200", 53))
    answer = gateway.into(udp(("198.51.100.200", 53), mapped, b"answer"))
    assert answer == udp(("198.51.100.200", 53), ("10.0.0.99", 1), b"answer")
    gateway.passes(1e6)
    assert gateway.sessions.entries() == []
    assert gateway.sessions.ports_free(UDP) == gateway.sessions.ports_free(TCP) == len(PORTS)


@given(st.sampled_from(FROM_INSIDE))
def test_a_sound_packet_goes_out_sound(packet: bytes) -> None:
    sent = busy_gateway().out(packet)
    assert sent is not None
    assert checksums_are_right(sent)


def test_many_sessions_of_one_endpoint_are_all_found(gateway: Gateway) -> None:
    servers = [(f"198.51.{n >> 8}.{n & 255}", 53) for n in range(2000)]
    mapped = {gateway.send(INSIDE, server) for server in servers}
    random.Random(0).shuffle(servers)
    (endpoint,) = mapped
    for server in servers:
        assert gateway.into(udp(server, endpoint)) == udp(server, INSIDE)
