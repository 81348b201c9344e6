"""What somebody inside says in the name of a neighbour opens nothing of the neighbour's.

The forger sends from the neighbour's address and sees nothing that is sent to it. So a helper acts
only where each side has acknowledged what the other has sent.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nfmasq.apps import helpers
from nfmasq.engine.wire.gre import GRE
from tests.apps.connection import parsed
from tests.gateway import INSIDE, Gateway
from tests.packets import ACK, FIN, RST, SYN, Endpoint, source, tcp

CIRCLE = 2**32
numbers = st.integers(0, CIRCLE - 1)

CALL = struct.pack("!HHIHHHH", 168, 1, 0x1A2B3C4D, 7, 0, 4321, 1) + bytes(152)
"""An Outgoing-Call-Request of PPTP (RFC 2637 section 2.7)."""

SAID = {
    "ftp": (21, b"PORT 10,0,0,2,19,136\r\n"),
    "irc": (6667, b"PRIVMSG you :\1DCC SEND file 167772162 5000 100\1\r\n"),
    "pptp": (1723, CALL),
}
each_helper = pytest.mark.parametrize("name", SAID)


class Forger:
    """A gateway, and who sends in the name of INSIDE to the port of a helper."""

    def __init__(self, name: str) -> None:
        port, self.said = SAID[name]
        self.gateway = Gateway(apps=helpers({name: (port,)}))
        self.server: Endpoint = ("198.51.100.7", port)

    def opened(self) -> bool:
        """Say whether a session is expected, or a call begun."""
        return bool(self.gateway.expected or self.gateway.sessions.entry_count(GRE))

    def says(self, seq: int, ack: int, flags: int = ACK, text: bytes | None = None) -> bytes | None:
        text = self.said if text is None else text
        seq, ack = seq % CIRCLE, ack % CIRCLE
        return self.gateway.out(tcp(INSIDE, self.server, flags, text, seq=seq, ack=ack))

    def hears(self, mapped: Endpoint, flags: int, seq: int, ack: int) -> None:
        packet = tcp(self.server, mapped, flags, seq=seq % CIRCLE, ack=ack % CIRCLE)
        assert self.gateway.into(packet) is not packet

    def opens(self, seq: int, answer: int | None) -> Endpoint:
        """Send a SYN, which the server answers with a SYN of a number; None: it does not."""
        sent = self.says(seq, 0, SYN, b"")
        assert sent is not None
        if answer is not None:
            self.hears(source(sent), SYN | ACK, answer, seq + 1)
        return source(sent)


@each_helper
@given(numbers, numbers, st.sampled_from((ACK, FIN | ACK)))
def test_where_the_server_never_answered(name: str, seq: int, ack: int, flags: int) -> None:
    forger = Forger(name)
    forger.opens(seq, answer=None)
    for _ in range(2):
        passed = forger.says(seq + 1, ack, flags)
        assert passed is not None
        assert forger.said not in passed
    assert not forger.opened()


@each_helper
@given(numbers, numbers, numbers)
def test_where_the_server_answers_and_the_forger_cannot_see_its_number(
    name: str, seq: int, answer: int, ack: int
) -> None:
    assume(ack != (answer + 1) % CIRCLE)
    forger = Forger(name)
    mapped = forger.opens(seq, answer)
    forger.says(seq + 1, ack, text=b"")
    forger.says(seq + 1, ack)
    forger.hears(mapped, RST, ack, 0)  # this is what a server says to that
    forger.says(seq + 1, ack)
    assert not forger.opened()


@each_helper
@given(numbers, numbers, numbers, numbers)
def test_where_nothing_was_seen_of_a_connection_that_the_neighbour_has(
    name: str, seq: int, ack: int, real_seq: int, real_ack: int
) -> None:
    """The server answers what it does not accept with the numbers that it expects."""
    assume(ack != real_ack and seq != real_seq)
    forger = Forger(name)
    sent = forger.says(seq, ack)
    assert sent is not None
    for _ in range(3):
        forger.hears(source(sent), ACK, real_ack, real_seq)
        forger.says(seq, ack)
    assert not forger.opened()


@each_helper
@given(numbers, numbers)
def test_the_neighbour_itself_is_served(name: str, seq: int, answer: int) -> None:
    forger = Forger(name)
    forger.opens(seq, answer)
    forger.says(seq + 1, answer + 1)
    assert forger.opened()


@each_helper
@given(numbers, numbers)
def test_the_neighbour_is_served_in_a_connection_whose_beginning_was_not_seen(
    name: str, seq: int, ack: int
) -> None:
    """What it says is sent again when the server has acknowledged what came before."""
    forger = Forger(name)
    sent = forger.says(seq, ack)
    assert sent is not None
    probe = parsed(sent)
    assert (probe.seq, probe.ack, len(probe.data)) == ((seq - 1) % CIRCLE, ack, 1)
    assert not forger.opened()
    forger.hears(source(sent), ACK, ack, seq)
    forger.says(seq, ack)
    assert forger.opened()
