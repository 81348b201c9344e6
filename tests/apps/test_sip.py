"""SIP: calls work both ways, with their media, and nothing else is opened."""

from __future__ import annotations

import re
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.apps import helpers
from nfmasq.apps.sdp import MOST_MEDIA
from nfmasq.apps.sip import LONGEST, MOST_PARTS
from nfmasq.engine import BEHAVIOURS, TCP, UDP, IpMasq
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.helper.app import MOST_AGREEMENTS
from nfmasq.engine.table.endings import DELETED
from tests.gateway import GATEWAY, Gateway
from tests.packets import Endpoint, checksums_are_right, number, udp

PHONE: Endpoint = ("10.0.0.2", 5062)
PROXY: Endpoint = ("198.51.100.7", 5060)
STRANGER: Endpoint = ("198.51.100.66", 7000)


class Call:
    """A phone inside and a proxy outside, and what they say to each other."""

    def __init__(self, phone: Endpoint = PHONE, **settings: object) -> None:
        self.gateway = Gateway(apps=helpers({"sip": (5060,)}), **settings)
        self.phone = phone
        self.mapped: Endpoint = self.gateway.send(phone, PROXY, b"\r\n\r\n")

    def out(self, message: str) -> str:
        """Send a message to the proxy; returns it as the proxy gets it."""
        sent = self.gateway.out(udp(self.phone, PROXY, message.encode()))
        assert sent is not None
        assert checksums_are_right(sent)
        return sent[28:].decode()

    def into(self, message: str) -> str:
        """Send a message to the phone; returns it as the phone gets it."""
        sent = self.gateway.into(udp(PROXY, self.mapped, message.encode()))
        assert sent is not None
        assert checksums_are_right(sent)
        return sent[28:].decode()

    @property
    def address(self) -> str:
        """The phone's masquerade address and port."""
        address, port = self.mapped
        return f"{address}:{port}"

    @property
    def media(self) -> list[IpMasq]:
        return self.gateway.expected

    def mports(self) -> dict[int, int]:
        """Return the masquerade ports of the expected sessions, by their inside ports."""
        return {ms.sport: ms.mport for ms in self.media}


@pytest.fixture
def call() -> Call:
    return Call()


def message(start: str, *headers: str, body: str = "") -> str:
    lines = [start, *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines) + body


def sdp(*lines: str, address: str = PHONE[0]) -> str:
    head = ["v=0", f"o=me 1 1 IN IP4 {address}", "s=-", f"c=IN IP4 {address}", "t=0 0"]
    return "".join(f"{line}\r\n" for line in (*head, *lines))


def invite(body: str) -> str:
    return message("INVITE sip:you@example.net SIP/2.0", "CSeq: 1 INVITE", body=body)


def body_of(text: str) -> str:
    head, _, body = text.partition("\r\n\r\n")
    assert f"Content-Length: {len(body)}" in head
    return body


# -- how long it lasts ---------------------------------------------------------------------

USUAL = 300  # seconds that a session over UDP lives without a packet


def granted(method: str, *headers: str, call_id: str = "1") -> str:
    return message("SIP/2.0 200 OK", f"CSeq: 2 {method}", f"Call-ID: {call_id}", *headers)


def lives(call: Call) -> float:
    """Return for how many seconds the phone can be reached, if no packet comes in between."""
    (ms,) = (ms for ms in call.gateway.sessions.entries() if ms.control is None)
    assert ms.timer is not None
    return ms.timer - call.gateway.now


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        (("REGISTER", "Contact: <sip:me@{ours}>;expires=3600"), 3600),
        (("REGISTER", "m: sip:me@{ours};q=0.7;Expires = 3600"), 3600),
        (("REGISTER", "Contact: <sip:me@{ours}>", "Expires: 3600"), 3600),
        (("REGISTER", "Contact: <sip:me@{ours}>;expires=1800", "Expires: 3600"), 1800),
        (("REGISTER", "Expires: 3600"), 3600),
        (("REGISTER", "Contact: <sip:me@{ours}>;q=1\r\n ;expires=3600"), 3600),
        (("REGISTER", "Contact: <sip:a@1.2.3.4>;expires=99, <sip:me@{ours}>;expires=900"), 900),
        (("REGISTER", 'Contact: "a, b" <sip:me@{ours};ob>;expires=900,<sip:x>;expires=99'), 900),
        (("REGISTER", "Contact: <sip:x>;expires=9", "Contact: <sip:me@{ours}>;expires=900"), 900),
        (("REGISTER", "Contact: <sip:me@{ours}>;expires=900", "Contact: <sip:x>;expires=9"), 900),
        (("SUBSCRIBE", "Expires: 600"), 600),
        (("INVITE", "Session-Expires: 1800;refresher=uas"), 1800),
        (("UPDATE", "x: 1800"), 1800),
        (("REGISTER", "Contact: <sip:me@{ours}>;expires=4294967295"), 24 * 3600),
        (("REGISTER", "Contact: <sip:me@{ours}>;expires=60"), USUAL),
        (("REGISTER", "Contact: <sip:me@{ours}>"), USUAL),
        (("REGISTER", "Contact: <sip:me@{ours};expires=900>"), USUAL),
        (("REGISTER", "Contact: <sip:me@192.0.2.1:5062>;expires=3600"), USUAL),
        (("REGISTER", "Contact: <sip:me@{ours}>;expires=soon"), USUAL),
        (("OPTIONS", "Expires: 3600"), USUAL),
        (("INVITE", "Expires: 3600"), USUAL),
        (("REGISTER",), USUAL),
    ],
    ids=str,
)
def test_a_phone_can_be_reached_for_as_long_as_the_answer_says(
    call: Call, answer: tuple[str, ...], seconds: int
) -> None:
    method, *headers = answer
    call.into(granted(method, *(header.format(ours=call.address) for header in headers)))
    assert lives(call) == seconds
    call.gateway.passes(seconds - 1)
    assert call.into(message(f"INVITE sip:me@{call.address} SIP/2.0"))
    assert lives(call) == USUAL


@pytest.mark.parametrize(
    "start", ["SIP/2.0 100 Trying", "SIP/2.0 401 Unauthorized", "REGISTER sip:x SIP/2.0"]
)
def test_what_is_asked_for_or_refused_lasts_no_longer(call: Call, start: str) -> None:
    own = message(start, "CSeq: 2 REGISTER", f"Contact: <sip:me@{call.address}>;expires=3600")
    call.out(own)
    call.into(own)
    assert lives(call) == USUAL


def test_packets_meanwhile_take_nothing_from_what_was_agreed(call: Call) -> None:
    call.into(granted("REGISTER", "Expires: 3600"))
    call.gateway.passes(1000)
    call.out("\r\n\r\n")
    assert lives(call) == 2600
    call.into("\r\n\r\n")
    assert lives(call) == 2600
    call.gateway.passes(2500)
    call.out("\r\n\r\n")
    assert lives(call) == USUAL


def test_a_phone_that_unregisters_lives_as_any_other(call: Call) -> None:
    call.into(granted("REGISTER", f"Contact: <sip:me@{call.address}>;expires=3600"))
    call.gateway.passes(10)
    call.into(granted("REGISTER", "Contact: <sip:other@192.0.2.1>;expires=3600"))
    assert lives(call) == USUAL
    call.gateway.passes(USUAL + 1)
    assert call.gateway.sessions.entries() == []


def test_a_phone_that_unregisters_lives_as_any_other_without_inbound_refresh() -> None:
    call = Call(inbound_refresh=False)
    call.into(granted("REGISTER", "Expires: 3600"))
    assert lives(call) == 3600
    call.into(granted("REGISTER", "Expires: 0"))
    assert lives(call) == USUAL


def test_of_several_lines_of_a_phone_the_longest_counts(call: Call) -> None:
    for line, seconds in (("1", 3600), ("2", 1800), ("3", 900)):
        call.into(granted("REGISTER", f"Expires: {seconds}", call_id=line))
    assert lives(call) == 3600
    call.into(granted("REGISTER", "Expires: 0", call_id="1"))
    assert lives(call) == 1800
    call.into(granted("INVITE", "Session-Expires: 7200", call_id="4"))
    assert lives(call) == 7200
    call.out(granted("BYE", call_id="4"))
    assert lives(call) == 1800


def test_however_many_lines_there_are_the_longest_counts(call: Call) -> None:
    for line in range(2 * MOST_AGREEMENTS):
        call.into(granted("REGISTER", f"Expires: {3600 - line}", call_id=str(line)))
    assert lives(call) == 3600
    (ms,) = call.gateway.sessions.entries()
    assert len(ms.app_data._agreed) == MOST_AGREEMENTS


def test_a_phone_that_knows_its_masquerade_address_can_be_reached_too(call: Call) -> None:
    register = message("REGISTER sip:x SIP/2.0", f"Contact: <sip:me@{call.address}>;expires=3600")
    assert call.out(register) == register
    call.into(granted("REGISTER", f"Contact: <sip:me@{call.address}>;expires=3600"))
    assert lives(call) == 3600


def test_the_session_of_a_phone_inside_that_grants_a_call_lives_as_agreed(call: Call) -> None:
    call.out(granted("INVITE", "Session-Expires: 1800"))
    assert lives(call) == 1800


# -- headers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [("Via", "From", "To", "Contact"), ("v", "f", "t", "m"), ("VIA", "from", "TO", "CONTACT")],
)
def test_a_phone_registers_and_finds_itself_in_the_answer(
    call: Call, names: tuple[str, ...]
) -> None:
    via, from_, to, contact = names
    register = message(
        "REGISTER sip:example.net SIP/2.0",
        f"{via}: SIP/2.0/UDP 10.0.0.2:5062;rport;branch=z9hG4bK1",
        f"{from_}: <sip:me@10.0.0.2>;tag=1",
        f'{to}: "me" <sip:me@10.0.0.2:5062>',
        "Call-ID: 7@10.0.0.2",
        f"{contact}: <sip:me@10.0.0.2:5062;transport=udp>;expires=60,",
        " sip:10.0.0.2",
    )
    ours = call.address
    sent = call.out(register)
    assert sent == message(
        "REGISTER sip:example.net SIP/2.0",
        f"{via}: SIP/2.0/UDP {ours};rport;branch=z9hG4bK1",
        f"{from_}: <sip:me@{GATEWAY}>;tag=1",
        f'{to}: "me" <sip:me@{ours}>',
        "Call-ID: 7@10.0.0.2",
        f"{contact}: <sip:me@{ours};transport=udp>;expires=60,",
        f" sip:{ours}",
    )
    answer = sent.replace("REGISTER sip:example.net SIP/2.0", "SIP/2.0 200 OK")
    answer = answer.replace(";rport", f";received={GATEWAY};rport={call.mapped[1]}")
    expected = register.replace("REGISTER sip:example.net SIP/2.0", "SIP/2.0 200 OK")
    expected = expected.replace(";rport", ";received=10.0.0.2;rport=5062")
    assert call.into(answer) == expected.replace(" sip:10.0.0.2\r", " sip:10.0.0.2:5062\r")


def test_a_call_from_outside_is_for_the_phone_itself(call: Call) -> None:
    ours = call.address
    theirs = (
        f"Via: SIP/2.0/UDP 198.51.100.7;branch=z9hG4bK2, SIP/2.0/UDP {ours};branch=z9hG4bK3",
        "From: <sip:you@example.net>;tag=2",
    )
    contact = "Contact: <sip:you@10.0.0.2:5062>"  # the caller's address inside a network of its own
    call_out = message(f"INVITE sip:me@{ours} SIP/2.0", *theirs, f"To: <sip:me@{ours}>", contact)
    assert call.into(call_out) == message(
        "INVITE sip:me@10.0.0.2:5062 SIP/2.0", *theirs, "To: <sip:me@10.0.0.2:5062>", contact
    )
    own = "To: <sip:me@10.0.0.2:5062>;tag=3", "Contact: <sip:me@10.0.0.2:5062>"
    assert call.out(message("SIP/2.0 200 OK", *theirs, *own)) == message(
        "SIP/2.0 200 OK", *theirs, f"To: <sip:me@{ours}>;tag=3", f"Contact: <sip:me@{ours}>"
    )
    # The caller's URI goes back as the caller gave it.
    bye = message("BYE sip:you@10.0.0.2:5062 SIP/2.0")
    assert call.out(bye) == bye


def test_the_port_is_written_where_the_usual_one_was_meant() -> None:
    call = Call(("10.0.0.2", 5060))
    sent = call.out(message("OPTIONS sip:x SIP/2.0", "v: SIP/2.0/UDP 10.0.0.2;branch=1"))
    assert f"v: SIP/2.0/UDP {call.address};branch=1\r\n" in sent


def test_others_in_the_answers_stay_who_they_are(call: Call) -> None:
    answer = message(
        "SIP/2.0 200 OK",
        f"Via: SIP/2.0/UDP {GATEWAY}:1234;received={GATEWAY};rport=1234",
        f"Contact: <sip:me@{GATEWAY}:1234>, <sip:you@198.51.100.9:{call.mapped[1]}>",
        f"X-Note: sip:me@{GATEWAY}:{call.mapped[1]}",
    )
    assert call.into(answer) == answer


def test_a_phone_that_knows_its_masquerade_address_goes_on_to_be_called_by_it(call: Call) -> None:
    ours = call.address
    register = message("REGISTER sip:x SIP/2.0", f"Contact: <sip:me@{ours}>")
    assert call.out(register) == register
    options = message(f"OPTIONS sip:me@{ours} SIP/2.0", f"To: <sip:me@{ours}>")
    assert call.into(options) == options


def test_a_contact_elsewhere_inside_is_not_announced(call: Call) -> None:
    ours = f"{GATEWAY}:0"
    sent = call.out(message("REGISTER sip:x SIP/2.0", "Contact: <sip:me@10.0.0.3:5060>"))
    assert sent == message("REGISTER sip:x SIP/2.0", f"Contact: <sip:me@{ours}>")
    public = message("REGISTER sip:x SIP/2.0", "Contact: <sip:me@198.51.100.9:5060>")
    assert call.out(public) == public


def test_a_server_on_a_forwarded_port_is_called_by_its_own_address() -> None:
    server = Server(number("10.0.0.2"), 5060)
    forwards = Forwards([Forward(UDP, range(5060, 5061), [server])])
    gateway = Gateway(apps=helpers({"sip": (5060,)}), forwards=forwards)
    gateway.masq.inbound.maddrs = (number(GATEWAY),)
    request = message(f"INVITE sip:me@{GATEWAY} SIP/2.0", f"To: <sip:me@{GATEWAY}>")
    arrived = gateway.into(udp(STRANGER, (GATEWAY, 5060), request.encode()))
    assert arrived is not None
    assert arrived[28:].decode() == message(
        "INVITE sip:me@10.0.0.2 SIP/2.0", "To: <sip:me@10.0.0.2>"
    )
    answer = message(
        "SIP/2.0 200 OK", "Contact: <sip:10.0.0.2>", body=sdp("m=audio 8000 RTP/AVP 0")
    )
    sent = gateway.out(udp(("10.0.0.2", 5060), STRANGER, answer.encode()))
    assert sent is not None
    assert f"Contact: <sip:{GATEWAY}:5060>" in sent[28:].decode()
    media = {ms.sport: ms.mport for ms in gateway.sessions.entries() if ms.control}
    assert f"m=audio {media[8000]} RTP/AVP 0\r\n" in sent[28:].decode()


# -- media ---------------------------------------------------------------------------------


def test_media_comes_to_the_ports_that_were_announced(call: Call) -> None:
    offer = sdp("m=audio 8000 RTP/AVP 0", "a=sendrecv", "m=video 9000 RTP/SAVP 31")
    sent = body_of(call.out(invite(offer)))
    mports = call.mports()
    assert sent == sdp(
        f"m=audio {mports[8000]} RTP/AVP 0",
        "a=sendrecv",
        f"m=video {mports[9000]} RTP/SAVP 31",
        address=GATEWAY,
    )
    for rtp in (8000, 9000):
        assert mports[rtp] % 2 == 0
        assert mports[rtp + 1] == mports[rtp] + 1
    for port, mport in mports.items():
        packet = udp((PROXY[0], 20000 + port), (GATEWAY, mport), b"media")
        assert call.gateway.into(packet) == udp(
            (PROXY[0], 20000 + port), (PHONE[0], port), b"media"
        )
        back = call.gateway.send((PHONE[0], port), (PROXY[0], 20000 + port), b"media")
        assert back == (GATEWAY, mport)


def test_nobody_else_may_send_media(call: Call) -> None:
    call.out(invite(sdp("m=audio 8000 RTP/AVP 0")))
    assert not call.gateway.lets_in(STRANGER, (GATEWAY, call.mports()[8000]))


def test_media_with_another_host_leaves_by_the_port_that_was_announced(call: Call) -> None:
    call.out(invite(sdp("m=audio 8000 RTP/AVP 0")))
    mapped = call.gateway.send((PHONE[0], 8000), STRANGER)
    assert mapped == (GATEWAY, call.mports()[8000])
    assert call.gateway.lets_in(STRANGER, mapped)


@pytest.mark.parametrize("mapping", BEHAVIOURS)
def test_a_message_that_is_sent_again_says_the_same(mapping: str) -> None:
    call = Call(mapping=mapping)
    text = invite(sdp("m=audio 8000 RTP/AVP 0"))
    sent = call.out(text)
    assert call.out(text) == sent
    for port, mport in call.mports().items():
        call.gateway.into(udp((PROXY[0], 20000 + port), (GATEWAY, mport), b"media"))
    assert call.out(text) == sent
    assert call.out(text) == sent
    assert len(call.media) <= 4


def test_a_medium_may_have_an_address_and_an_rtcp_port_of_its_own(call: Call) -> None:
    offer = sdp(
        "m=audio 8000 RTP/AVP 0",
        "c=IN IP4 10.0.0.2",
        "a=rtcp:8010 IN IP4 10.0.0.2",
        "a=candidate:1 1 UDP 2130706431 10.0.0.2 8000 typ host",
        "a=candidate:2 1 UDP 2130706431 10.0.0.2 8004 typ host",
        "a=candidate:3 1 UDP 1 198.51.100.9 8004 typ relay raddr 10.0.0.2 rport 8004",
        "m=image 7000 udptl t38",
        address="198.51.100.9",
    )
    sent = body_of(call.out(invite(offer)))
    mports = call.mports()
    assert sorted(mports) == [8000, 8010]
    assert sent == sdp(
        f"m=audio {mports[8000]} RTP/AVP 0",
        f"c=IN IP4 {GATEWAY}",
        f"a=rtcp:{mports[8010]} IN IP4 {GATEWAY}",
        f"a=candidate:1 1 UDP 2130706431 {GATEWAY} {mports[8000]} typ host",
        f"a=candidate:2 1 UDP 2130706431 {GATEWAY} 9 typ host",
        f"a=candidate:3 1 UDP 1 198.51.100.9 8004 typ relay raddr {GATEWAY} rport 8004",
        "m=image 7000 udptl t38",
        address="198.51.100.9",
    )


def test_media_that_is_no_rtp_has_one_port(call: Call) -> None:
    call.out(invite(sdp("m=image 7000 udptl t38")))
    assert list(call.mports()) == [7000]


def test_without_a_pair_of_ports_any_two_will_do() -> None:
    call = Call(ports=(61001, 61003, 61005))
    call.out(invite(sdp("m=audio 8000 RTP/AVP 0")))
    assert sorted(call.mports().values()) == [61003, 61005]


def test_without_ports_the_medium_is_refused_and_the_call_is_not() -> None:
    call = Call(max_ports_per_host=1)
    sent = body_of(call.out(invite(sdp("m=audio 8000 RTP/AVP 0"))))
    assert sent == sdp("m=audio 0 RTP/AVP 0", address=GATEWAY)
    assert call.media == []


def test_media_does_not_outlive_its_session_nor_the_session_its_media(call: Call) -> None:
    call.out(invite(sdp("m=audio 8000 RTP/AVP 0")))
    (control,) = {ms.control for ms in call.media}
    rtp = udp((PROXY[0], 28000), (GATEWAY, call.mports()[8000]), b"media")
    for _ in range(5):
        call.gateway.passes(200)
        assert call.gateway.into(rtp) is not rtp
    assert control is not None
    assert control in call.gateway.sessions.entries()
    call.gateway.sessions.remove(control, DELETED)
    assert call.gateway.sessions.entries() == []


# -- what is not opened, and what passes -----------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "address", "passes_as", "at"),
    [
        ("m=audio 8000 RTP/AVP 0", "10.0.0.3", "m=audio 0 RTP/AVP 0", GATEWAY),
        ("m=audio 1023 RTP/AVP 0", "10.0.0.2", "m=audio 0 RTP/AVP 0", GATEWAY),
        ("m=audio 22 RTP/AVP 0", "10.0.0.2", "m=audio 0 RTP/AVP 0", GATEWAY),
        ("m=audio 65536 RTP/AVP 0", "10.0.0.2", "m=audio 0 RTP/AVP 0", GATEWAY),
        ("m=audio 0 RTP/AVP 0", "10.0.0.2", "m=audio 0 RTP/AVP 0", GATEWAY),
        ("m=audio 8000/2 RTP/AVP 0", "10.0.0.2", "m=audio 0 RTP/AVP 0", GATEWAY),
        ("m=message 8000 TCP/MSRP *", "10.0.0.2", "m=message 0 TCP/MSRP *", GATEWAY),
        ("m=audio x RTP/AVP 0", "10.0.0.2", "m=audio x RTP/AVP 0", GATEWAY),
        ("m=audio", "10.0.0.2", "m=audio", GATEWAY),
        ("m=audio 8000 RTP/AVP 0", "198.51.100.9", "m=audio 8000 RTP/AVP 0", "198.51.100.9"),
        ("m=audio 8000 RTP/AVP 0", "0.0.0.0", "m=audio 8000 RTP/AVP 0", "0.0.0.0"),
    ],
)
def test_nothing_else_is_opened(
    call: Call, lines: str, address: str, passes_as: str, at: str
) -> None:
    sent = body_of(call.out(invite(sdp(lines, address=address))))
    assert re.sub("o=.*", "", sent) == re.sub("o=.*", "", sdp(passes_as, address=at))
    assert call.media == []


def test_nothing_is_opened_by_what_comes_in(call: Call) -> None:
    offer = invite(sdp("m=audio 8000 RTP/AVP 0"))
    assert call.into(offer) == offer
    assert call.media == []


def test_a_description_opens_few_ports_however_much_it_announces(call: Call) -> None:
    offer = sdp(*(f"m=audio {port} RTP/AVP 0" for port in range(8000, 8400, 2)))
    sent = body_of(call.out(invite(offer)))
    served = [int(port) for port in re.findall(r"m=audio (\d+)", sent) if port != "0"]
    assert len(served) == MOST_MEDIA
    assert len(call.media) == 2 * MOST_MEDIA
    assert set(served) <= set(call.mports().values())
    for start in range(10000, 20000, 100):
        call.out(invite(sdp(f"m=audio {start} RTP/AVP 0")))
    assert len(call.media) == 2 * MOST_MEDIA


def test_what_is_announced_again_does_not_make_room_for_what_is_announced_with_it(
    call: Call,
) -> None:
    for ports in ((8000, 8002), (8004, 8006), (8000, 8008, 8010, 8012)):
        call.out(invite(sdp(*(f"m=audio {port} RTP/AVP 0" for port in ports))))
    assert {port for port in call.mports() if port % 2 == 0} == {8000, 8008, 8010, 8012}


@pytest.mark.parametrize(
    "text",
    [
        "\r\n\r\n",
        "",
        "INVITE",
        "\0\1\0\0!\x12\xa4B sip:me@10.0.0.2",
        "GET / HTTP/1.1\r\nContact: <sip:me@10.0.0.2>\r\n\r\n" + sdp("m=audio 8000 RTP/AVP 0"),
        message("MESSAGE sip:x SIP/2.0", "Content-Type: text/plain", body="sip:me@10.0.0.2"),
        message("BYE sip:x SIP/2.0", "Contact: *", "From: sip:me@110.0.0.2", "To: sip:10.0.0.20"),
        message("BYE sip:x SIP/2.0", "Contact: <sip:me@10.0.0.2.example.net>", "no header"),
        "ACK sip:x SIP/2.0\r\n",
    ],
)
def test_what_is_not_for_the_helper_passes_unchanged(call: Call, text: str) -> None:
    assert call.out(text) == text
    assert call.into(text) == text
    assert call.media == []


def test_a_message_with_bare_newlines_and_without_an_end_is_rewritten_too(call: Call) -> None:
    sent = call.out("\nOPTIONS sip:x SIP/2.0\nContact: sip:10.0.0.2")
    assert sent == f"\nOPTIONS sip:x SIP/2.0\nContact: sip:{call.address}"


# -- what it costs ---------------------------------------------------------------------------

SLOW = (
    *("sip:", "sips:sip", "SIP / ", "SIP/2.0/UDP ", ";received", "1.1.1.1 ", "@10.0.0.2", ","),
    *(
        ";expires",
        "; ",
        "\r\n ",
        "\r\n",
        ";expires=9,",
        ": ",
        "a",
        " ",
        "sip:10.0.0.2 ",
        "\r",
        "\n",
    ),
    *("x-a:b\n", "m=audio 8000 RTP/AVP 0\n", "c=IN IP4 10.0.0.2\n", "a=10.0.0.2 8000\n", "m=a "),
)
"""Pieces of texts that make a careless reader slow."""


def messages_of(piece: str, length: int) -> list[tuple[bool, str]]:
    """Make messages of at most `length` bytes with a piece again and again; true: going out."""
    text = piece * (length // len(piece))
    return [
        (True, f"OPTIONS sip:x SIP/2.0\r\nContact: {text}"[:length]),
        (True, f"OPTIONS sip:x SIP/2.0\r\nVia: {text}"[:length]),
        (True, invite(sdp(text))[:length]),
        (True, f"{text} SIP/2.0\r\n"[-length:]),
        (False, f"SIP/2.0 200 OK\r\nContact: {text}"[:length]),
        (False, f"SIP/2.0 200 OK\r\nVia: {text}"[:length]),
        (False, f"SIP/2.0 200 OK\r\nCSeq: 1 REGISTER\r\nContact: {text}"[:length]),
    ]


def seconds(call: Call, is_out: bool, text: str) -> float:
    """Return the least time that a message takes, of several tries."""

    def once() -> float:
        began = perf_counter()
        if is_out:
            call.gateway.out(udp(call.phone, PROXY, text.encode()))
        else:
            call.gateway.into(udp(PROXY, call.mapped, text.encode()))
        return perf_counter() - began

    return min(once() for _ in range(5))


def test_a_message_made_to_be_slow_costs_little_more_than_a_real_one(call: Call) -> None:
    """A careless pattern takes thousands of times as long."""
    media = [f"a=candidate:{n} 1 UDP 1 10.0.0.2 8000 typ host" for n in range(100)]
    real = seconds(call, True, invite(sdp("m=audio 8000 RTP/AVP 0", *media)))
    for piece in SLOW:
        for is_out, text in messages_of(piece, 65_000) + messages_of(piece, LONGEST):
            assert seconds(call, is_out, text) < 20 * real


@pytest.mark.parametrize("piece", SLOW)
def test_a_messages_cost_is_not_worse_than_in_proportion_to_its_length(
    call: Call, piece: str
) -> None:
    short, long = (messages_of(piece, length) for length in (LONGEST // 32, LONGEST))
    for (is_out, less), (_, more) in zip(short, long, strict=True):
        # A short message costs something whatever it says.
        assert seconds(call, is_out, more) < 4 * 32 * seconds(call, is_out, less)


@pytest.mark.parametrize(
    "text",
    [
        message("OPTIONS sip:x SIP/2.0", "Subject: " + LONGEST * "x"),
        message("OPTIONS sip:x SIP/2.0", *["Contact: sip:me@10.0.0.2"] * MOST_PARTS),
        message("OPTIONS sip:x SIP/2.0", "Contact: x" + MOST_PARTS * ",x"),
        message("OPTIONS sip:x SIP/2.0", "Contact: " + MOST_PARTS * "sip:10.0.0.2 "),
        invite(sdp(*["a=x"] * MOST_PARTS)),
    ],
    ids=["bytes", "lines", "values", "URIs", "media"],
)
def test_a_message_that_asks_for_too_much_is_refused_whole(call: Call, text: str) -> None:
    before = lives(call)
    call.gateway.passes(10)
    assert call.gateway.out(udp(call.phone, PROXY, text.encode())) is None
    assert call.gateway.into(udp(PROXY, call.mapped, text.encode())) is None
    assert call.gateway.errors == {"malformed": 2}
    assert lives(call) == before - 10


@pytest.mark.parametrize("user", ["a:b@", "a:b:c@", "sip:a@", "x" * 400 + "@", "a b@", "<@"])
def test_whatever_the_user_is_called_the_address_does_not_leave(call: Call, user: str) -> None:
    sent = call.out(message("OPTIONS sip:x SIP/2.0", f"Contact: <sip:{user}10.0.0.2:5062>"))
    assert sent == message("OPTIONS sip:x SIP/2.0", f"Contact: <sip:{user}{call.address}>")


@given(st.text("vcoma=:. \r\n0123456789sip@<>;/INRTPAV", max_size=200))
def test_whatever_is_announced_the_own_address_is_not(junk: str) -> None:
    call = Call()
    sent = call.out(invite(sdp(junk, "m=audio 8000 RTP/AVP 0", junk)))
    assert "10.0.0.2 " not in sent
    assert "10.0.0.2\r" not in sent
    assert all(ms.sport >= 1024 and ms.saddr == number(PHONE[0]) for ms in call.media)
    assert all(ms.protocol != TCP for ms in call.media)
