"""What FTP and IRC promise never leaves does not leave, however it is written and cut up."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nfmasq.apps import helpers
from tests.apps.connection import Connection, End
from tests.apps.readers import announced_by_commands, announced_by_replies, offered
from tests.apps.test_ftp import active, passive
from tests.apps.test_ftp import gateway as ftp_gateway
from tests.gateway import GATEWAY, Gateway
from tests.packets import number

CLIENT, INSIDE_SERVER = number("10.0.0.2"), number("10.0.0.5")
LONG = 300

SIZES = st.sampled_from([1, 2, 3, 5, 8, 13, 100, 999, 1000, 1001, 1460])
LINE_ENDS = st.sampled_from(
    [
        b"\r\n",
        b"\n",
        b"\r",
        b"\r\0",
        b"\r\r\n",
        b"\xff\n",
        b"\xff\xfb\n",
        b"\xff\r\n",
        b"\xff\xff\n",
    ]
)
JUNK = [b" ", b"\t", b"\0", b"\r", b"\n", b"\x1b", b"\x80", b"\x7f", b'"', b"\\", b"\x10"]
TELNET = [b"\xff\xf4", b"\xff\xf2", b"\xff", b"\xffX", b"\xff\xff", b"\xff\xfb\1", b"\xff\xfeP"]
TELNET += [b"\xff\xfaX\xff\xf0", b"\xff\xfa", b"\xff\xfa" + b"X" * 70 + b"\xff\xf0"]
VERY_LONG = [b" " * 70, b" " * 1000, b"\0" * 999, b"\xff\xf4" * 600]
BITS = st.sampled_from(JUNK + TELNET)
GAPS = st.one_of(st.just(b""), st.just(b" "), BITS, st.sampled_from(VERY_LONG))


def rarely(bits: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Draw nothing, most of the time."""
    return st.integers(0, 9).flatmap(lambda n: bits if n == 0 else st.just(b""))


@st.composite
def spelled(draw: st.DrawFn, text: bytes, odd: bytes = b"") -> bytes:
    """Spell a text in capitals or not, with something between the letters now and then."""
    gaps = rarely(BITS) if not odd else rarely(st.just(odd))
    letters = [bytes([byte]) for byte in text]
    return b"".join(
        draw(gaps) + (letter.lower() if draw(st.booleans()) else letter) for letter in letters
    )


def addresses(address: str) -> st.SearchStrategy[bytes]:
    """Draw a spelling of an address."""
    four = [int(part) for part in address.split(".")]
    whole = number(address)
    spellings = [
        b"%d.%d.%d.%d" % tuple(four),
        b"%03d.%03d.%03d.%03d" % tuple(four),
        b"0%o.0%o.0%o.0%o" % tuple(four),
        b"0x%x.%d.%d.0x%x" % tuple(four),
        b"%d.%d" % (four[0], four[3]),
        b"%d" % whole,
        b"0%d" % whole,
        b"%d" % (whole + 2**32),
        b"0x%08x" % whole,
        b"::ffff:%d.%d.%d.%d" % tuple(four),
        b"::ffff:%x:%x" % (whole >> 16, whole & 0xFFFF),
        b"%d.%d.%d.%d" % tuple(part + 256 for part in four),
    ]
    commas = [b", ", b" ,", b",\t", b",\0", b",,", b","]
    return st.tuples(st.sampled_from(spellings), st.sampled_from(commas), st.booleans()).map(
        lambda drawn: drawn[0].replace(b".", drawn[1]) if drawn[2] else drawn[0]
    )


@st.composite
def announcements(draw: st.DrawFn, address: str, names: list[bytes]) -> bytes:
    """Draw a line that may announce an address."""
    name, written = draw(st.sampled_from(names)), draw(addresses(address))
    port = draw(st.sampled_from([b"156,65", b"156, 65", b"40001", b"0", b"156,65 1"]))
    argument = draw(
        st.sampled_from(
            [
                written + b"," + port,
                b"(" + written + b"," + port + b")",
                b"4,4," + written + b",2," + port,
                b"(4,4," + written + b",2," + port + b")",
                b"|1|" + written + b"|" + port + b"|",
                b"|2|" + written + b"|" + port + b"|",
                b"(|1|" + written + b"|" + port + b"|)",
                b"!1!" + written + b"!" + port,
                b"198,51,100,7,1,2," + written + b"," + port,
                b"(198,51,100,7,1,2) (" + written + b"," + port + b")",
            ]
        )
    )
    begin = draw(rarely(GAPS)) + draw(rarely(GAPS)) + draw(spelled(name))
    return begin + draw(GAPS) + argument + draw(rarely(GAPS)) + draw(LINE_ENDS)


OTHER_COMMANDS = st.sampled_from(
    [b"NOOP", b"STOR " + b"x" * 1200, b"PO", b"CWD \xff\xff", b"", b"P"]
)
OTHER_REPLIES = st.sampled_from(
    [b"211-Status", b"211 End", b"227-Entering", b"227 ok", b"22", b"200 ok", b" text", b"229-"]
)


def texts(
    lines: st.SearchStrategy[bytes], others: st.SearchStrategy[bytes]
) -> st.SearchStrategy[bytes]:
    other_lines = st.tuples(others, LINE_ENDS).map(b"".join)
    return st.lists(st.one_of(lines, lines, other_lines), min_size=1, max_size=4).map(b"".join)


COMMANDS = texts(announcements("10.0.0.2", [b"PORT", b"EPRT", b"LPRT"]), OTHER_COMMANDS)
REPLIES = texts(
    announcements("10.0.0.5", [b"227 ", b"228 ", b"229 ", b"227-", b"227", b" "]), OTHER_REPLIES
)


def said(over: Connection, end: End, text: bytes, size: int) -> bytes:
    """Send a text in pieces, to the end; returns what the other end received of it."""
    before = len(over.other(end).received)
    end.says(text)
    over.finish(max(size, len(text) // 40 if len(text) > LONG else 1))
    over.ends(end)
    return over.other(end).received[before:]


@given(COMMANDS, SIZES)
@example(b" PORT 10,0,0,2,156,65\r\n", 1460)
@example(b"\xff\xf1PORT 10,0,0,2,156,65\r\n", 1460)
@example(b"PORT" + b" " * 1000 + b"10,0,0,2,156,65\r\n", 1460)
@example(b" " * 1000 + b"PORT 10,0,0,2,156,65\r\n", 1460)
@example(b"PORT 10, 0, 0, 2, 156, 65\r\n", 1460)
@example(b"LPRT 4,4,10,0,0,2,2,156,65\r\n", 1460)
@example(b"NOOP\rPORT 10,0,0,2,156,65\r\n", 5)
@example(b"STOR " + b"x" * 994 + b"\rPORT 10,0,0,2,156,65\r\n", 1460)
@example(b"PO\xff\nRT 10,0,0,2,156,65\r\n", 1460)
@example(b"EPRT |2|::ffff:10.0.0.2|40001|\r\n", 1460)
def test_no_server_is_told_the_address_of_a_client_inside(text: bytes, size: int) -> None:
    over = active(ftp_gateway())
    assert CLIENT not in announced_by_commands(said(over, over.client, text, size))


@given(REPLIES, SIZES, st.booleans())
@example(b"227-\r\n 10,0,0,5,156,65\r\n227 ok\r\n", 1460, True)
@example(b"227 (198,51,100,7,1,2) (10,0,0,5,156,65)\r\n", 1460, True)
@example(b"200 ok\r227 (10,0,0,5,156,65)\r\n", 7, False)
@example(b"228 (4,4,10,0,0,5,2,156,65)\r\n", 1460, True)
@example(b"227 4,4,10,0,0,5,2,156,65\r\n", 1460, True)
def test_no_client_is_told_the_address_of_a_server_inside(
    text: bytes, size: int, asks: bool
) -> None:
    over = passive(ftp_gateway())
    if asks:
        over.say(over.client, b"PASV\r\nEPSV\r\n")
    assert INSIDE_SERVER not in announced_by_replies(said(over, over.server, text, size))


def irc() -> Connection:
    over = Connection(
        Gateway(apps=helpers({"irc": (6667,)})), ("10.0.0.2", 40000), ("198.51.100.7", 6667)
    )
    over.say(over.client, b"NICK me\r\n")
    return over


@st.composite
def offers(draw: st.DrawFn) -> bytes:
    """Draw a line that may offer an address."""
    begin = [b"PRIVMSG you :", b"@a=b :me privmsg you ", b"NOTICE #x :", b"PRIVMSG you :say "]
    begin += [b"\rPRIVMSG you :", b"@" + b"t" * 1200 + b" PRIVMSG you :", b"PRIVMSG you :\1DCC \1"]
    name = draw(st.sampled_from([b"f", b'"a b"', b'"f', b"f 1 2", b'"f 167772162 40001"']))
    kind = draw(st.sampled_from([b"SEND", b"CHAT", b"TSEND", b"XMIT", b"REJECT"]))
    odd = draw(st.sampled_from([b"", b"\x10", b"\\", b"\2"]))
    spaces = [draw(st.sampled_from([b" ", b"  ", b"\t", b" " * 1000])) for _ in range(4)]
    words = [
        draw(spelled(b"DCC", odd)),
        draw(spelled(kind, odd)),
        name,
        draw(addresses("10.0.0.2")),
    ]
    words[3] = draw(spelled(words[3], odd)) if draw(st.booleans()) else words[3]
    offer = b"".join(word + space for word, space in zip(words, spaces, strict=True)) + b"40001 9"
    return (
        draw(rarely(GAPS))
        + draw(spelled(draw(st.sampled_from(begin))))
        + b"\1"
        + draw(rarely(GAPS))
        + offer
        + draw(st.sampled_from([b"\1", b"", b"\1\1DCC SEND f 167772162 40001\1"]))
        + draw(LINE_ENDS)
    )


@given(texts(offers(), st.sampled_from([b"PING x", b"", b"PRIVMSG you :\1ACTION x\1"])), SIZES)
@example(b"PRIVMSG you :\1DCC SEND f 4462739458 40001 9\1\r\n", 1460)
@example(b"PRIVMSG you :\1DCC SEND f 1 2 167772162 40001\1\r\n", 1460)
@example(b"PRIVMSG you :\1DCC  \2SEND f 0xa000002 40001\1\r\n", 3)
@example(b"@" + b"t" * 2000 + b" PRIVMSG you :\1DCC SEND f 167772162 40001\1\r\n", 1460)
def test_no_client_is_told_the_address_of_another_client_inside(text: bytes, size: int) -> None:
    over = irc()
    assert CLIENT not in offered(said(over, over.client, text, size))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("before", [b"", b"\r\n", b" ", b"\r", b"\n\n "])
def test_a_first_line_in_pieces_begins_as_one_that_is_whole(size: int, before: bytes) -> None:
    ftp = Connection(ftp_gateway(), ("10.0.0.2", 40000), ("198.51.100.7", 21))
    passes_as = b" " if before == b"\r" else before
    ftp_said = said(ftp, ftp.client, before + b"USER me\r\nPORT 10,0,0,2,156,65\r\n", size)
    assert ftp_said.startswith(passes_as + b"USER me\r\nPORT " + GATEWAY.replace(".", ",").encode())
    over = Connection(
        Gateway(apps=helpers({"irc": (6667,)})), ("10.0.0.2", 40000), ("198.51.100.7", 6667)
    )
    irc_said = said(
        over,
        over.client,
        before + b"NICK me\r\nPRIVMSG x :\1DCC CHAT c 167772162 40001\1\r\n",
        size,
    )
    assert irc_said.startswith(
        passes_as + b"NICK me\r\nPRIVMSG x :\1DCC CHAT c %d" % number(GATEWAY)
    )


@pytest.mark.parametrize("greeting", [b"", b"\x00\x01\xff\xfd", b"ok", b"SSH-2.0-x\r\n"])
@pytest.mark.parametrize(
    "text", [b"\x16\x03\x01\r\x00\xff\n", b"GET / x\ry\r\n", b"\0\r\0", b"X\r"]
)
def test_what_is_no_ftp_passes_as_it_is(greeting: bytes, text: bytes) -> None:
    """Not a byte is held back: nobody waits for another byte before an answer."""
    for over in (
        Connection(ftp_gateway(), ("10.0.0.2", 40000), ("198.51.100.7", 21)),
        Connection(ftp_gateway(), ("198.51.100.9", 50000), ("10.0.0.5", 21), forwarded=21),
    ):
        assert over.say(over.server, greeting) == greeting
        assert over.say(over.client, text) == text
        assert over.say(over.server, text) == text


def test_a_server_that_greets_is_hidden_whatever_the_client_says_first() -> None:
    over = Connection(ftp_gateway(), ("198.51.100.9", 50000), ("10.0.0.5", 21), forwarded=21)
    over.say(over.server, b"220 hello\r\n")
    over.say(over.client, b"XYZ\r\nPASV\r\n")
    over.say(over.server, b"500 What?\r\n")
    assert b"203,0,113,1" in over.say(over.server, b"227 (10,0,0,5,156,65)\r\n")
