"""A text of 64 KB in a superpacket costs little, whatever it says.

Measured is what a helper makes of a text, unit by unit, as a stream does. A stream reads a few
hundred units of a segment at most.
"""

from __future__ import annotations

from collections.abc import Callable
from time import thread_time
from unittest.mock import patch

import pytest

from nfmasq.engine.helper.app import Session
from nfmasq.engine.helper.stream import Stream, Units
from tests.apps.connection import Connection
from tests.apps.pptp import CLEAR_REQUEST, OUTGOING_REQUEST, message
from tests.apps.test_ftp import active, passive
from tests.apps.test_ftp import gateway as ftp_gateway
from tests.apps.test_hidden import irc
from tests.apps.test_pptp import control
from tests.apps.test_pptp import gateway as pptp_gateway

FULL, LONG, SHORT = 64_000, 16_000, 1_000
MOST_UNITS = 256
ROUNDS = 3
ATTEMPTS = 5
DEARER = 40.0
"""How much more than a harmless text of the same length the worst text may cost."""
STEEPER = 6.0
"""How much more than its share by length a long text may cost, beside a short text."""
LEAST = 0.0002
"""Seconds; what is quicker is too quick to be compared."""

CONNECTIONS: dict[str, Callable[[], Connection]] = {
    "ftp out": lambda: active(ftp_gateway()),
    "ftp in": lambda: passive(ftp_gateway()),
    "irc": irc,
    "pptp": lambda: control(pptp_gateway()),
}
OPENED: dict[str, Connection] = {}
KINDS = {
    "commands": ("ftp out", 0, (b"USER me\r\n",)),
    "first commands": ("ftp out", 0, ()),
    "replies to them": ("ftp out", 1, (b"USER me\r\n", b"220 hello\r\n")),
    "commands from outside": ("ftp in", 1, (b"220 hello\r\n", b"USER me\r\n")),
    "replies": ("ftp in", 0, (b"220 hello\r\n", b"USER me\r\n")),
    "irc": ("irc", 0, (b"NICK me\r\n",)),
    "irc from outside": ("irc", 1, (b"NICK me\r\n",)),
    "pptp": ("pptp", 0, ()),
}
"""By name: a connection, one of its directions, and what the two directions have said before."""


def units(kind: str) -> Units:
    """Return what divides a direction, with nothing read but what was said before."""
    name, direction, said = KINDS[kind]
    if name not in OPENED:
        OPENED[name] = CONNECTIONS[name]()
    over = OPENED[name]
    session = next(ms.app_data for ms in over.gateway.sessions.entries() if ms.app)
    caught: list[Units] = []

    def catch(session: Session, units: Units) -> Stream:
        caught.append(units)
        return Stream(units)

    with patch.multiple(Session, stream_out=catch, stream_in=catch):
        session.app.bind(session)
    for divided, text in zip(caught, said, strict=False):
        divide(divided, text)
    return caught[direction]


def divide(units: Units, text: bytes, most: int | None = None) -> int:
    """Have the units of a text rewritten, `most` at most; returns how many there were."""
    at = n = 0
    while at < len(text) and n != most:
        length = units.length(text, at) or len(text) - at
        units.rewrite(text[at : at + length])
        at += length
        n += 1
    return n


def seconds(kind: str, text: bytes, most: int | None = None) -> float:
    """Return how long a text takes, in the quickest of some rounds."""
    taken = []
    for _ in range(ROUNDS):
        divided = units(kind)
        begun = thread_time()
        divide(divided, text, most)
        taken.append(thread_time() - begun)
    return max(LEAST, min(taken))


def of(length: int, bit: bytes, begin: bytes = b"") -> bytes:
    """Return a text of a length, made of a bit again and again."""
    return begin + bit * ((length - len(begin)) // len(bit))


LINED = [kind for kind in KINDS if kind != "pptp"]
BEGUN = [kind for kind in LINED if kind != "first commands"]
NO_CONCERN = {
    b"\n": LINED,
    b"\r\n": LINED,
    b"x\n": BEGUN,
    b"NOOP\r\n": BEGUN,
    b"NICK a 322 me #x 1 :y\r\n": BEGUN,
    b":a 322 me #x 1 :y\r\n": ["commands", "irc from outside"],
}
HARMLESS = b"CWD a-folder/of-some/name\r\n"
WORST = [
    *(b"\n", b"\r", b"\r\n", b"\r\r\n", b" ", b" \n", b"\0", b"\0\n", b"\xff", b"\xff\n", b"P"),
    *(
        b"P\n",
        b"PORT ",
        b"PORT\n",
        b"PORT 10,0,0,2,4,1 \r\n",
        b"PORT 1,\n",
        b"EPRT ||",
        b"EPRT |1|1",
    ),
    *(
        b"AUTH\n",
        b"PASV\n",
        b"\xff\xfa",
        b"\xff\xfa\n",
        b"\xff\xf1\n",
        b"\xff\xfb",
        b" \xff\xf1P\n",
    ),
    *(b"2", b"227 ", b"227-\n", b"227 \n", b"227 (1,1,1,1,1,1\n", b"229 (|||1|)\n", b"1-\n", b"1"),
    *(
        b"\1",
        b"\1\n",
        b"\1D",
        b"\1DCC\n",
        b"\1DCC",
        b"\1DCC REJECT ",
        b"\1 \x10\\",
        b":",
        b": ",
        b"@",
    ),
    *(
        b"PRIVMSG a :\1DCC SEND f 1 1\1\n",
        b"PRIVMSG a :\1DCC SEND f 167772162 4000 1\1\n",
        b"670\n",
    ),
    *(
        b'PRIVMSG a :\1DCC SEND "f" \n',
        b"PRIVMSG a :\1DCC SEND f 1 1 1",
        b"STARTTLS\n",
        b"\0\x9c\0\1",
    ),
    *(message(CLEAR_REQUEST), message(OUTGOING_REQUEST, 7)[:8], message(CLEAR_REQUEST)[:-4]),
]
"""Bits of which texts are made to be slow."""


@pytest.mark.parametrize("bit", NO_CONCERN, ids=repr)
def test_lines_that_cannot_concern_a_helper_pass_together(bit: bytes) -> None:
    for kind in NO_CONCERN[bit]:
        assert divide(units(kind), of(FULL, bit)) <= 3, kind


def is_within(kind: str, text: bytes, most: int | None, factor: float, other: bytes) -> bool:
    """Say whether a text takes at most `factor` times as long as another text.

    Other programs disturb: it counts if it is so at any of several times.
    """
    return any(seconds(kind, text, most) <= factor * seconds(kind, other) for _ in range(ATTEMPTS))


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_costs_much_more_than_a_harmless_text(kind: str) -> None:
    for bit in WORST:
        for begin in (b"", b"PORT ", b"PRIVMSG a :\1DCC SEND f "):
            worst, harmless = of(FULL, bit, begin), of(FULL, HARMLESS)
            assert is_within(kind, worst, MOST_UNITS, DEARER, harmless), (begin, bit)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_costs_no_more_than_its_share(kind: str) -> None:
    for bit in WORST:
        factor = STEEPER * LONG / SHORT
        assert is_within(kind, of(LONG, bit), None, factor, of(SHORT, bit)), bit


@pytest.mark.parametrize("begin", [b"PRIVMSG a :\1DCC", b"@", b": ", b"\1DCC", b"\1DCC SEND"])
def test_a_gap_costs_no_more_than_a_word_of_its_length(begin: bytes) -> None:
    gap, word = (begin + filler * 970 + b"\1a\n" for filler in (b" ", b"w"))
    assert is_within("irc", of(FULL, gap), MOST_UNITS, 5, of(FULL, word))
