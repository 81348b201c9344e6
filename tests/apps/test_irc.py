"""IRC: what a client inside offers by DCC can be had from outside, and nothing else."""

from __future__ import annotations

import pytest

from nfmasq.apps import helpers
from tests.apps.connection import Connection
from tests.gateway import GATEWAY, Gateway
from tests.packets import SYN, destination, number, tcp

CLIENT = ("10.0.0.2", 40000)
SERVER = ("198.51.100.7", 6667)
PEER = ("198.51.100.66", 50000)

OWN, OURS = number("10.0.0.2"), number(GATEWAY)
NEIGHBOUR, FOREIGN = number("10.0.0.3"), number("198.51.100.8")


@pytest.fixture
def irc() -> Connection:
    over = Connection(Gateway(apps=helpers({"irc": (6667,)})), CLIENT, SERVER)
    over.say(over.client, b"NICK me\r\nUSER me 0 * :me\r\n")
    over.say(over.server, b":irc.example.net 001 me :Welcome\r\n")
    return over


def dcc(text: str, sender: str = "") -> bytes:
    return f"{sender}PRIVMSG you :\x01DCC {text}\x01\r\n".encode()


NO_OFFER = b"PRIVMSG you :\x01DCC\x01\r\n"


@pytest.mark.parametrize(
    "offer",
    [
        "SEND file.txt {address} {port} 12345",
        'SEND "a long name.txt" {address} {port} 12345',
        "SEND file.txt {address} {port}",
        "CHAT chat {address} {port}",
        "SEND file.txt {address} {port} 12345 99",
    ],
)
def test_whoever_takes_an_offer_reaches_the_client_once(irc: Connection, offer: str) -> None:
    said = irc.say(irc.client, dcc(offer.format(address=OWN, port=40001)))
    (data,) = irc.gateway.expected
    assert said == dcc(offer.format(address=OURS, port=data.mport))
    syn = irc.gateway.into(tcp(PEER, (GATEWAY, data.mport), SYN))
    assert syn is not None
    assert destination(syn) == ("10.0.0.2", 40001)
    second = tcp(("198.51.100.67", 50000), (GATEWAY, data.mport), SYN)
    assert irc.gateway.into(second) is second


def test_both_sides_mean_the_same_offer_when_they_resume(irc: Connection) -> None:
    irc.say(irc.client, dcc(f"SEND file.txt {OWN} 40001 9999"))
    (data,) = irc.gateway.expected
    resume = dcc(f"RESUME file.txt {data.mport} 512", ":you!user@host ")
    assert irc.say(irc.server, resume) == dcc("RESUME file.txt 40001 512", ":you!user@host ")
    accept = dcc("ACCEPT file.txt 40001 512")
    assert irc.say(irc.client, accept) == dcc(f"ACCEPT file.txt {data.mport} 512")
    assert (irc.client.acknowledged, irc.server.acknowledged) == (irc.client.sent, irc.server.sent)


def test_what_the_other_side_offers_is_its_own_affair(irc: Connection) -> None:
    offer = dcc(f"SEND file.txt {FOREIGN} 40001 9999", ":you!user@host ")
    assert irc.say(irc.server, offer) == offer
    for answer in ("RESUME file.txt 40001 512", "ACCEPT file.txt 61000 512"):
        assert irc.say(irc.client, dcc(answer)) == dcc(answer)
    assert irc.gateway.expected == []


def test_an_offer_in_pieces_is_rewritten_as_if_it_were_whole(irc: Connection) -> None:
    irc.client.says(b"@tag=1 :me " + dcc(f"SEND file.txt {OWN} 40001 9999") + b"PING x\r\n")
    irc.finish(1)
    (data,) = irc.gateway.expected
    expected_text = dcc(f"SEND file.txt {OURS} {data.mport} 9999", "@tag=1 :me ")
    assert irc.server.received.endswith(expected_text + b"PING x\r\n")


@pytest.mark.parametrize(
    ("line", "passes_as"),
    [
        (dcc(f"SEND f {NEIGHBOUR} 40001 1"), dcc(f"SEND f {OURS} 0 1")),
        (dcc(f"SEND f {OWN} 1023 1"), dcc(f"SEND f {OURS} 0 1")),
        (dcc(f"CHAT chat {OWN} 22"), dcc(f"CHAT chat {OURS} 0")),
        (dcc(f"SEND f {OWN} 0 1 77"), dcc(f"SEND f {OURS} 0 1 77")),
        (dcc(f"SEND f {FOREIGN} 40001 1"), dcc(f"SEND f {FOREIGN} 40001 1")),
        (dcc(f"SEND f {OWN}"), NO_OFFER),
        (dcc("SEND f 10.0.0.2 40001"), NO_OFFER),
        (dcc(f"XYZ f {OWN} 40001"), NO_OFFER),
        # In the middle of a message, without its marks, and after a bare carriage return.
        (b"PRIVMSG you :say \x01DCC SEND f 1 40001\x01\r\n", b"PRIVMSG you :say \x01DCC\x01\r\n"),
        (f"PRIVMSG you :DCC SEND f {OWN} 40001\r\n".encode(),) * 2,
        (b"TOPIC #x :\rPRIVMSG you :DCC SEND f 1\r\n", b"TOPIC #x : PRIVMSG you :DCC SEND f 1\r\n"),
    ],
)
def test_nothing_else_is_opened(irc: Connection, line: bytes, passes_as: bytes) -> None:
    assert irc.say(irc.client, line) == passes_as
    assert irc.gateway.expected == []


def test_nothing_is_opened_by_what_comes_in(irc: Connection) -> None:
    line = dcc(f"SEND f {OWN} 40001 1", ":you!user@host ")
    assert irc.say(irc.server, line) == line
    assert irc.gateway.expected == []


def test_offers_that_nobody_takes_are_few(irc: Connection) -> None:
    for port in range(41000, 41100):
        irc.say(irc.client, dcc(f"SEND f {OWN} {port} 1"))
    assert sorted(ms.sport for ms in irc.gateway.expected) == list(range(41092, 41100))


def test_a_browser_that_is_made_to_speak_to_port_6667_opens_nothing() -> None:
    over = Connection(Gateway(apps=helpers({"irc": (6667,)})), CLIENT, SERVER)
    text = b"POST / HTTP/1.1\r\n\r\nNICK me\r\n" + dcc(f"SEND f {OWN} 40001 1")
    assert over.say(over.client, text) == text
    assert over.gateway.expected == []


def test_after_starttls_the_connection_is_left_alone(irc: Connection) -> None:
    irc.say(irc.client, b"STARTTLS\r\n")
    irc.say(irc.server, b":irc.example.net 670 me :STARTTLS successful\r\n")
    line = dcc(f"SEND f {OWN} 40001 1")
    assert irc.say(irc.client, line) == line
    assert irc.say(irc.server, b"\x16\x03\n:") == b"\x16\x03\n:"
