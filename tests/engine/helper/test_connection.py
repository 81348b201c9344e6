"""Resets and SYNs of a connection with a helper: believed if their receiver believes them.

Everything is tried with a client inside and with a server inside, and from both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.apps import helpers
from nfmasq.engine import IpMasq
from nfmasq.engine.table.states import CLOSE, ESTABLISHED
from tests.apps.connection import Connection, End, parsed
from tests.gateway import Gateway
from tests.packets import ACK, FIN, RST, SYN, Endpoint, source, tcp

CIRCLE = 2**32
INSIDE: Endpoint = ("10.0.0.2", 40000)
INSIDE_SERVER: Endpoint = ("10.0.0.2", 21)
OUTSIDE: Endpoint = ("198.51.100.7", 50000)
OUTSIDE_SERVER: Endpoint = ("198.51.100.7", 21)

PORT = b"PORT 10,0,0,2,19,136\r\n"
PASSIVE = b"227 Entering passive mode (10,0,0,2,19,136).\r\n"

Side = str
CLIENT, SERVER = "client", "server"


@dataclass
class Talk:
    """An FTP connection that has come so far that a session is expected."""

    over: Connection
    inside_serves: bool

    @property
    def gateway(self) -> Gateway:
        return self.over.gateway

    @property
    def control(self) -> IpMasq:
        (ms,) = (ms for ms in self.gateway.sessions.entries() if ms.app is not None)
        return ms

    @property
    def expected(self) -> list[IpMasq]:
        return self.gateway.expected

    def end(self, side: Side) -> End:
        return self.over.client if side == CLIENT else self.over.server

    def sends(
        self, side: Side, flags: int, seq: int, ack: int = 0, payload: bytes = b""
    ) -> dpkt.tcp.TCP:
        """Send a segment with any numbers in the name of a side; returns it as it arrives."""
        seq, ack = seq % CIRCLE, ack % CIRCLE
        if (side == SERVER) == self.inside_serves:
            inside, outside = (
                (INSIDE_SERVER, OUTSIDE) if self.inside_serves else (INSIDE, OUTSIDE_SERVER)
            )
            sent = self.gateway.out(tcp(inside, outside, flags, payload, seq=seq, ack=ack))
        else:
            outside = OUTSIDE if self.inside_serves else OUTSIDE_SERVER
            mapped = self.over.mapped
            sent = self.gateway.into(tcp(outside, mapped, flags, payload, seq=seq, ack=ack))
        assert sent is not None
        return parsed(sent)

    def next_numbers(self, side: Side) -> tuple[int, int]:
        """Return the numbers that a side's next segment has."""
        end = self.end(side)
        return end.numbers(end.sent)

    def seen(self) -> tuple[object, ...]:
        """Return what is to be seen of the entries."""
        return tuple(
            (ms.state, ms.timer, ms.flags, ms.mport, ms.dport)
            for ms in self.gateway.sessions.entries()
        )

    def goes_on(self) -> None:
        """Have the conversation go on: announcements are rewritten, and both ends agree."""
        client, server = self.over.client, self.over.server
        if self.inside_serves:
            self.over.say(client, b"PASV\r\n")
            said = self.over.say(server, PASSIVE)
            assert said.startswith(b"227 Entering passive mode (203,0,113,1,")
        else:
            assert self.over.say(client, PORT).startswith(b"PORT 203,0,113,1,")
            self.over.say(server, b"200 Fine.\r\n")
        assert client.acknowledged == len(client.text)
        assert server.acknowledged == len(server.text)

    def opens(self, client_seq: int, server_seq: int) -> None:
        """Have the same two ends open another connection."""
        self.sends(CLIENT, SYN, client_seq)
        self.is_accepted(client_seq, server_seq)

    def is_accepted(self, client_seq: int, server_seq: int) -> None:
        """Have the server accept a SYN of the client, and the client go on with this connection."""
        answer = self.sends(SERVER, SYN | ACK, server_seq, client_seq + 1)
        assert (answer.seq, answer.ack) == (server_seq, (client_seq + 1) % CIRCLE)
        over = self.over
        over.client, over.server = End(client_seq), End(server_seq)
        over.client.peer_first, over.server.peer_first = over.server.first, over.client.first
        over.inside, over.outside = (
            (over.server, over.client) if self.inside_serves else (over.client, over.server)
        )
        over.acknowledges(over.client)


def talk(inside_serves: bool, first_seqs: tuple[int, int] = (1000, 2000)) -> Talk:
    gateway = Gateway(apps=helpers({"ftp": (21,)}))
    if inside_serves:
        over = Connection(gateway, OUTSIDE, INSIDE_SERVER, forwarded=21, first_seqs=first_seqs)
    else:
        over = Connection(gateway, INSIDE, OUTSIDE_SERVER, first_seqs=first_seqs)
    over.acknowledges(over.client)
    it = Talk(over, inside_serves)
    over.say(over.client, b"USER me\r\n")
    over.say(over.server, b"331 Who?\r\n")
    it.goes_on()
    assert it.control.state == ESTABLISHED
    assert it.expected
    return it


both = pytest.mark.parametrize("inside_serves", [False, True], ids=["client in", "server in"])
from_both = pytest.mark.parametrize("side", [CLIENT, SERVER])

SEQS = st.integers(0, CIRCLE - 1) | st.integers(CIRCLE - 300, CIRCLE - 1)


# -- resets ---------------------------------------------------------------------------------


@both
@from_both
@given(
    first_seqs=st.tuples(SEQS, SEQS),
    off=st.integers(1, CIRCLE - 1) | st.integers(1, 100) | st.integers(CIRCLE - 100, CIRCLE - 1),
    flags=st.sampled_from([RST, RST | ACK]),
    ack=SEQS,
)
def test_a_reset_with_a_wrong_number_changes_nothing(
    inside_serves: bool, side: Side, first_seqs: tuple[int, int], off: int, flags: int, ack: int
) -> None:
    it = talk(inside_serves, first_seqs)
    seq, _ = it.next_numbers(side)
    it.gateway.passes(10)
    before = it.seen()
    arrived = it.sends(side, flags, seq + off, ack, b"text")
    assert (arrived.flags, arrived.seq) == (flags, (seq + off) % CIRCLE)
    assert arrived.data == b""
    assert it.seen() == before
    it.goes_on()


@both
@from_both
@given(first_seqs=st.tuples(SEQS, SEQS))
def test_a_reset_with_the_right_number_ends_what_is_expected(
    inside_serves: bool, side: Side, first_seqs: tuple[int, int]
) -> None:
    it = talk(inside_serves, first_seqs)
    seq, ack = it.next_numbers(side)
    it.sends(side, RST | ACK, seq, ack)
    assert it.control.state == CLOSE
    assert not it.expected


@both
@from_both
def test_a_reset_may_answer_what_was_acknowledged_or_follow_what_was_not(
    inside_serves: bool, side: Side
) -> None:
    for answers in (True, False):
        it = talk(inside_serves)
        end = it.end(side)
        end.says(b"NOOP\r\n")
        it.over.goes(end, *end.next_piece(100))
        seq, _ = it.next_numbers(side)
        it.sends(side, RST, seq - 6 * answers)
        assert it.control.state == CLOSE


@both
def test_a_refused_connection_is_closed_and_only_the_server_can_refuse_it(
    inside_serves: bool,
) -> None:
    it = talk(inside_serves)
    it.sends(CLIENT, RST, *it.next_numbers(CLIENT))
    it.sends(CLIENT, SYN, 70_000)
    opening = it.control.state
    for ack in (70_000, 70_002, 5):
        it.sends(SERVER, RST | ACK, 0, ack)
        assert it.control.state == opening
    arrived = it.sends(SERVER, RST | ACK, 0, 70_001)
    assert (arrived.seq, arrived.ack) == (0, 70_001)
    assert it.control.state == CLOSE


def test_a_first_syn_is_refused_by_a_reset_that_acknowledges_it() -> None:
    gateway = Gateway(apps=helpers({"ftp": (21,)}))
    sent = gateway.out(tcp(INSIDE, OUTSIDE_SERVER, SYN, seq=1000))
    assert sent is not None
    (ms,) = gateway.sessions.entries()
    opening = ms.state
    gateway.into(tcp(OUTSIDE_SERVER, source(sent), RST | ACK, seq=0, ack=1002))
    gateway.into(tcp(OUTSIDE_SERVER, source(sent), RST, seq=0))
    assert ms.state == opening
    gateway.into(tcp(OUTSIDE_SERVER, source(sent), RST | ACK, seq=0, ack=1001))
    assert ms.state == CLOSE


@pytest.mark.parametrize("flags", [ACK, RST, RST | ACK])
def test_a_reset_of_a_connection_whose_beginning_was_not_seen_is_believed(flags: int) -> None:
    gateway = Gateway(apps=helpers({"ftp": (21,)}))
    sent = gateway.out(tcp(INSIDE, OUTSIDE_SERVER, flags, seq=5000, ack=6000))
    assert sent is not None
    gateway.into(tcp(OUTSIDE_SERVER, source(sent), RST, seq=6000))
    (ms,) = gateway.sessions.entries()
    assert ms.state == CLOSE


# -- SYNs -------------------------------------------------------------------------------------


@both
@from_both
@given(first_seqs=st.tuples(SEQS, SEQS), seq=SEQS, ack=SEQS, flags=st.sampled_from([0, ACK]))
def test_a_forged_syn_changes_nothing(
    inside_serves: bool,
    side: Side,
    first_seqs: tuple[int, int],
    seq: int,
    ack: int,
    flags: int,
) -> None:
    it = talk(inside_serves, first_seqs)
    it.gateway.passes(10)
    before = it.seen()
    arrived = it.sends(side, SYN | flags, seq, ack, b"text")
    assert (arrived.flags, arrived.seq, arrived.data) == (SYN | flags, seq, b"")
    assert it.seen() == before
    it.goes_on()


@both
def test_a_syn_and_its_answer_that_come_late_change_nothing(inside_serves: bool) -> None:
    it = talk(inside_serves)
    before = it.seen()
    it.sends(CLIENT, SYN, 1000)
    it.sends(SERVER, SYN | ACK, 2000, 1001)
    assert it.seen() == before
    it.goes_on()


@both
def test_syns_that_come_late_change_nothing_where_both_sides_have_closed(
    inside_serves: bool,
) -> None:
    """Both have sent everything, and nothing of it has arrived yet: it is sent again."""
    it = talk(inside_serves)
    ends = it.over.client, it.over.server
    received = [bytes(end.received) for end in ends]
    for end, text in zip(ends, (b"NOOP\r\n", b"200 Fine.\r\n"), strict=True):
        end.says(text)
        it.over.put_through(end, it.over.packet(end, *end.next_piece(100), FIN | ACK))
    it.sends(CLIENT, SYN, 1000)
    it.sends(SERVER, SYN | ACK, 2000, 1001)
    for end in ends:
        it.over.goes(end, *end.first_again(100), FIN | ACK)
        it.over.acknowledges(it.over.other(end))
    assert it.over.client.received == received[0] + b"200 Fine.\r\n"
    assert it.over.server.received == received[1] + b"NOOP\r\n"
    assert all(end.acknowledged == len(end.text) for end in ends)


def test_syns_that_come_late_change_nothing_where_one_side_has_closed() -> None:
    """With a late answer and the FIN again the entry's state is that of a closed connection."""
    over = Connection(Gateway(apps=helpers({"ftp": (21,)})), INSIDE, OUTSIDE_SERVER)
    it = Talk(over, inside_serves=False)
    over.server.says(b"220 hello\r\n")
    over.goes(over.server, *over.server.next_piece(100), FIN | ACK)
    it.sends(SERVER, SYN | ACK, 2000, 1001)
    over.goes(over.server, *over.server.first_again(100), FIN | ACK)
    it.sends(CLIENT, ACK, 1001, 2001 + len(over.server.text) + 1)
    it.sends(CLIENT, SYN, 1000)
    it.sends(SERVER, SYN | ACK, 2000, 1001)
    assert over.goes(over.server, 4, b"hello\r\n", FIN | ACK) is not None
    over.say(over.client, b"USER me\r\n")
    assert over.say(over.client, PORT).startswith(b"PORT 203,0,113,1,")


@both
@given(first_seqs=st.tuples(SEQS, SEQS), again=st.tuples(SEQS, SEQS))
def test_a_client_that_has_rebooted_uses_its_port_again(
    inside_serves: bool, first_seqs: tuple[int, int], again: tuple[int, int]
) -> None:
    it = talk(inside_serves, first_seqs)
    it.sends(CLIENT, SYN, again[0])
    challenge = it.over.goes(it.over.server, it.over.server.sent, b"")
    assert challenge is not None
    it.sends(CLIENT, RST, parsed(challenge).ack)
    assert it.control.state == CLOSE
    assert not it.expected
    it.opens(*again)
    assert it.control.state == ESTABLISHED
    it.goes_on()
    assert it.expected


@both
@given(first_seqs=st.tuples(SEQS, SEQS), again=st.tuples(SEQS, SEQS))
def test_a_syn_that_the_server_accepts_begins_another_connection(
    inside_serves: bool, first_seqs: tuple[int, int], again: tuple[int, int]
) -> None:
    """The server has rebooted, too, or the reset that ended the old connection was lost."""
    it = talk(inside_serves, first_seqs)
    if again[0] == first_seqs[0]:
        return
    it.sends(CLIENT, SYN, again[0])
    assert it.expected
    it.is_accepted(*again)
    assert not it.expected
    assert it.control.state == ESTABLISHED
    it.goes_on()


@both
def test_only_the_answer_to_the_syn_begins_another_connection(inside_serves: bool) -> None:
    it = talk(inside_serves)
    it.sends(CLIENT, SYN, 90_000)
    before = it.seen()
    for ack in (90_000, 90_002, 1001):
        it.sends(SERVER, SYN | ACK, 80_000, ack)
    it.sends(CLIENT, SYN | ACK, 80_000, 90_001)
    assert it.seen() == before
    it.goes_on()


@both
@pytest.mark.parametrize(
    ("how", "again"),
    [
        ("reset", (1000, 2000)),
        ("reset", (500_000, 600_000)),
        ("closed", (1000, 600_000)),
        ("closed", (500_000, 2000)),
        ("closed", (500_000, 600_000)),
    ],
)
def test_a_port_is_used_again_when_the_connection_is_over(
    inside_serves: bool, how: str, again: tuple[int, int]
) -> None:
    """Where it was closed, at least one side begins with another number than before."""
    it = talk(inside_serves)
    if how == "reset":
        it.sends(CLIENT, RST, it.next_numbers(CLIENT)[0])
    else:
        (seq, ack), (servers_seq, servers_ack) = map(it.next_numbers, (CLIENT, SERVER))
        it.sends(CLIENT, FIN | ACK, seq, ack)
        it.sends(SERVER, FIN | ACK, servers_seq, servers_ack + 1)
        it.sends(CLIENT, ACK, seq + 1, ack + 1)
    assert it.control.state != ESTABLISHED
    assert not it.expected
    it.opens(*again)
    assert it.control.state == ESTABLISHED
    it.goes_on()


@both
def test_a_syn_that_is_sent_again_begins_one_connection(inside_serves: bool) -> None:
    it = talk(inside_serves)
    it.sends(CLIENT, RST, it.next_numbers(CLIENT)[0])
    for _ in range(3):
        it.sends(CLIENT, SYN, 70_000)
    for _ in range(2):
        it.sends(SERVER, SYN | ACK, 80_000, 70_001)
    it.is_accepted(70_000, 80_000)
    it.goes_on()


def test_a_syn_that_nobody_answered_gives_way_to_the_next() -> None:
    gateway = Gateway(apps=helpers({"ftp": (21,)}))
    gateway.out(tcp(INSIDE, OUTSIDE_SERVER, SYN, seq=7))
    over = Connection(gateway, INSIDE, OUTSIDE_SERVER)
    Talk(over, inside_serves=False).goes_on()


def test_both_ends_may_open_a_connection_at_the_same_time() -> None:
    it = talk(inside_serves=False)
    it.sends(CLIENT, RST, it.next_numbers(CLIENT)[0])
    it.sends(CLIENT, SYN, 70_000)
    it.sends(SERVER, SYN, 80_000)
    it.sends(CLIENT, SYN | ACK, 70_000, 80_001)
    it.is_accepted(70_000, 80_000)
    it.goes_on()
