"""A rewritten stream: however it is cut, lost and sent again, both ends agree on what was said."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.apps.lines import LONGEST, Lines
from nfmasq.engine import TCP
from nfmasq.engine.helper.app import Packet, Session
from nfmasq.engine.helper.stream import MAY_GROW_TO, MOST_UNITS
from nfmasq.engine.wire.sequence import CHANGES_REMEMBERED
from tests.apps.connection import CIRCLE, Connection, End, parsed
from tests.gateway import INSIDE, SERVER, Gateway
from tests.packets import ACK, FIN, RST, SYN, URG, tcp

WORDS = {b"grow": b"grown very much longer", b"shrink": b"s", b"same": b"SAME"}


def rewritten(line: bytes) -> bytes:
    word = line.rstrip(b"\n")
    return line.replace(word, WORDS[word]) if word in WORDS else line


def may_be_a_word(start: bytes) -> bool:
    return any(word.startswith(start) for word in WORDS)


class Longer:
    """A helper that replaces lines of one word, in both directions."""

    name = "longer"
    protocol = TCP
    ports = (443,)

    def bind(self, session: Session) -> None:
        out, into = (Lines(rewritten, may_be_a_word) for _ in range(2))
        session.data = session.stream_out(out), session.stream_in(into)

    def unbind(self, session: Session) -> None:
        session.data = None

    def packet_out(self, session: Session, packet: Packet) -> None:
        session.data[0].rewrite(packet)

    def packet_in(self, session: Session, packet: Packet) -> None:
        session.data[1].rewrite(packet)


def gateway() -> Gateway:
    return Gateway(apps={(TCP, 443): Longer()})


def connection(first_seqs: tuple[int, int] = (1000, 2000)) -> Connection:
    return Connection(gateway(), INSIDE, SERVER, first_seqs=first_seqs)


def leave_alone(over: Connection) -> None:
    """Leave a connection alone from here on."""
    (entry,) = over.gateway.sessions.entries()
    for stream in entry.app_data.data:
        stream.leave_alone()


def in_order(text: bytes) -> bytes:
    """Return what a text becomes, line by line."""
    return b"".join(map(rewritten, text.splitlines(keepends=True)))


LINES = st.sampled_from([*WORDS, b"", b"grow!", b"gro", b"a grow", b"other", b"grow\r"])
TEXTS = st.lists(LINES, max_size=12).map(lambda lines: b"".join(line + b"\n" for line in lines))
SEQS = st.one_of(st.integers(0, CIRCLE - 1), st.integers(CIRCLE - 40, CIRCLE - 1))
SIZES = st.one_of(st.integers(1, 12), st.just(200))
WHAT_HAPPENS = st.lists(
    st.tuples(
        st.sampled_from(["new", "new", "again", "acknowledge", "deliver", "deliver", "lose"]),
        st.booleans(),
        SIZES,
    ),
    max_size=60,
)


@pytest.mark.parametrize("memory", [2, CHANGES_REMEMBERED])
@given(out=TEXTS, into=TEXTS, first_seqs=st.tuples(SEQS, SEQS), steps=WHAT_HAPPENS, last_size=SIZES)
def test_both_ends_agree_whatever_the_wire_does(
    memory: int,
    out: bytes,
    into: bytes,
    first_seqs: tuple[int, int],
    steps: list[Any],
    last_size: int,
) -> None:
    """Pieces have any size, get lost, overtake each other, and are sent again cut differently."""
    with patch("nfmasq.engine.helper.stream.CHANGES_REMEMBERED", memory):
        both_ends_agree(out, into, first_seqs, steps, last_size)


def both_ends_agree(
    out: bytes, into: bytes, first_seqs: tuple[int, int], steps: list[Any], last_size: int
) -> None:
    wire: list[tuple[End, bytes]] = []
    over = connection(first_seqs)
    over.inside.says(out)
    over.outside.says(into)
    for what, is_inside, size in steps:
        end = over.inside if is_inside else over.outside
        if what == "new":
            wire.append((end, over.packet(end, *end.next_piece(size))))
        elif what == "again":
            wire.append((end, over.packet(end, *end.first_again(size))))
        elif what == "acknowledge":
            wire.append((end, over.packet(end, end.sent, b"")))
        elif wire:
            sender, packet = wire.pop(size % len(wire))
            if what == "deliver":
                over.arrives(sender, packet)
    over.finish(last_size)
    assert over.outside.received == in_order(out)
    assert over.inside.received == in_order(into)
    assert (over.inside.acknowledged, over.outside.acknowledged) == (len(out), len(into))


@given(TEXTS, st.integers(1, 8), st.integers(0, 3))
def test_a_person_who_types_and_waits_for_each_acknowledgement_gets_on(
    text: bytes, size: int, losing: int
) -> None:
    """As Nagle's algorithm has it: nothing is sent while something is not acknowledged."""
    over = connection()
    over.inside.says(text)
    for n in range(8 * len(text)):
        end = over.inside
        waiting = end.acknowledged < end.sent
        at, piece = end.first_again(LONGEST) if waiting else end.next_piece(size)
        if losing and n % 4 < losing:
            over.put_through(end, over.packet(end, at, piece))  # lost behind the gateway
        else:
            over.goes(end, at, piece)
            over.acknowledges(over.outside)
    assert over.outside.received == in_order(text)
    assert over.inside.acknowledged == len(text)


@given(
    before=TEXTS,
    line=st.sampled_from([b"^\n", b"gr^\n", b"other ^ line\n"]),
    after=TEXTS,
    sizes=st.lists(st.integers(1, 12), min_size=1),
    lost=st.lists(st.booleans()),
    first_seqs=st.tuples(SEQS, SEQS),
)
def test_the_urgent_byte_stays_urgent_and_no_other_byte_is(
    before: bytes,
    line: bytes,
    after: bytes,
    sizes: list[int],
    lost: list[bool],
    first_seqs: tuple[int, int],
) -> None:
    """As telnet's Synch, with which FTP clients abort a transfer (RFC 959, RFC 6093)."""
    over = connection(first_seqs)
    end = over.inside
    end.says(before + line + after)
    urgent_up_to = end.text.index(b"^") + 1
    urgent_ends = set()
    for n in range(6 * len(end.text)):
        is_waiting = end.acknowledged < end.sent
        at, piece = end.first_again(50) if is_waiting else end.next_piece(sizes[n % len(sizes)])
        packet = over.packet(end, at, piece, urgent=max(urgent_up_to - at, 0))
        arrived = over.put_through(end, packet)
        if arrived is not None and not (n < len(lost) and lost[n]):
            segment = parsed(arrived)
            over.outside.take(segment)
            assert (segment.flags & URG != 0) == (segment.urp != 0)
            if segment.urp:
                urgent_ends.add((segment.seq + segment.urp - end.first) % CIRCLE)
        over.acknowledges(over.outside)
    assert over.outside.received == in_order(end.text)
    assert urgent_ends == {over.outside.received.index(b"^") + 1}


def test_a_stream_without_anything_to_rewrite_passes_as_it_is() -> None:
    over = connection()
    for piece in (b"other\nan", b"other line\n", b"xyz"):
        assert over.say(over.inside, piece) == piece
    assert over.inside.acknowledged == over.inside.sent


def test_a_segment_before_its_predecessors_is_dropped() -> None:
    over = connection()
    over.inside.says(b"grow\nother\n")
    over.inside.next_piece(100)
    assert over.goes(over.inside, 5, b"other\n") is None
    assert over.gateway.errors == {"out_of_order": 1}
    over.finish()
    assert over.outside.received == in_order(b"grow\nother\n")


def test_the_start_of_a_line_is_acknowledged_while_it_is_held_back() -> None:
    over = connection()
    assert over.say(over.inside, b"other\ngro") == b"other\n"
    assert over.inside.acknowledged == len(b"other\ngro")
    assert over.say(over.inside, b"w\n") == WORDS[b"grow"] + b"\n"


def test_to_the_receiver_nothing_was_sent_that_is_held_back() -> None:
    over = connection()
    over.say(over.inside, b"other\ngro")
    acknowledging = over.put_through(over.inside, over.packet(over.inside, over.inside.sent, b""))
    assert acknowledging == tcp(over.mapped, SERVER, ACK, seq=1001 + len(b"other\n"), ack=2001)


def test_of_a_segment_that_is_held_back_whole_the_byte_before_goes_again() -> None:
    over = connection()
    over.say(over.inside, b"other\n")
    over.inside.says(b"gr")
    arrived = over.goes(over.inside, *over.inside.next_piece(2))
    expected = tcp(over.mapped, SERVER, ACK, b"\n", seq=1001 + 5, ack=2001)
    assert arrived == expected
    over.acknowledges(over.outside)
    assert over.inside.acknowledged == over.inside.sent


def test_a_line_that_never_ends_passes_when_the_connection_ends() -> None:
    over = connection()
    assert over.say(over.inside, b"gro") == b""
    over.ends(over.inside)
    assert over.outside.received == b"gro"
    # The FIN, when it is sent again, brings the line again.
    again = over.put_through(over.inside, over.packet(over.inside, 3, b"", FIN | ACK))
    assert again == tcp(over.mapped, SERVER, FIN | ACK, b"gro", seq=1001, ack=2001)


def test_a_very_long_line_is_not_held_back() -> None:
    over = connection()
    long = b"x" * (LONGEST + 10)
    assert over.say(over.inside, long) == long
    assert over.say(over.inside, b"\ngrow\n") == b"\n" + in_order(b"grow\n")


def test_what_a_long_segment_has_no_room_for_is_sent_again() -> None:
    """A superpacket is as long as a packet can be; a segment, as the path allows."""
    over = connection()
    text = b"grow\n" * 40 + (b"x" * 325 + b"\n") * 200
    over.inside.says(text)
    arrived = over.goes(over.inside, *over.inside.next_piece(len(text)))
    assert arrived is not None
    assert len(arrived) == 40 + len(text) > 65_400
    over.finish(65_495)
    assert over.outside.received == in_order(text)
    assert over.inside.acknowledged == len(text)


def test_a_connection_does_not_end_with_a_segment_that_lost_its_end() -> None:
    over = connection()
    text = b"grow\n" * 60 + b"other\n" * 150
    over.inside.says(text)
    over.inside.next_piece(len(text))
    arrived = over.goes(over.inside, 0, text, FIN | ACK)
    assert arrived is not None
    assert parsed(arrived).flags == ACK
    over.finish()
    again = over.goes(over.inside, len(text) - 6, text[-6:], FIN | ACK)
    assert again is not None
    assert parsed(again).flags == FIN | ACK
    assert over.outside.received == in_order(text)


def test_more_units_than_can_be_remembered_go_by_and_by() -> None:
    over = connection()
    text = b"grow\n" * 10 * CHANGES_REMEMBERED
    over.inside.says(text)
    arrived = over.goes(over.inside, *over.inside.next_piece(len(text)))
    assert arrived is not None
    assert parsed(arrived).data == in_order(b"grow\n" * CHANGES_REMEMBERED)
    over.finish(1460)
    assert over.outside.received == in_order(text)
    assert over.inside.acknowledged == len(text)


def test_of_a_segment_with_very_many_units_the_rest_is_sent_again() -> None:
    over = connection()
    text = b"\n" * 3 * MOST_UNITS
    over.inside.says(text)
    arrived = over.goes(over.inside, *over.inside.next_piece(len(text)))
    assert arrived is not None
    assert parsed(arrived).data == b"\n" * MOST_UNITS
    over.finish(len(text))
    assert over.outside.received == text


def test_a_helper_that_fails_at_a_unit_is_asked_for_this_unit_again() -> None:
    over = connection()
    (entry,) = over.gateway.sessions.entries()
    with (
        patch.object(
            entry.app_data.data[0]._units, "_rewrite", side_effect=[b"GROWN\n", ZeroDivisionError]
        ),
        pytest.raises(ZeroDivisionError),
    ):
        over.say(over.inside, b"grow\nsame\n")
    over.finish()
    assert over.outside.received == b"GROWN\n" + in_order(b"same\n")


def test_a_unit_that_grows_very_long_goes_over_in_parts() -> None:
    over = connection()
    with patch.dict(WORDS, {b"grow": b"x" * 3 * MAY_GROW_TO}):
        over.say(over.inside, b"other\ngr")
        over.inside.says(b"ow\nsame\n")
        over.finish()
        assert over.outside.received == in_order(b"other\ngrow\nsame\n")
    assert over.inside.acknowledged == over.inside.sent


@pytest.mark.parametrize("more", [1, 300, LONGEST, 65_000])
def test_what_is_held_back_goes_on_when_the_connection_is_left_alone(more: int) -> None:
    over = connection()
    assert over.say(over.inside, b"gr") == b""
    leave_alone(over)
    text = b"ow\n" + b"x" * more
    over.inside.says(text)
    over.finish(len(text))
    assert over.outside.received == b"gr" + text
    assert over.inside.acknowledged == over.inside.sent


def test_what_is_held_back_goes_with_an_acknowledgement_when_the_sender_has_said_all() -> None:
    over = connection()
    assert over.say(over.inside, b"gr") == b""
    leave_alone(over)
    over.say(over.outside, b"what is it?\n")
    over.acknowledges(over.inside)
    assert over.outside.received == b"gr"
    over.acknowledges(over.outside)
    acknowledging = over.put_through(over.inside, over.packet(over.inside, 2, b""))
    assert acknowledging is not None
    assert parsed(acknowledging).data == b""


def test_bytes_from_long_ago_do_not_come_again_as_others() -> None:
    over = connection()
    over.say(over.inside, b"grow\nshrink\n")
    leave_alone(over)
    over.say(over.inside, b"grow\nas it is")
    assert over.goes(over.inside, 0, b"grow\n") is not None
    assert over.outside.received == in_order(b"grow\nshrink\n") + b"grow\nas it is"


def test_a_syn_that_comes_again_changes_nothing() -> None:
    over = connection()
    over.outside.says(b"grow\nsame\n")
    over.goes(over.outside, *over.outside.next_piece(5))
    answer = tcp(SERVER, over.mapped, SYN | ACK, seq=2000, ack=over.inside.first)
    assert over.gateway.into(answer) is not None
    over.finish()
    assert over.inside.received == in_order(b"grow\nsame\n")


def test_a_reset_has_no_payload_and_the_number_that_the_receiver_expects() -> None:
    over = connection()
    over.say(over.inside, b"other\ngr")
    reset = over.put_through(over.inside, over.packet(over.inside, 8, b"bye", RST | ACK))
    assert reset == tcp(over.mapped, SERVER, RST | ACK, seq=1001 + 6, ack=2001)


def test_a_segment_whose_acknowledgement_was_lost_is_acknowledged_when_it_comes_again() -> None:
    over = connection()
    text = b"grow\nother\n"
    over.say(over.inside, text)
    over.say(over.inside, b"grow\n")
    again = over.goes(over.inside, 0, text)
    assert again is not None
    assert parsed(again).data == b"other\n"  # what was changed before it is known to have arrived
    assert over.outside.received == in_order(text + b"grow\n")


def test_a_short_segment_grows() -> None:
    over = connection()
    text = b"grow\n" * 50
    over.inside.says(text)
    arrived = over.goes(over.inside, *over.inside.next_piece(len(text)))
    assert arrived is not None
    assert len(arrived) == 40 + len(in_order(text)) <= 40 + MAY_GROW_TO


def test_a_damaged_segment_is_not_read() -> None:
    over = connection()
    packet = over.packet(over.inside, 0, b"grow\n")
    assert over.gateway.out(packet[:-2] + b"x\n") is None
    assert over.gateway.errors == {"malformed": 1}
    assert over.say(over.inside, b"grow\n") == in_order(b"grow\n")


def test_another_connection_of_the_same_ends_begins_anew() -> None:
    over = connection()
    over.say(over.inside, b"grow\ngr")
    again = Connection(over.gateway, INSIDE, SERVER, first_seqs=(500_000, 600_000))
    assert again.mapped == over.mapped
    assert again.say(again.inside, b"shrink\nother\n") == b"s\nother\n"
    assert again.say(again.outside, b"grow\n") == in_order(b"grow\n")
    assert again.inside.acknowledged == again.inside.sent
