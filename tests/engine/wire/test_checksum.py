"""Rewritten packets are, to the byte, what the new sender or receiver would have on the wire.

dpkt computes its checksums from scratch; the engine moves them by the difference.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nfmasq.engine.wire.checksum import adjust, checksum, difference, ones_sum
from nfmasq.engine.wire.header import read_header
from nfmasq.engine.wire.rewrite import rewrite_destination, rewrite_source
from tests.packets import (
    ECHO_REPLY,
    Endpoint,
    checksums_are_right,
    dotted,
    header_length,
    internet_checksum,
    number,
    query,
    reply,
    source,
    tcp,
    transport_checksum_is_right,
    udp,
)

# Addresses of a real host are neither all zeros nor all ones.
ADDRESSES = st.integers(1, 0xFFFFFFFE).map(dotted)
ENDPOINTS = st.tuples(ADDRESSES, st.integers(1, 65535))
PAYLOADS = st.binary(max_size=41)
IP_OPTIONS = st.sampled_from([b"", b"\x94\x04\x00\x00", b"\x01" * 40])

FAR: Endpoint = ("198.51.100.7", 443)
OLD: Endpoint = ("10.0.0.2", 40000)
NEW: Endpoint = ("203.0.113.1", 61000)


def from_new(packet: bytes, new: Endpoint) -> bytes:
    return bytes(rewrite_source(packet, read_header(packet), number(new[0]), new[1]))


def to_new(packet: bytes, new: Endpoint) -> bytes:
    return bytes(rewrite_destination(packet, read_header(packet), number(new[0]), new[1]))


@given(ENDPOINTS, ENDPOINTS, ENDPOINTS, PAYLOADS, IP_OPTIONS)
def test_a_tcp_segment_is_what_the_new_end_would_have_sent_or_received(
    old: Endpoint, new: Endpoint, far: Endpoint, payload: bytes, options: bytes
) -> None:
    def segment(src: Endpoint, dst: Endpoint) -> bytes:
        return tcp(src, dst, payload=payload, tcp_options=b"\x01\x01\x01\x00", options=options)

    assert from_new(segment(old, far), new) == segment(new, far)
    assert to_new(segment(far, old), new) == segment(far, new)


@given(ENDPOINTS, ENDPOINTS, ENDPOINTS, PAYLOADS, IP_OPTIONS, st.booleans())
def test_a_udp_datagram_is_what_the_new_end_would_have_sent_or_received(
    old: Endpoint, new: Endpoint, far: Endpoint, payload: bytes, options: bytes, summed: bool
) -> None:
    def datagram(src: Endpoint, dst: Endpoint) -> bytes:
        return udp(src, dst, payload, options=options, checksum=summed)

    assert from_new(datagram(old, far), new) == datagram(new, far)
    assert to_new(datagram(far, old), new) == datagram(far, new)


@given(ENDPOINTS, ENDPOINTS, ADDRESSES, PAYLOADS, IP_OPTIONS)
def test_an_icmp_query_and_its_reply_are_what_the_new_end_would_have_sent_or_received(
    old: Endpoint, new: Endpoint, far: str, payload: bytes, options: bytes
) -> None:
    asked = query(old, far, payload=payload, options=options)
    assert from_new(asked, new) == query(new, far, payload=payload, options=options)
    answered = reply(far, old, payload=payload, options=options)
    assert to_new(answered, new) == reply(far, new, payload=payload, options=options)


@given(ENDPOINTS, ENDPOINTS)
def test_a_udp_checksum_that_comes_to_zero_is_written_as_all_ones(
    old: Endpoint, new: Endpoint
) -> None:
    plain = udp(new, FAR, bytes(2))
    making_zero = plain[header_length(plain) + 6 :][:2]
    rewritten = from_new(udp(old, FAR, making_zero), new)
    assert rewritten == udp(new, FAR, making_zero)
    assert rewritten[26:28] == b"\xff\xff"


@given(ENDPOINTS)
def test_a_datagram_without_checksum_gets_none(new: Endpoint) -> None:
    assert from_new(udp(OLD, FAR, b"x", checksum=False), new)[26:28] == bytes(2)


@pytest.mark.parametrize("build", [tcp, udp])
@given(ENDPOINTS, st.binary(min_size=1, max_size=30), st.data())
def test_what_came_in_damaged_goes_out_damaged(
    build: Callable[..., bytes], new: Endpoint, payload: bytes, data: st.DataObject
) -> None:
    sound = build(OLD, FAR, payload=payload)
    at = data.draw(st.integers(len(sound) - len(payload), len(sound) - 1))
    damage = data.draw(st.integers(1, 255))
    damaged = bytearray(sound)
    damaged[at] ^= damage
    assert not transport_checksum_is_right(from_new(bytes(damaged), new))


def test_a_reply_of_zeros_alone_keeps_a_checksum_that_verifies() -> None:
    """This is the only message whose sum is 0: its checksum is 0xFFFF and no other."""
    answered = reply(FAR[0], NEW, ECHO_REPLY, bytes(8), sequence=0)
    assert checksums_are_right(to_new(answered, (OLD[0], 0)))


@given(st.binary(max_size=65))
def test_the_whole_checksum_is_that_of_rfc_1071(data: bytes) -> None:
    assume(any(data))
    assert checksum(data) == internet_checksum(data)


@given(st.binary(max_size=65), st.binary(max_size=64))
def test_the_sum_of_two_parts_is_the_sum_of_the_whole(left: bytes, right: bytes) -> None:
    left += bytes(len(left) % 2)
    assert ones_sum(left + right) == (ones_sum(left) + ones_sum(right)) % 65535


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
def test_a_change_and_its_reverse_leave_the_checksum_as_it_was(
    before: int, old: int, new: int
) -> None:
    after = adjust(before, difference(old, new))
    assert adjust(after, difference(new, old)) == before % 65535


@settings(max_examples=20)
@given(ENDPOINTS)
def test_there_and_back_is_the_same_packet(new: Endpoint) -> None:
    packet = tcp(OLD, FAR, payload=b"odd")
    assert source(from_new(packet, new)) == new
    assert from_new(from_new(packet, new), OLD) == packet
