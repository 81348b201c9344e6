"""Helped TCP connections, end to end, over a wire that does its worst: what arrives is exact.

The laws. The receiver gets the rewritten text: each unit as the helper has rewritten it, in order,
and from the point where the connection was left alone the bytes as they are. A byte that comes
again is the byte that came before. Nobody is told of bytes that he has not sent. And a connection
gets on: once the wire loses nothing, everything arrives in a number of rounds that depends on its
length only. `ends.py` has the ends and the wire.

Connections are tried for NFMASQ_FUZZ_SECONDS: where CI=true for a minute by default, with the seeds
from 0 on, else for 10 seconds, with seeds from anywhere on. A failure names the connection's seed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from random import Random, SystemRandom
from typing import NamedTuple
from unittest.mock import patch

import pytest

from nfmasq.apps.dialogue import Dialogue, TcpApp
from nfmasq.apps.ftp import Ftp
from nfmasq.apps.irc import Irc
from nfmasq.apps.pptp import Pptp
from nfmasq.engine import TCP
from nfmasq.engine.helper.app import App, Session
from nfmasq.engine.helper.stream import MAY_GROW_TO, Stream
from nfmasq.engine.wire.sequence import CHANGES_REMEMBERED
from tests.apps.connection import forward
from tests.apps.ends import CIRCLE, End, Sent, Wire
from tests.gateway import Gateway
from tests.packets import ACK, SYN, Endpoint, dotted, number, source, tcp

IN_CI = os.environ.get("CI") == "true"
SECONDS = float(os.environ.get("NFMASQ_FUZZ_SECONDS", "60" if IN_CI else "10"))

OUTSIDE = "198.51.100.7"
FIRST_INSIDE = number("10.0.0.2")

Say = Callable[[Random], bytes]


# -- what is said ---------------------------------------------------------------------

CHANGED: dict[bytes, Callable[[bytes], bytes]] = {
    b"g": lambda unit: unit * 5,
    b"G": lambda unit: unit * 300,
    b"s": lambda unit: unit[:1],
    b"c": bytes.swapcase,
    b"L": bytes.swapcase,
    b"!": lambda unit: b"0123456789" * 70,
    b"~": lambda unit: b"?",
}


class Toy:
    """Units of all kinds.

    A row of dots passes in pieces of any length. "!" and "~" are a unit each. Anything else is held
    until its newline, or for 999 bytes; its first byte says what becomes of it. After a unit that
    begins with L the connection is left alone.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def length(self, text: bytes, at: int) -> int:
        first = text[at : at + 1]
        if first == b".":
            return len(text) - at - len(text[at:].lstrip(b"."))
        if first in b"!~":
            return 1
        end = text.find(b"\n", at, at + 999) + 1
        if end:
            return end - at
        return 999 if len(text) - at >= 999 else 0

    def rewrite(self, unit: bytes) -> bytes:
        if unit.startswith(b"L"):
            self._session.data.leave_alone()
        return CHANGED.get(unit[:1], bytes)(unit)


class ToyApp(TcpApp):
    """The helper for the toy protocol."""

    name = "toy"
    ports: tuple[int, ...] = (4321,)

    def bind(self, session: Session) -> None:
        session.data = Dialogue(session, Toy(session), Toy(session))


def toy_text(random: Random) -> bytes:
    kinds = "..~gsck" if random.random() < 0.7 else ".....!~gggsssccckkkGLh"
    return b"".join(toy_unit(random, random.choice(kinds)) for _ in range(random.randrange(14)))


def toy_unit(random: Random, kind: str) -> bytes:
    length = random.choice((0, 1, 1, 2, 3, 8, 8, 30, 30, random.randrange(1000)))
    if kind in "!~":
        return kind.encode()
    if kind == ".":
        return b"." * random.choice((1, length, length, 1460, random.randrange(30_000)))
    if kind == "h":
        return b"has no end" + b"x" * length
    return kind.encode() + (b"abcdefghij" * 100)[:length] + b"\n"


COMMANDS = (
    b"USER me\r\n",
    b"NOOP\r\n",
    b"PASV\r\n",
    b"EPSV\r\n",
    b"AUTH TLS\r\n",
    b"PORT 10,0,0,2,%d,7\r\n",
    b"PORT 198,51,100,9,9,%d\r\n",
    b"EPRT |1|10.0.0.2|40%03d|\r\n",
    b"PORT 10,0,0,2\r\n",
    b"STOR " + b"x" * 990,
    b"\r\n",
    b"PO",
)
REPLIES = (
    b"220 hello\r\n",
    b"220-long\r\n",
    b"227 In (10,0,0,2,8,%d)\r\n",
    b"229 In (|||4%04d|)\r\n",
    b"234 go\r\n",
    b"227 none\r\n",
    b"227 " + b"y" * 990,
    b"22",
    b"ok",
    b"\r\n",
    b"x" * 1460,
)
MESSAGES = (
    b"NICK me\r\n",
    b"PING\n",
    b"PRIVMSG you :\1DCC SEND f 167772162 40%03d 1\1\r\n",
    b":me!me@me PRIVMSG you :\1DCC CHAT chat 167772162 40%03d\1\n",
    b"PRIVMSG you :\1DCC RESUME f 61%03d 7\1\r\n",
    b"PRIVMSG you :\1DCC",
    b"STARTTLS\r\n",
    b":s 670 me :go\r\n",
    b"@tag=",
    b"x" * 1100,
    b"\r\n",
)
RECORDS = (
    bytes.fromhex("009c 0001 1a2b3c4d 0001 0000") + bytes(144),
    bytes.fromhex("0010 0001 1a2b3c4d 000c 0000 0007 0000"),
    bytes.fromhex("00a8 0001 1a2b3c4d 0007 0000 0007 0001") + bytes(152),
    b"\0",
    b"something else",
)


def any_of(*texts: bytes) -> Say:
    """Say any of these texts, mostly after the first of them."""

    def text(random: Random) -> bytes:
        said = [random.choice(texts) for _ in range(random.randrange(14))]
        numbered = [line % random.randrange(256) if b"%" in line else line for line in said]
        return b"".join([texts[0], *numbered] if random.random() < 0.7 else numbered)

    return text


class Protocol(NamedTuple):
    app: App
    port: int
    client: Say
    server: Say


PROTOCOLS = {
    "toy": Protocol(ToyApp(), 4321, toy_text, toy_text),
    "ftp": Protocol(Ftp(), 21, any_of(*COMMANDS), any_of(*REPLIES)),
    "irc": Protocol(Irc(), 6667, any_of(*MESSAGES), any_of(*MESSAGES)),
    "pptp": Protocol(Pptp(), 1723, any_of(*RECORDS), any_of(*RECORDS)),
}


class Account:
    """Takes down what a helper makes of one direction, unit by unit."""

    def __init__(self, stream: Stream) -> None:
        assert stream._units is not None
        self._stream, self._units = stream, stream._units
        self._read = self._rewritten = b""
        stream._units = self

    def length(self, text: bytes, at: int) -> int:
        return self._units.length(text, at)

    def rewrite(self, unit: bytes) -> bytes:
        rewritten = self._units.rewrite(unit)
        self._read += unit
        self._rewritten += rewritten
        return rewritten

    def expected(self, text: bytes) -> bytes:
        """Return what the receiver is to have of a text, as far as it was read or left alone."""
        assert text.startswith(self._read)
        is_left_alone = self._stream._units is None
        return self._rewritten + (text[len(self._read) :] if is_left_alone else b"")


# -- what happens ---------------------------------------------------------------------


class Fuzzed:
    """A connection that a seed describes. `inside` is the address of the inside host.

    `runs` has anything happen on the wire, and checks the laws.
    """

    def __init__(self, gateway: Gateway, protocol: Protocol, inside: str, seed: int) -> None:
        self.random = Random(seed)
        self._gateway = gateway
        self.client, self.server = self._end(protocol.client), self._end(protocol.server)
        self.client.peer_first, self.server.peer_first = self.server.first, self.client.first
        self.ends = self.client, self.server
        self.wire = Wire(self.random, self.ends, self._packet, self._through)
        if self.random.random() < 0.4:
            self._inside = self.server
            self._at: dict[End, Endpoint] = {
                self.client: (OUTSIDE, 50000),
                self.server: (inside, protocol.port),
            }
            self._mapped = gateway.address, gateway.sessions.entry_count(TCP) + 2000
            forward(gateway, self._mapped[1], self._at[self.server])
        else:
            self._inside = self.client
            self._at = {self.client: (inside, 40000), self.server: (OUTSIDE, protocol.port)}
        self._open()
        self._longest = self.random.choice((1, 7, 100, 536, 1460, 1460, 64_000))

    def _end(self, say: Say) -> End:
        near_the_turn = CIRCLE - self.random.randrange(5000)
        first_seq = self.random.choice((near_the_turn, self.random.randrange(CIRCLE)))
        return End(first_seq, say(self.random), closes=self.random.random() < 0.6)

    def _open(self) -> None:
        """Let both SYNs pass, and that the client has both; SYNs may come again at any time."""
        opened = self._synchronises(self.client, SYN)
        if self._inside is self.client:
            self._mapped = source(opened)
        host, port = self._at[self._inside]
        (entry,) = (
            ms
            for ms in self._gateway.sessions.entries()
            if ms.app is not None and dotted(ms.saddr) == host and ms.sport == port
        )
        self.dialogue: Dialogue = entry.app_data.data
        out, into = Account(self.dialogue.out), Account(self.dialogue.into)
        self._accounts = {self._inside: out, self.wire.other(self._inside): into}
        self._synchronises(self.server, SYN | ACK)
        acknowledgement = self.client.segment(0, 0)
        self._through(self.client, self._packet(self.client, acknowledgement))

    def _synchronises(self, end: End, flags: int) -> bytes:
        packet = self._packet(end, Sent((end.first - 1) % CIRCLE, end.peer_first, flags, b"", b""))
        self.wire.enter(end, packet)
        passed = self._through(end, packet)
        assert passed is not None
        return passed

    def _packet(self, end: End, sent: Sent) -> bytes:
        there = self._at[self.wire.other(end)] if end is self._inside else self._mapped
        seq, ack, flags, payload, options = sent
        return tcp(self._at[end], there, flags, payload, seq=seq, ack=ack, tcp_options=options)

    def _through(self, end: End, packet: bytes) -> bytes | None:
        return self._gateway.out(packet) if end is self._inside else self._gateway.into(packet)

    def runs(self) -> None:
        is_left_alone = self.random.random() < 0.2
        for _ in range(self.random.randrange(120)):
            self._step(self.random.choice(self.ends))
            if is_left_alone and self.random.random() < 0.05:
                self._leave_alone()
        self._finish()
        for end in self.ends:
            assert bytes(self.wire.other(end).received) == self._expected(end)

    def _leave_alone(self) -> None:
        what = self.random.choice((self.dialogue, self.dialogue.out, self.dialogue.into))
        what.leave_alone()

    def _step(self, end: End) -> None:
        random, wire = self.random, self.wire
        length = random.randint(1, self._longest)
        what = random.randrange(20)
        if what < 4 and end.sent < end.total:
            wire.send(end, end.sent, length)
        elif what < 6 and end.acknowledged < end.sent:
            wire.send(end, *end.again_from(random.randrange(end.acknowledged, end.sent), length))
        elif what == 6:
            wire.send(end, end.sent, 0)
        elif what == 7:  # asks whether the other end is there
            wire.send(end, end.acknowledged - 1, random.choice((0, 1)))
        elif what == 8:
            wire.repeat_what_is_long_ago()
        elif what < 14 and wire.before:
            wire.pass_gateway(random.choice((0, random.randrange(len(wire.before)))))
        elif what < 19 and wire.behind:
            wire.arrive(random.choice((0, random.randrange(len(wire.behind)))))
        elif what == 19:
            lost = random.choice((wire.before, wire.behind))
            del lost[: random.randrange(3)]

    def _finish(self) -> None:
        """Lose nothing any more, until everything has arrived."""
        longest = self.random.choice((self._longest, 1460))
        length = max(longest, sum(end.total for end in self.ends) // 30)
        rounds = 0
        self.wire.settle()
        while not self._is_finished():
            rounds += 1
            assert rounds < self._enough_rounds(length), f"stuck after {rounds} rounds"
            for end in self.ends:
                if end.acknowledged < end.sent:
                    self.wire.send(end, *end.again_from(end.acknowledged, length))
                else:
                    self.wire.send(end, end.sent, length)
                if self.random.random() < 0.1:
                    self.wire.repeat_what_is_long_ago()
                self.wire.settle()

    def _enough_rounds(self, length: int) -> int:
        sent = sum(end.total for end in self.ends)
        grown = sum(len(self._expected(end)) for end in self.ends)
        return 40 + 3 * (sent // length + 2 * grown // MAY_GROW_TO)

    def _is_finished(self) -> bool:
        return all(
            end.acknowledged == end.total
            and self.wire.other(end).received_to == len(self._expected(end))
            for end in self.ends
        )

    def _expected(self, end: End) -> bytes:
        return self._accounts[end].expected(end.text)


def connections(protocol: Protocol, first_seed: int, until: float) -> int:
    """Try connections until a moment, with one seed after another; returns how many."""
    tried = 0
    while time.monotonic() < until:
        gateway = Gateway(apps={(TCP, protocol.port): protocol.app})
        for inside in range(FIRST_INSIDE, FIRST_INSIDE + 100):
            seed = first_seed + tried
            try:
                Fuzzed(gateway, protocol, dotted(inside), seed).runs()
            except Exception as failure:
                raise AssertionError(f"seed {seed}: {failure}") from failure
            tried += 1
            if time.monotonic() >= until:
                break
    return tried


@pytest.mark.parametrize("memory", [3, CHANGES_REMEMBERED])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_arrives_is_exact_whatever_the_wire_does(protocol: str, memory: int) -> None:
    first_seed = 0 if IN_CI else SystemRandom().randrange(2**40)
    until = time.monotonic() + SECONDS / (2 * len(PROTOCOLS))
    with patch("nfmasq.engine.helper.stream.CHANGES_REMEMBERED", memory):
        assert connections(PROTOCOLS[protocol], first_seed, until)
