"""The way out changes while sessions last: a second uplink has another masquerade address."""

from __future__ import annotations

import pytest

from nfmasq.apps import helpers
from nfmasq.engine import UDP
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.entry import OPEN_ENDED
from nfmasq.engine.wire.by_address import ESP
from tests.gateway import (
    GATEWAY,
    INSIDE,
    NEW_ADDRESS,
    OTHER_SERVER,
    SERVER,
    SERVER_OTHER_PORT,
    Gateway,
    masquerade_with,
)
from tests.packets import (
    ACK,
    ECHO_REPLY,
    FIN,
    RST,
    SYN,
    Endpoint,
    destination,
    ip,
    number,
    query,
    reply,
    source,
    source_address,
    tcp,
    udp,
)

FIRST, SECOND = GATEWAY, NEW_ADDRESS
FORWARDED: Endpoint = (FIRST, 80)
CLIENT: Endpoint = ("198.51.100.9", 50000)
FTP: Endpoint = (SERVER[0], 21)


class Uplinks(Gateway):
    """A gateway that sends by its first uplink, until `address` says by which address it does."""

    def connect(self, server: Endpoint = SERVER) -> Endpoint:
        """Open a connection in both directions; returns its masquerade endpoint."""
        sent = self.out(tcp(INSIDE, server, SYN))
        assert sent is not None
        assert self.into(tcp(server, source(sent), SYN | ACK)) is not None
        assert self.out(tcp(INSIDE, server, ACK)) is not None
        return source(sent)

    def resets(self) -> list[tuple[Endpoint, Endpoint, int]]:
        """Take what was sent to the inside: from whom, to whom, and the flags."""
        sent = [(source(p), destination(p), p[33]) for p in self.masq.outbox]
        self.masq.outbox.clear()
        return sent


def answered(gateway: Gateway, server: Endpoint = SERVER) -> Endpoint:
    """Begin an answered session over UDP; returns its masquerade endpoint."""
    mapped = gateway.send(INSIDE, server)
    assert gateway.lets_in(server, mapped)
    return mapped


@pytest.fixture(params=[True, False], ids=["fast", "plain"])
def gateway(request: pytest.FixtureRequest) -> Uplinks:
    gateway = Uplinks()
    gateway.masq = masquerade_with(fast=request.param)
    gateway.sessions = gateway.masq.sessions
    return gateway


# -- a session that the inside began ----------------------------------------------------


def test_udp_goes_on_by_the_other_address_and_loses_no_packet(gateway: Uplinks) -> None:
    before = answered(gateway)
    gateway.address = SECOND
    after = gateway.send(INSIDE, SERVER)
    assert after[0] == SECOND
    assert gateway.lets_in(SERVER, after)
    assert not gateway.lets_in(SERVER, before)
    assert gateway.send(INSIDE, SERVER) == after
    assert gateway.ended == {"address": 1}
    assert not gateway.masq.outbox


def test_a_ping_goes_on_by_the_other_address(gateway: Uplinks) -> None:
    sent = gateway.out(query(INSIDE, SERVER[0]))
    assert sent is not None
    mapped = source_address(sent), int.from_bytes(sent[24:26], "big")
    assert gateway.into(reply(SERVER[0], mapped, ECHO_REPLY)) is not None
    gateway.address = SECOND
    sent = gateway.out(query(INSIDE, SERVER[0]))
    assert sent is not None
    assert source_address(sent) == SECOND


def test_another_protocol_goes_on_by_the_other_address() -> None:
    gateway = Gateway(other_protocols="by-address")
    gateway.out(ip(INSIDE[0], SERVER[0], ESP, bytes(16)))
    gateway.into(ip(SERVER[0], FIRST, ESP, bytes(16)))
    gateway.address = SECOND
    sent = gateway.out(ip(INSIDE[0], SERVER[0], ESP, bytes(16)))
    assert sent is not None
    assert source_address(sent) == SECOND
    assert gateway.ended == {"address": 1}


@pytest.mark.parametrize("flags", [ACK, FIN | ACK])
def test_a_tcp_client_is_reset_by_its_first_segment(gateway: Uplinks, flags: int) -> None:
    """The segment has the number that the client expects, so no probe asks for it."""
    gateway.connect()
    gateway.address = SECOND
    assert gateway.out(tcp(INSIDE, SERVER, flags, ack=0x01020304)) is None
    (reset,) = gateway.masq.outbox
    assert (source(reset), destination(reset), reset[33]) == (SERVER, INSIDE, RST)
    assert reset[24:28] == b"\1\2\3\4"
    assert gateway.ended == {"address": 1}
    assert gateway.errors == {"address_changed": 1}
    gateway.masq.outbox.clear()
    for _ in range(20):
        gateway.passes(1)
    assert not gateway.masq.outbox


def test_the_same_ports_open_a_connection_anew_by_the_other_address(gateway: Uplinks) -> None:
    gateway.connect()
    gateway.address = SECOND
    assert gateway.connect()[0] == SECOND
    assert not gateway.masq.outbox


def test_without_resets_the_server_gets_to_refuse_the_connection() -> None:
    gateway = Uplinks(reset_on_address_change=False)
    gateway.connect()
    gateway.address = SECOND
    sent = gateway.out(tcp(INSIDE, SERVER, ACK))
    assert sent is not None
    assert source_address(sent) == SECOND
    refusal = tcp(SERVER, source(sent), RST)
    assert gateway.into(refusal) == tcp(SERVER, INSIDE, RST)


def test_a_session_whose_packets_take_no_other_way_is_left_alone(gateway: Uplinks) -> None:
    """Packets of one host may go several ways: by mark, by destination, by protocol."""
    first = answered(gateway)
    gateway.address = SECOND
    second = answered(gateway, OTHER_SERVER)
    for _ in range(3):
        gateway.address = FIRST
        assert gateway.send(INSIDE, SERVER) == first
        gateway.address = SECOND
        assert gateway.send(INSIDE, OTHER_SERVER) == second
    assert gateway.ended == {}


def test_a_way_that_goes_back_and_forth_leaves_nothing_behind(gateway: Uplinks) -> None:
    free = gateway.sessions.ports_free(UDP)
    for n in range(100):
        gateway.address = (FIRST, SECOND)[n % 2]
        assert answered(gateway)[0] == gateway.address
    assert len(gateway.sessions.entries()) == 1
    assert gateway.sessions.ports_free(UDP) == free - 1
    assert gateway.ended == {"address": 99}


# -- a session that may not change its address --------------------------------------------


def test_a_client_of_a_forwarded_port_is_answered_by_the_address_that_it_asked() -> None:
    server = Server(number(INSIDE[0]), 80)
    forward = Forward(UDP, range(80, 81), [server])
    gateway = Gateway(forwards=Forwards([forward]))
    gateway.masq.inbound.maddrs = {number(FIRST), number(SECOND)}
    gateway.address = SECOND
    assert gateway.lets_in(CLIENT, FORWARDED)
    for _ in range(3):
        assert gateway.send((INSIDE[0], 80), CLIENT) == FORWARDED
        assert gateway.lets_in(CLIENT, FORWARDED)
    assert gateway.ended == {}


def test_who_was_let_in_by_the_filtering_is_answered_by_the_address_that_it_asked() -> None:
    gateway = Gateway(filtering="endpoint-independent")
    mapped = answered(gateway)
    assert gateway.lets_in(OTHER_SERVER, mapped)
    gateway.address = SECOND
    assert gateway.send(INSIDE, OTHER_SERVER) == mapped
    assert gateway.send(INSIDE, SERVER)[0] == SECOND
    assert gateway.send(INSIDE, OTHER_SERVER) == mapped


@pytest.mark.parametrize("is_answered", [True, False])
def test_a_session_stays_while_its_interface_has_its_address(is_answered: bool) -> None:
    """The kernel may prefer another of the interface's addresses by now."""
    gateway = Gateway()
    first, second = number(FIRST), number(SECOND)
    gateway.masq.outbound.beside = {key: {first, second} for key in (first, second)}
    mapped = gateway.send(INSIDE, SERVER)
    if is_answered:
        assert gateway.lets_in(SERVER, mapped)
    gateway.address = SECOND
    assert gateway.send(INSIDE, SERVER) == mapped
    assert gateway.send(INSIDE, SERVER_OTHER_PORT)[0] == SECOND
    assert gateway.ended == {}


# -- a session of a helper ----------------------------------------------------------------


class Transfer(Uplinks):
    """A client of FTP in active mode, whose server has opened the data connection."""

    def __init__(self) -> None:
        super().__init__(apps=helpers({"ftp": (21,)}))
        mapped = self.connect(FTP)
        port = f"PORT {INSIDE[0].replace('.', ',')},156,65\r\n".encode()
        assert self.out(tcp(INSIDE, FTP, ACK, port, seq=1001)) is not None
        (self.data,) = self.expected
        self.data_port: Endpoint = (mapped[0], self.data.mport)
        self.inside_data: Endpoint = (INSIDE[0], 40001)

    def server_opens(self) -> None:
        server: Endpoint = (FTP[0], 20)
        assert self.into(tcp(server, self.data_port, SYN)) is not None
        assert self.out(tcp(self.inside_data, server, SYN | ACK)) is not None
        assert self.into(tcp(server, self.data_port, ACK)) is not None

    def leaves_from(self) -> Endpoint:
        """Send a segment of the data connection; returns where it seems to come from."""
        sent = self.out(tcp(self.inside_data, (FTP[0], 20), ACK))
        assert sent is not None
        return source(sent)


def test_an_announced_session_stays_at_the_address_that_was_announced() -> None:
    """Marks may lead the data another way than the control connection."""
    transfer = Transfer()
    transfer.address = SECOND
    transfer.server_opens()
    assert transfer.leaves_from() == transfer.data_port
    assert transfer.ended == {}


def test_it_ends_with_the_session_that_announced_it_and_both_are_reset() -> None:
    transfer = Transfer()
    transfer.server_opens()
    transfer.address = SECOND
    assert transfer.out(tcp(INSIDE, FTP, ACK, b"NOOP\r\n")) is None
    assert transfer.ended == {"address": 2}
    assert transfer.sessions.entries() == []
    assert transfer.resets() == [
        ((FTP[0], 20), transfer.inside_data, ACK),  # the probe: its answer is answered by a reset
        (FTP, INSIDE, RST),
    ]
    assert transfer.out(tcp(transfer.inside_data, (FTP[0], 20), ACK)) is None
    assert transfer.resets() == [((FTP[0], 20), transfer.inside_data, RST)]


def test_what_nobody_has_opened_yet_is_not_probed() -> None:
    transfer = Transfer()
    assert transfer.data.flags & OPEN_ENDED
    transfer.address = SECOND
    assert transfer.out(tcp(INSIDE, FTP, ACK, b"NOOP\r\n")) is None
    assert transfer.resets() == [(FTP, INSIDE, RST)]
    assert transfer.sessions.entries() == []


PHONE: Endpoint = ("10.0.0.2", 5060)
PROXY: Endpoint = ("198.51.100.7", 5060)
RTP = 9000


class Phone(Gateway):
    """A phone inside that calls, and announces where it wants its media."""

    def __init__(self) -> None:
        super().__init__(apps=helpers({"sip": (5060,)}))

    def says(self, message: bytes) -> bytes:
        sent = self.out(udp(PHONE, PROXY, message))
        assert sent is not None
        return sent[28:]

    def announces(self) -> bytes:
        """Send the call, anew if need be; returns the announcement as the proxy gets it."""
        body = b"v=0\r\nc=IN IP4 10.0.0.2\r\nm=audio %d RTP/AVP 0\r\n" % RTP
        head = b"INVITE sip:x SIP/2.0\r\nContent-Length: %d\r\n\r\n" % len(body)
        return self.says(head + body).partition(b"\r\n\r\n")[2]


def test_a_call_that_moves_before_its_answer_is_announced_at_the_new_address() -> None:
    phone = Phone()
    assert FIRST.encode() in phone.announces()
    phone.address = SECOND
    announced = phone.announces()
    mports = [m.mport for m in phone.expected if (m.sport, m.maddr) == (RTP, number(SECOND))]
    assert announced == b"v=0\r\nc=IN IP4 %s\r\nm=audio %d RTP/AVP 0\r\n" % (
        SECOND.encode(),
        mports[0],
    )


def test_media_that_was_announced_before_the_call_moved_goes_the_way_of_the_call() -> None:
    phone = Phone()
    phone.announces()
    phone.address = SECOND
    phone.says(b"\r\n\r\n")
    assert phone.send((PHONE[0], RTP), ("198.51.100.7", 8000))[0] == SECOND
