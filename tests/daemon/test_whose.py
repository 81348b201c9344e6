"""Whose a queued packet is: its host's, whichever way it goes, or a stranger's."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.daemon.netfilter import FORWARD, PREROUTING
from nfmasq.daemon.nfnetlink import NFQA_PAYLOAD, hook_of, number_of, packet_start
from nfmasq.daemon.whose import NEWCOMERS, STRANGERS, whose_packet
from tests.gateway import INSIDE, SERVER, Gateway
from tests.packets import ACK, SYN, number, query, reply, source, tcp, udp

PACKET_HEADER, MARK, IN, OUT = 1, 3, 4, 5


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(hook: int, packet: bytes, *attributes: bytes, number: int = 1) -> bytes:
    """Make the kernel's message that brings a packet."""
    before = attribute(PACKET_HEADER, struct.pack("!IHB", number, 0x0800, hook))
    payload = struct.pack("=HH", 4 + len(packet), NFQA_PAYLOAD) + packet
    body = struct.pack("!BBH", 2, 0, 0) + before + b"".join(attributes) + payload
    return struct.pack("=IHHII", 16 + len(body), 3 << 8, 0, 0, 0) + body


attributes = st.lists(st.builds(attribute, st.integers(3, 9), st.binary(max_size=20)), max_size=5)


@given(st.integers(0, 4), st.integers(0, 2**32 - 1), attributes, st.binary(max_size=2000))
def test_a_packet_is_found_in_its_message(
    hook: int, number: int, before: list[bytes], packet: bytes
) -> None:
    whole = message(hook, packet, *before, number=number)
    start = packet_start(whole)
    assert whole[start:] == packet
    assert packet_start(whole, start) == start
    assert whole[packet_start(whole, 24) :] == packet, "where another message had its packet"
    assert (hook_of(whole), number_of(whole)) == (hook, number)


@pytest.mark.parametrize("mark", [(), (attribute(MARK, b"\0\0\0\1"),)])
def test_packets_of_a_session_are_its_inside_host_s(mark: tuple[bytes, ...]) -> None:
    gateway = Gateway()
    whose = whose_packet(gateway.masq)
    host = number(INSIDE[0])
    first = tcp(INSIDE, SERVER, SYN)
    assert whose(message(FORWARD, first, *mark)) == NEWCOMERS
    sent = gateway.out(first)
    assert sent is not None
    assert whose(message(PREROUTING, tcp(SERVER, source(sent), SYN | ACK), *mark)) == host
    gateway.into(tcp(SERVER, source(sent), SYN | ACK))
    gateway.out(tcp(INSIDE, SERVER, ACK))
    assert whose(message(FORWARD, udp(INSIDE, SERVER), *mark)) == host
    stranger = (SERVER[0], 9)
    assert whose(message(PREROUTING, tcp(stranger, source(sent)), *mark)) == STRANGERS
    assert whose(message(PREROUTING, udp(SERVER, source(sent)), *mark)) == STRANGERS


def test_the_answer_to_a_ping_is_its_inside_host_s() -> None:
    gateway = Gateway()
    sent = gateway.out(query(INSIDE, SERVER[0]))
    assert sent is not None
    answer = reply(SERVER[0], source(sent))
    assert whose_packet(gateway.masq)(message(PREROUTING, answer)) == number(INSIDE[0])


@given(st.sampled_from((FORWARD, PREROUTING)), st.binary(max_size=60))
def test_bytes_that_are_no_packet_are_somebody_s(hook: int, packet: bytes) -> None:
    whose = whose_packet(Gateway().masq)
    assert whose(message(hook, packet)) in (NEWCOMERS, STRANGERS)
