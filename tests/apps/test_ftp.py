"""FTP: data connections that a control connection announces get through, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.apps import helpers
from nfmasq.engine import TCP, IpMasq
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.endings import DELETED
from nfmasq.engine.table.timeouts import PROFILES
from tests.apps.connection import Connection
from tests.gateway import GATEWAY, Gateway
from tests.packets import ACK, RST, SYN, Endpoint, destination, number, source, tcp

CLIENT: Endpoint = ("10.0.0.2", 40000)
SERVER: Endpoint = ("198.51.100.7", 21)
SERVERS_DATA: Endpoint = ("198.51.100.7", 20)
STRANGER: Endpoint = ("198.51.100.66", 20)

INSIDE_SERVER: Endpoint = ("10.0.0.5", 21)
OUTSIDE_CLIENT: Endpoint = ("198.51.100.9", 50000)

LOGIN = b"USER anonymous\r\n"


def gateway(**settings: object) -> Gateway:
    return Gateway(apps=helpers({"ftp": (21,)}), **settings)


def active(gateway: Gateway) -> Connection:
    """Have a client inside log in to a server outside."""
    over = Connection(gateway, CLIENT, SERVER)
    over.say(over.server, b"220 hello\r\n")
    over.say(over.client, LOGIN)
    return over


def passive(gateway: Gateway) -> Connection:
    """Have a client outside log in to a server inside, on a forwarded port."""
    over = Connection(gateway, OUTSIDE_CLIENT, INSIDE_SERVER, forwarded=21)
    over.say(over.server, b"220 hello\r\n")
    over.say(over.client, LOGIN)
    return over


def forwarded(gateway: Gateway) -> Gateway:
    """Give a gateway a forward that leads to the server inside; returns the gateway."""
    server = Server(number(INSIDE_SERVER[0]), INSIDE_SERVER[1])
    gateway.sessions.forwards = Forwards([Forward(TCP, range(21, 22), [server])])
    gateway.masq.inbound.maddrs = {number(gateway.address)}
    return gateway


@pytest.fixture
def client() -> Connection:
    return active(gateway())


@pytest.fixture(params=["forward", "entry by hand"])
def server(request: pytest.FixtureRequest) -> Connection:
    over = gateway()
    return passive(forwarded(over) if request.param == "forward" else over)


def host_port(address: str, port: int) -> bytes:
    """Write an endpoint as RFC 959 does."""
    return b"%s,%d,%d" % (address.replace(".", ",").encode(), port >> 8, port & 255)


def port_in(line: bytes) -> int:
    """Read the port that a line announces, written with bars or with commas."""
    if b"|" in line:
        return int(line.split(b"|")[-2])
    *_, high, low = line.translate(None, b"PORT()\r\n").split(b",")
    return int(high) << 8 | int(low)


# -- a client inside, active ------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "announced"),
    [
        (b"PORT 10,0,0,2,156,65\r\n", b"PORT 203,0,113,1,%d,%d\r\n"),
        (b"port  10,0,0,2,156,65 \n", b"port  203,0,113,1,%d,%d \n"),
        (b"EPRT |1|10.0.0.2|40001|\r\n", b"EPRT |1|203.0.113.1|%d|\r\n"),
        (b"EPRT !1!10.0.0.2!40001!\r\n", b"EPRT !1!203.0.113.1!%d!\r\n"),
    ],
)
def test_the_server_is_told_of_the_masquerade_and_reaches_the_client(
    client: Connection, command: bytes, announced: bytes
) -> None:
    said = client.say(client.client, command)
    (data,) = client.gateway.expected
    numbers = (data.mport >> 8, data.mport & 255) if b"," in announced else data.mport
    assert said == announced % numbers
    syn = client.gateway.into(tcp(SERVERS_DATA, (GATEWAY, data.mport), SYN))
    assert syn is not None
    assert destination(syn) == ("10.0.0.2", 40001)
    answer = client.gateway.out(tcp(("10.0.0.2", 40001), SERVERS_DATA, SYN | ACK))
    assert answer is not None
    assert source(answer) == (GATEWAY, data.mport)


def test_replies_and_later_commands_are_in_step(client: Connection) -> None:
    client.say(client.client, b"PORT 10,0,0,2,156,65\r\n")
    assert client.say(client.server, b"200 Fine.\r\n") == b"200 Fine.\r\n"
    assert client.say(client.client, b"LIST\r\n") == b"LIST\r\n"
    assert client.client.acknowledged == client.client.sent
    assert client.server.acknowledged == client.server.sent


def test_several_commands_in_one_segment_are_each_rewritten(client: Connection) -> None:
    said = client.say(client.client, b"PORT 10,0,0,2,156,65\r\nNOOP\r\nEPRT |1|10.0.0.2|40002|\r\n")
    first, noop, second = said.splitlines()
    assert noop == b"NOOP"
    assert [ms.sport for ms in client.gateway.expected] in ([40001, 40002], [40002, 40001])
    assert {port_in(first), port_in(second)} == {ms.mport for ms in client.gateway.expected}


@given(st.integers(1, 9), st.integers(0, 40))
def test_a_command_in_pieces_is_rewritten_as_if_it_were_whole(size: int, before: int) -> None:
    whole, pieces = active(gateway()), active(gateway())
    text = b"X" * before + b"\r\nPORT 10,0,0,2,156,65\r\nLIST\r\n"
    said = whole.say(whole.client, text)
    pieces.client.says(text)
    pieces.finish(size)
    assert pieces.server.received[len(LOGIN) :] == said


def test_a_command_that_is_sent_again_announces_the_same(client: Connection) -> None:
    command = b"PORT 10,0,0,2,156,65\r\n"
    client.client.says(command)
    at, piece = client.client.next_piece(100)
    first = client.goes(client.client, at, piece)
    assert client.goes(client.client, at, piece) == first
    assert len(client.gateway.expected) == 1


def test_a_server_with_a_client_inside_announces_what_it_likes(client: Connection) -> None:
    """The connection that follows goes out, and what is outside is no secret."""
    client.say(client.client, b"PASV\r\n")
    reply = b"227 Entering Passive Mode (198,51,100,7,200,10).\r\n"
    assert client.say(client.server, reply) == reply
    assert client.gateway.expected == []


# -- a server inside, passive -----------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "reply", "announced"),
    [
        (
            b"PASV\r\n",
            b"227 Entering Passive Mode (10,0,0,5,156,65).\r\n",
            b"227 Entering Passive Mode (203,0,113,1,%d,%d).\r\n",
        ),
        (b"PASV\r\n", b"227 ok 10,0,0,5,156,65\r\n", b"227 ok 203,0,113,1,%d,%d\r\n"),
        (b"EPSV\r\n", b"229 Entering (|||40001|)\r\n", b"229 Entering (|||%d|)\r\n"),
    ],
)
def test_the_client_is_told_of_the_masquerade_and_reaches_the_server(
    server: Connection, command: bytes, reply: bytes, announced: bytes
) -> None:
    assert server.say(server.client, command) == command
    said = server.say(server.server, reply)
    (data,) = server.gateway.expected
    numbers = (data.mport >> 8, data.mport & 255) if b"," in announced else data.mport
    assert said == announced % numbers
    syn = server.gateway.into(tcp((OUTSIDE_CLIENT[0], 50001), (GATEWAY, data.mport), SYN))
    assert syn is not None
    assert destination(syn) == ("10.0.0.5", 40001)


def test_a_client_of_a_server_inside_announces_what_it_likes(server: Connection) -> None:
    command = b"PORT 198,51,100,9,156,65\r\n"
    assert server.say(server.client, command) == command
    assert server.gateway.expected == []


def test_the_public_address_in_a_reply_is_left(server: Connection) -> None:
    """A server may have been told the masquerade address by its owner, who forwards its ports."""
    server.say(server.client, b"PASV\r\n")
    reply = b"227 Entering Passive Mode (203,0,113,1,156,65).\r\n"
    assert server.say(server.server, reply) == reply


# -- TLS, and what is not FTP -----------------------------------------------------------


@pytest.mark.parametrize(
    ("serving", "inside"),
    [(active, b"PORT 10,0,0,2,156,65\r\n"), (passive, b"227 (10,0,0,5,156,65)\r\n")],
)
def test_after_auth_tls_the_connection_is_left_alone(
    serving: Callable[[Gateway], Connection], inside: bytes
) -> None:
    over = serving(gateway())
    over.say(over.client, b"AUTH TLS\r\n")
    over.say(over.server, b"234 Go ahead.\r\n")
    for text in (b"\x16\x03\x01\nP", inside):
        assert over.say(over.inside, text) == text
    assert over.gateway.expected == []


def test_a_234_that_nobody_asked_for_changes_nothing(client: Connection) -> None:
    client.say(client.server, b"234 Go ahead.\r\n")
    assert b"203,0,113,1" in client.say(client.client, b"PORT 10,0,0,2,156,65\r\n")


def test_after_tls_segments_may_come_in_any_order(client: Connection) -> None:
    client.say(client.client, b"AUTH TLS\r\n")
    client.say(client.server, b"234 Go ahead.\r\n")
    client.client.says(b"0123456789")
    at, _ = client.client.next_piece(10)
    assert client.goes(client.client, at + 5, b"56789") is not None
    assert client.goes(client.client, at, b"01234") is not None
    assert client.server.received.endswith(b"0123456789")


def test_a_browser_that_is_made_to_speak_to_port_21_opens_nothing() -> None:
    over = Connection(gateway(), CLIENT, SERVER)
    text = b"POST / HTTP/1.1\r\nContent-Length: 99\r\n\r\nUSER x\r\nPORT 10,0,0,2,156,65\r\n"
    assert over.say(over.client, text[:30]) + over.say(over.client, text[30:]) == text
    assert over.gateway.expected == []


# -- what cannot be had -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "passes_as"),
    [
        # Another inside host, the client's own services, and nonsense are told to nobody.
        (b"PORT 10,0,0,3,156,65\r\n", b"PORT 203,0,113,1,0,0\r\n"),
        (b"PORT 192,168,1,1,156,65\r\n", b"PORT 203,0,113,1,0,0\r\n"),
        (b"PORT 10,0,0,2,0,80\r\n", b"PORT 203,0,113,1,0,0\r\n"),
        (b"PORT 10,0,0,2,3,255\r\n", b"PORT 203,0,113,1,0,0\r\n"),
        (b"EPRT |1|10.0.0.3|40001|\r\n", b"EPRT |1|203.0.113.1|0|\r\n"),
        (b"EPRT |1|10.0.0.2|1023|\r\n", b"EPRT |1|203.0.113.1|0|\r\n"),
        (b"EPRT |1|10.0.0.2|99999|\r\n", b"EPRT |1|203.0.113.1|0|\r\n"),
        (b"PORT 4,4,10,0,0,2\r\n", b"PORT 0,0,0,0,0,0\r\n"),
        (b"PORT 10,0,0,2,156\r\n", b"PORT 0,0,0,0,0,0\r\n"),
        (b"PORT 10,0,0,2,256,65\r\n", b"PORT 0,0,0,0,0,0\r\n"),
        (b"PORT 10,0,0,2,156,65 10,0,0,2,156,66\r\n", b"PORT 0,0,0,0,0,0\r\n"),
        (b"EPRT |1|10.0.0.2|40001\r\n", b"EPRT |1|0.0.0.0|0|\r\n"),
        # A newline within: what comes after it is a command of its own.
        (b"PORT 10,0,0,2,156\n,65\r\n", b"PORT 0,0,0,0,0,0\r\n,65\r\n"),
        (b"PORT 10,0,0,2,156,65\rPORT 1\r\n", b"PORT 0,0,0,0,0,0\r\n"),
        # Commands within other commands, and replies that a client sends.
        (b"STOR PORT 10,0,0,2,156,65\r\n", b"STOR PORT 10,0,0,2,156,65\r\n"),
        (b" PORT 10,0,0,2,156,65\r\n", b"PORT 0,0,0,0,0,0\r\n"),
        (b"227 Entering (10,0,0,2,156,65)\r\n", b"227 Entering (10,0,0,2,156,65)\r\n"),
        (b"229 Entering (|||40001|)\r\n", b"229 Entering (|||40001|)\r\n"),
        # Another host outside, an endpoint of IPv6, and a line that is too long.
        (b"PORT 198,51,100,8,156,65\r\n", b"PORT 198,51,100,8,156,65\r\n"),
        (b"EPRT |2|2001:db8::1|40001|\r\n", b"EPRT |2|2001:db8::1|40001|\r\n"),
        (b"STOR " + b"x" * 2000 + b"\r\n", b"STOR " + b"x" * 2000 + b"\r\n"),
        (b"PORT " + b" " * 1000 + b"1\r\n", b"PORT 0,0,0,0,0,0" + b" " * 7 + b"\r\n"),
    ],
)
def test_nothing_else_is_opened_by_a_command(
    client: Connection, command: bytes, passes_as: bytes
) -> None:
    assert client.say(client.client, command) == passes_as
    assert client.gateway.expected == []


@pytest.mark.parametrize(
    ("replies", "pass_as"),
    [
        (b"227 Entering (10,0,0,9,156,65).\r\n", b"227 Entering (203,0,113,1,0,0).\r\n"),
        (b"227 Entering (10,0,0,5,0,22).\r\n", b"227 Entering (203,0,113,1,0,0).\r\n"),
        (b"227 Entering (198,51,100,8,156,65).\r\n", b"227 Entering (198,51,100,8,156,65).\r\n"),
        (b"229 Entering (|||22|)\r\n", b"229 Entering (|||0|)\r\n"),
        # An answer, though it is odd.
        (b"227 (10,0,0,5,156,65\n", b"227 (203,0,113,1,%d,%d\n"),
        # No answers: a line of a longer reply, which may be a file's name or text, and other lines.
        (
            b"211-Status\r\n227 Entering (10,0,0,5,156,65).\r\n211 End\r\n",
            b"211-Status\r\n227 (0,0,0,0,0,0)\r\n211 End\r\n",
        ),
        (b"PORT 10,0,0,5,156,65\r\n", b"PORT 10,0,0,5,156,65\r\n"),
        (b"250 227 Entering (10,0,0,5,156,65)\r\n", b"250 227 Entering (10,0,0,5,156,65)\r\n"),
    ],
)
def test_nothing_else_is_opened_by_a_reply(
    server: Connection, replies: bytes, pass_as: bytes
) -> None:
    server.say(server.client, b"PASV\r\nEPSV\r\n")
    said = server.say(server.server, replies)
    if b"%d" in pass_as:
        (data,) = server.gateway.expected
        pass_as %= data.mport >> 8, data.mport & 255
    else:
        assert server.gateway.expected == []
    assert said == pass_as


def test_a_reply_to_what_nobody_asked_opens_nothing(server: Connection) -> None:
    assert b"0,0,0,0" in server.say(server.server, b"227 Entering (10,0,0,5,156,65).\r\n")
    server.say(server.client, b"PASV\r\n")
    server.say(server.server, b"227 Entering (10,0,0,5,156,65).\r\n")
    assert b"0,0,0,0" in server.say(server.server, b"227 Entering (10,0,0,5,156,66).\r\n")
    assert [ms.sport for ms in server.gateway.expected] == [40001]


def test_only_the_other_end_is_let_in_and_only_with_a_syn(client: Connection) -> None:
    mport = port_in(client.say(client.client, b"PORT 10,0,0,2,156,65\r\n"))
    mapped = (GATEWAY, mport)
    for packet in (
        tcp(STRANGER, mapped, SYN),
        tcp(SERVERS_DATA, mapped, ACK, b"data"),
        tcp(SERVERS_DATA, mapped, RST),
    ):
        assert client.gateway.into(packet) is packet
    assert client.gateway.into(tcp(SERVERS_DATA, mapped, SYN)) is not None


def test_a_command_for_which_no_port_is_free_announces_port_0() -> None:
    over = active(gateway(ports=range(61000, 61001)))
    assert over.say(over.client, b"PORT 10,0,0,2,156,65\r\n") == b"PORT 203,0,113,1,0,0\r\n"
    assert over.gateway.errors == {"no_port": 1}


@pytest.mark.parametrize("profile", PROFILES)
def test_from_a_port_that_it_announced_a_client_may_connect_and_be_silent(profile: str) -> None:
    """The entry that waits for the server is this connection's: it is established, as any other."""
    over = active(gateway(timeouts=PROFILES[profile]))
    over.say(over.client, b"PORT 10,0,0,2,156,65\r\n")
    (data,) = over.gateway.expected
    client = ("10.0.0.2", 40001)
    assert over.gateway.out(tcp(client, SERVERS_DATA, SYN)) is not None
    over.gateway.into(tcp(SERVERS_DATA, (GATEWAY, data.mport), SYN | ACK))
    over.gateway.out(tcp(client, SERVERS_DATA, ACK))
    over.gateway.into(tcp(SERVERS_DATA, (GATEWAY, data.mport), ACK))
    assert data.state_name == "ESTABLISHED"
    over.gateway.passes(PROFILES[profile].tcp_established - 1)
    assert data in over.gateway.sessions.entries()


# -- how long -----------------------------------------------------------------------------


def transfer(over: Connection, port: int) -> IpMasq:
    """Announce a port of the client, and have the server connect to it; returns the entry."""
    command = b"PORT " + host_port("10.0.0.2", port) + b"\r\n"
    mport = port_in(over.say(over.client, command))
    over.gateway.into(tcp(SERVERS_DATA, (GATEWAY, mport), SYN))
    (data,) = [ms for ms in over.gateway.expected if ms.sport == port]
    return data


def test_one_transfer_after_the_other_gets_its_data_connection(client: Connection) -> None:
    for n in range(30):
        data = transfer(client, 41000 + n)
        assert data.state_name == "SYN_RECV"
    assert len(client.gateway.expected) == 30


def test_of_announcements_that_nobody_answers_the_oldest_go(client: Connection) -> None:
    for n in range(100):
        client.say(client.client, b"PORT " + host_port("10.0.0.2", 41000 + n) + b"\r\n")
    assert sorted(ms.sport for ms in client.gateway.expected) == list(range(41092, 41100))


def test_an_announcement_that_nobody_answers_expires(client: Connection) -> None:
    client.say(client.client, b"PORT 10,0,0,2,156,65\r\n")
    client.gateway.passes(245)
    assert client.gateway.expected == []
    assert len(client.gateway.sessions.entries()) == 1


def test_the_control_connection_does_not_expire_before_the_data_connection() -> None:
    over = active(gateway())
    data = transfer(over, 41000)
    for answer in (
        tcp(("10.0.0.2", 41000), SERVERS_DATA, SYN | ACK),
        tcp(("10.0.0.2", 41000), SERVERS_DATA, ACK),
    ):
        over.gateway.out(answer)
    for _ in range(10):
        over.gateway.passes(7000)
        over.gateway.out(tcp(("10.0.0.2", 41000), SERVERS_DATA, ACK))
    assert data.control in over.gateway.sessions.entries()
    over.gateway.passes(8000)
    over.gateway.passes(8000)
    assert over.gateway.sessions.entries() == []


def test_the_data_connection_goes_when_the_control_connection_goes(client: Connection) -> None:
    data = transfer(client, 41000)
    assert data.control is not None
    assert client.gateway.sessions.remove(data.control, DELETED) == 2
    assert client.gateway.sessions.entries() == []


@pytest.mark.parametrize("ending", ["reset", "closed"])
def test_when_the_control_connection_is_over_nobody_is_let_in(
    client: Connection, ending: str
) -> None:
    transfer(client, 41000)
    client.say(client.client, b"PORT 10,0,0,2,156,65\r\n")
    if ending == "reset":
        client.goes(client.client, client.client.sent, b"", RST)
    else:
        client.ends(client.client)
        assert {ms.sport for ms in client.gateway.expected} == {40001, 41000}
        client.ends(client.server)
    assert [ms.sport for ms in client.gateway.expected] == [41000]


def test_a_helper_that_is_off_changes_nothing() -> None:
    over = Connection(Gateway(), CLIENT, SERVER)
    over.say(over.client, LOGIN)
    command = b"PORT 10,0,0,2,156,65\r\n"
    assert over.say(over.client, command) == command
    assert over.gateway.expected == []


def test_a_helper_is_for_what_the_inside_opens_and_what_a_person_forwards() -> None:
    """Not for a packet that the filtering lets in from a port 21 outside."""
    over = gateway(filtering="endpoint-independent")
    mapped = source(over.out(tcp(CLIENT, ("198.51.100.8", 80), SYN)) or b"")
    assert over.into(tcp(SERVER, mapped, SYN)) is not None
    entry = next(ms for ms in over.masq.sessions.entries() if ms.daddr == number(SERVER[0]))
    assert (entry.dport, entry.app) == (21, None)
