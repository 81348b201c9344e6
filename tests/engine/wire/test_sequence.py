"""Shifted sequence numbers: what one side sent and the other acknowledges stay the same bytes."""

from __future__ import annotations

import itertools
import struct

import dpkt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nfmasq.engine.wire.header import read_header
from nfmasq.engine.wire.sequence import IpMasqSeq, after, fix_sequence
from tests.packets import ACK, SYN, checksums_are_right, tcp

CIRCLE = 2**32
SEQ = st.integers(0, CIRCLE - 1)
LENGTHS = st.integers(1, 1460)
CHANGES = st.integers(-20, 20).filter(bool)
INSIDE, OUTSIDE = ("10.0.0.2", 40000), ("198.51.100.7", 21)


def changed_at(seq: int, change: int) -> IpMasqSeq:
    shift = IpMasqSeq()
    shift.note(seq, change)
    return shift


def fixed(packet: bytes, sent: IpMasqSeq | None, acknowledged: IpMasqSeq | None) -> bytes:
    rewritten = bytearray(packet)
    fix_sequence(rewritten, read_header(packet), sent, acknowledged)
    return bytes(rewritten)


def sequence_numbers(packet: bytes) -> tuple[int, int]:
    segment = dpkt.ip.IP(packet).data
    return segment.seq, segment.ack


def sack(*edges: int) -> bytes:
    """Build a SACK option (RFC 2018)."""
    return struct.pack(f"!BB{len(edges)}I", 5, 2 + 4 * len(edges), *edges)


def sack_edges(packet: bytes) -> list[int]:
    """Return the edges of the SACK blocks, as dpkt reads them."""
    options = dpkt.tcp.parse_opts(dpkt.ip.IP(packet).data.opts)
    return [
        edge
        for kind, value in options
        if kind == dpkt.tcp.TCP_OPT_SACK
        for (edge,) in struct.iter_unpack("!I", value)
    ]


# -- the shift ----------------------------------------------------------------------


@given(SEQ, SEQ)
def test_nothing_is_shifted_before_a_change(start: int, seq: int) -> None:
    assert IpMasqSeq().shift(seq) == seq
    assert IpMasqSeq().unshift(seq) == seq


@given(SEQ, st.integers(0, 2**30), CHANGES)
def test_what_comes_up_to_the_changed_segment_stays(seq: int, back: int, change: int) -> None:
    earlier = (seq - back) % CIRCLE
    assert changed_at(seq, change).shift(earlier) == earlier


@given(SEQ, st.integers(1, 2**30), CHANGES)
def test_what_comes_after_the_changed_segment_is_shifted(seq: int, on: int, change: int) -> None:
    later = (seq + on) % CIRCLE
    assert changed_at(seq, change).shift(later) == (later + change) % CIRCLE


@given(SEQ, st.lists(st.tuples(st.integers(21, 1460), CHANGES), min_size=2, max_size=6))
def test_between_the_last_two_changes_the_shift_is_the_sum_of_the_earlier_ones(
    seq: int, segments: list[tuple[int, int]]
) -> None:
    shift = IpMasqSeq()
    total = 0
    for length, change in segments:
        assert shift.shift(seq) == (seq + total) % CIRCLE
        shift.note(seq, change)
        assert shift.shift(seq) == (seq + total) % CIRCLE
        assert shift.previous_delta == total
        total += change
        assert shift.delta == total
        seq = (seq + length) % CIRCLE
    assert shift.shift(seq) == (seq + total) % CIRCLE


@given(SEQ, st.lists(st.tuples(st.integers(21, 1460), CHANGES), min_size=1, max_size=6))
def test_each_segment_is_acknowledged_in_the_sender_s_own_numbers(
    seq: int, segments: list[tuple[int, int]]
) -> None:
    """The receiver acknowledges the end of a segment; the sender hears its own number for it."""
    shift = IpMasqSeq()
    for length, change in segments:
        shift.note(seq, change)
        received_to = (shift.shift(seq) + length + change) % CIRCLE
        seq = (seq + length) % CIRCLE
        assert shift.unshift(received_to) == seq
        assert shift.shift(seq) == received_to


@given(SEQ, st.integers(-(2**29), 2**29), LENGTHS.filter(lambda n: n > 20), CHANGES)
def test_unshift_is_the_inverse_of_shift_outside_the_changed_segment(
    seq: int, distance: int, length: int, change: int
) -> None:
    shift = changed_at(seq, change)
    number = (seq + (distance if distance <= 0 else distance + length)) % CIRCLE
    assert shift.unshift(shift.shift(number)) == number


@given(SEQ, CHANGES, CHANGES, st.integers(1, 2**20))
def test_retransmissions_add_nothing(seq: int, first: int, second: int, on: int) -> None:
    shift = changed_at(seq, first)
    shift.note(seq, first)
    assert shift.delta == first
    later = (seq + on) % CIRCLE
    shift.note(later, second)
    shift.note(later, second)
    shift.note(seq, first)
    assert (shift.previous_delta, shift.delta) == (first, first + second)


@given(SEQ, CHANGES, st.integers(1, 1460))
def test_a_segment_that_keeps_its_length_is_no_change(seq: int, change: int, on: int) -> None:
    shift = changed_at(seq, change)
    shift.note((seq + on) % CIRCLE, 0)
    assert (shift.init_seq, shift.previous_delta, shift.delta) == (seq, 0, change)


@given(SEQ, CHANGES, st.lists(st.integers(1, 2**29), min_size=20, max_size=40))
@example(seq=0, change=5, steps=[2**29] * 40)
def test_the_shift_lasts_however_far_the_stream_goes(
    seq: int, change: int, steps: list[int]
) -> None:
    """Beyond 4 GiB the numbers come round to the change again."""
    shift = changed_at(seq, change)
    for position in itertools.accumulate(steps, initial=seq + 1):
        number = position % CIRCLE
        assert shift.shift(number) == (number + change) % CIRCLE
        assert shift.unshift((number + change + 100) % CIRCLE) == (number + 100) % CIRCLE


@given(SEQ, st.integers(1, 2**31 - 1))
def test_after_means_less_than_half_the_circle_ahead(seq: int, on: int) -> None:
    assert after((seq + on) % CIRCLE, seq)
    assert not after(seq, (seq + on) % CIRCLE)
    assert not after(seq, seq)


# -- in a packet --------------------------------------------------------------------


@given(SEQ, SEQ, SEQ, CHANGES, SEQ, CHANGES, st.binary(max_size=9))
def test_a_packet_is_shifted_with_what_it_acknowledges_and_its_checksum_follows(
    seq: int, ack: int, own: int, change: int, other: int, other_change: int, payload: bytes
) -> None:
    packet = tcp(INSIDE, OUTSIDE, ACK, payload, seq=seq, ack=ack)
    shifted = fixed(packet, changed_at(own, change), changed_at(other, other_change))
    expected = changed_at(own, change).shift(seq), changed_at(other, other_change).unshift(ack)
    assert sequence_numbers(shifted) == expected
    assert shifted == tcp(INSIDE, OUTSIDE, ACK, payload, seq=expected[0], ack=expected[1])


def test_an_acknowledgement_number_without_the_flag_is_left_alone() -> None:
    packet = tcp(INSIDE, OUTSIDE, SYN, seq=100, ack=5000)
    assert fixed(packet, None, changed_at(1000, 8)) == packet


@given(
    st.integers(0, 3),
    st.lists(SEQ, min_size=1, max_size=4).map(lambda starts: [n for s in starts for n in (s, s)]),
    SEQ,
    CHANGES,
)
def test_sack_blocks_are_shifted_back_wherever_they_stand(
    padding: int, edges: list[int], seq: int, change: int
) -> None:
    if padding + 2 + 4 * len(edges) > 40:
        edges = edges[:6]
    options = b"\x01" * padding + sack(*edges)
    options += bytes(-len(options) % 4)
    packet = tcp(INSIDE, OUTSIDE, ACK, b"odd", tcp_options=options)
    shift = changed_at(seq, change)
    shifted = fixed(packet, None, shift)
    assert sack_edges(shifted) == [shift.unshift(edge) for edge in edges]
    assert checksums_are_right(shifted)


def test_sack_blocks_after_other_options_are_found() -> None:
    timestamp = struct.pack("!BBII", 8, 10, 1111, 2222)
    options = timestamp + sack(5000, 6000) + sack(7000, 8000) + b"\x01\x00"
    packet = tcp(INSIDE, OUTSIDE, ACK, tcp_options=options)
    shifted = fixed(packet, None, changed_at(1000, 8))
    assert sack_edges(shifted) == [4992, 5992, 6992, 7992]
    assert dpkt.ip.IP(shifted).data.opts[:10] == timestamp
    assert checksums_are_right(shifted)


@pytest.mark.parametrize(
    "options",
    [
        b"\x05\x00\x00\x00",  # of length 0: whoever steps by it never ends
        b"\x05\x01\x00\x00",
        b"\x01\x01\x01\x05",  # cut before its length
        b"\x01\x01\x05\x0a",  # longer than the header
        b"\x00\x00" + sack(5000, 6000),  # after the end of the options
    ],
)
def test_broken_options_are_left_alone(options: bytes) -> None:
    packet = tcp(INSIDE, OUTSIDE, ACK, b"payload", ack=500, tcp_options=options)
    assert fixed(packet, None, changed_at(1000, 8)) == packet


@given(st.binary(max_size=40).map(lambda options: options + bytes(-len(options) % 4)), SEQ)
def test_whatever_the_options_the_payload_is_untouched_and_the_checksum_right(
    options: bytes, seq: int
) -> None:
    packet = tcp(INSIDE, OUTSIDE, ACK, b"payload", tcp_options=options)
    shifted = fixed(packet, changed_at(seq, 3), changed_at(seq, -3))
    assert shifted.endswith(b"payload")
    assert len(shifted) == len(packet)
    assert checksums_are_right(shifted)
