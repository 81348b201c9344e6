"""Shifted sequence numbers: what one side sent and the other acknowledges stay the same bytes."""

from __future__ import annotations

import itertools
import struct

import dpkt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nfmasq.engine.wire.header import read_header
from nfmasq.engine.wire.sequence import IpMasqSeq, fix_sequence, nearest
from tests.packets import ACK, SYN, checksums_are_right, tcp

CIRCLE = 2**32
SEQ = st.integers(0, CIRCLE - 1)
CHANGES = st.integers(-20, 20).filter(bool)
INSIDE, OUTSIDE = ("10.0.0.2", 40000), ("198.51.100.7", 21)


LONG = 40
"""Bytes of a part that is changed."""


def changed_at(seq: int, change: int) -> IpMasqSeq:
    """Make a shift with one change, of `LONG` bytes from `seq` on."""
    shift = IpMasqSeq()
    shift.begin(seq)
    then(shift, seq, change)
    return shift


def then(shift: IpMasqSeq, seq: int, change: int) -> None:
    """Have another change follow, and the stream end after it."""
    shift.change(seq, seq + LONG, bytes(LONG + change))
    shift.reach(seq + LONG)


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


@given(SEQ)
def test_nothing_is_shifted_before_a_change(seq: int) -> None:
    assert IpMasqSeq().shift(seq) == seq
    assert IpMasqSeq().unshift(seq) == seq
    assert IpMasqSeq().unshift_ack(seq) == seq


@given(SEQ, st.integers(0, 2**30), CHANGES)
def test_what_comes_up_to_the_changed_part_stays(seq: int, back: int, change: int) -> None:
    earlier = (seq - back) % CIRCLE
    assert changed_at(seq, change).shift(earlier) == earlier


@given(SEQ, st.integers(0, 2**30), CHANGES)
def test_what_comes_after_the_changed_part_is_shifted(seq: int, on: int, change: int) -> None:
    later = (seq + LONG + on) % CIRCLE
    assert changed_at(seq, change).shift(later) == (later + change) % CIRCLE


@given(SEQ, st.lists(st.tuples(st.integers(0, 1460), CHANGES), min_size=1, max_size=6))
def test_between_two_changes_the_shift_is_the_sum_of_the_earlier_ones(
    seq: int, changes: list[tuple[int, int]]
) -> None:
    shift = IpMasqSeq()
    shift.begin(seq)
    total, sums = 0, []
    for distance, change in changes:
        seq += distance
        then(shift, seq, change)
        sums.append((seq, total))
        seq, total = seq + LONG, total + change
    for number, shifted_by in [*sums, (seq, total)]:
        assert shift.shift(number % CIRCLE) == (number + shifted_by) % CIRCLE
        assert shift.unshift((number + shifted_by) % CIRCLE) == number % CIRCLE


@given(SEQ, st.integers(-(2**29), 2**29), CHANGES)
def test_unshift_is_the_inverse_of_shift_outside_the_changed_part(
    seq: int, distance: int, change: int
) -> None:
    shift = changed_at(seq, change)
    number = (seq + (distance if distance <= 0 else distance + LONG)) % CIRCLE
    assert shift.unshift(shift.shift(number)) == number


@given(SEQ, CHANGES, st.lists(st.integers(1, 2**29), min_size=20, max_size=40))
@example(seq=0, change=5, steps=[2**29] * 40)
def test_the_shift_lasts_however_far_the_stream_goes(
    seq: int, change: int, steps: list[int]
) -> None:
    """Beyond 4 GiB the numbers come round to the change again."""
    shift = changed_at(seq, change)
    for position in itertools.accumulate(steps, initial=seq + LONG):
        shift.reach(position)
        number = position % CIRCLE
        assert shift.shift(number) == (number + change) % CIRCLE
        assert shift.unshift((number + change) % CIRCLE) == number


@given(SEQ, SEQ)
def test_the_nearest_position_with_a_number_is_less_than_half_the_circle_away(
    number: int, position: int
) -> None:
    nearest_position = nearest(number, position)
    assert nearest_position % CIRCLE == number
    assert -(2**31) <= nearest_position - position < 2**31


# -- what is acknowledged -------------------------------------------------------------


@given(SEQ, CHANGES, st.data())
def test_of_a_change_all_bytes_are_acknowledged_or_none(
    seq: int, change: int, data: st.DataObject
) -> None:
    shift = changed_at(seq, change)
    within = data.draw(st.integers(0, LONG + change - 1))
    assert shift.unshift_ack((seq + within) % CIRCLE) == seq
    assert shift.unshift_ack((seq + LONG + change) % CIRCLE) == (seq + LONG) % CIRCLE


def test_the_sender_is_told_of_held_bytes_when_the_receiver_has_all_before_them() -> None:
    shift = IpMasqSeq()
    shift.begin(1000)
    shift.reach(1010, held=5)
    assert [shift.unshift_ack(ack) for ack in (1009, 1010)] == [1009, 1015]
    assert shift.shift(1015) == 1010


@pytest.mark.parametrize("sent", ["held back", "released"])
def test_the_sender_is_never_told_of_less_than_before(sent: str) -> None:
    shift = IpMasqSeq()
    shift.begin(1000)
    shift.reach(1010, held=5)
    assert shift.unshift_ack(1010) == 1015
    if sent == "released":
        shift.change(1010, 1020, b"much longer than it was")
        shift.reach(1020)
    assert shift.unshift_ack(1010) == 1015
    assert shift.unshift_ack(1008) == 1008  # an older packet


def test_what_was_not_sent_cannot_be_acknowledged() -> None:
    """Whoever guesses a number must not have what is not received forgotten."""
    shift = changed_at(1000, 5)
    shift.unshift_ack(1000 + LONG + 6)
    assert shift.received < 1000
    assert shift.unshift_ack(1000) == 1000


def test_changes_that_the_receiver_has_are_forgotten_except_the_last() -> None:
    shift = changed_at(1000, 1)
    for n in range(1, 10):
        then(shift, 1000 + n * LONG, 1)
    for n in range(10):
        shift.unshift_ack(1000 + (n + 1) * (LONG + 1))
        assert len(shift.changes) == max(9 - n, 1)
    assert shift.forgotten == 1000 + 9 * LONG


@pytest.mark.parametrize(
    ("block", "passes_as"),
    [
        ((1010, 1020), (1010, 1020)),
        ((1010, 1110), (1010, 1100)),  # the part from 1100 to 1140 has become longer
        ((1110, 1160), (1140, 1150)),
        ((1110, 1120), None),
        ((1010, 1160), (1010, 1150)),
        ((1000, 1020), (1001, 1020)),
        ((1000, 1001), None),
    ],
)
def test_a_block_has_no_part_of_a_change_and_not_the_next_byte(
    block: tuple[int, int], passes_as: tuple[int, int] | None
) -> None:
    shift = IpMasqSeq()
    shift.begin(1000)
    then(shift, 1100, 10)
    shift.reach(1200)
    shift.unshift_ack(1000)
    assert shift.unshift_block(*block) == passes_as


# -- in a packet --------------------------------------------------------------------


@given(SEQ, SEQ, SEQ, CHANGES, SEQ, CHANGES, st.binary(max_size=9))
def test_a_packet_is_shifted_with_what_it_acknowledges_and_its_checksum_follows(
    seq: int, ack: int, own: int, change: int, other: int, other_change: int, payload: bytes
) -> None:
    packet = tcp(INSIDE, OUTSIDE, ACK, payload, seq=seq, ack=ack)
    shifted = fixed(packet, changed_at(own, change), changed_at(other, other_change))
    expected = (
        changed_at(own, change).shift(seq),
        changed_at(other, other_change).unshift_ack(ack),
    )
    assert sequence_numbers(shifted) == expected
    assert shifted == tcp(INSIDE, OUTSIDE, ACK, payload, seq=expected[0], ack=expected[1])


def test_an_acknowledgement_number_without_the_flag_is_left_alone() -> None:
    packet = tcp(INSIDE, OUTSIDE, SYN, seq=100, ack=5000)
    assert fixed(packet, None, changed_at(1000, 8)) == packet


@given(
    st.integers(0, 3),
    st.lists(st.integers(0, 5000), min_size=1, max_size=4),
    SEQ,
    CHANGES,
)
def test_sack_blocks_are_shifted_back_wherever_they_stand(
    padding: int, begins: list[int], seq: int, change: int
) -> None:
    """The place of a block of which nothing is left is filled up."""
    shift = changed_at(seq, change)
    shift.reach(seq + 6000)
    blocks = [((seq + at) % CIRCLE, (seq + at + 30) % CIRCLE) for at in begins[: 4 - (padding > 2)]]
    options = b"\x01" * padding + sack(*itertools.chain(*blocks))
    options += bytes(-len(options) % 4)
    packet = tcp(INSIDE, OUTSIDE, ACK, b"odd", ack=seq, tcp_options=options)
    shifted = fixed(packet, None, shift)
    left = [shift.unshift_block(*block) for block in blocks]
    assert sack_edges(shifted) == list(itertools.chain(*filter(None, left)))
    assert checksums_are_right(shifted)


def test_sack_blocks_after_other_options_are_found() -> None:
    timestamp = struct.pack("!BBII", 8, 10, 1111, 2222)
    options = timestamp + sack(5000, 6000) + sack(7000, 8000) + b"\x01\x00"
    packet = tcp(INSIDE, OUTSIDE, ACK, tcp_options=options)
    shift = changed_at(1000, 8)
    shift.reach(9000)
    shifted = fixed(packet, None, shift)
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
