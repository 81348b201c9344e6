"""PPTP: calls that a control connection announces get through both ways, and no others."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.apps import helpers
from nfmasq.engine import IpMasq
from nfmasq.engine.helper.calls import DRAWS, MOST_CALLS, NEIGHBOURS
from nfmasq.engine.table.endings import DELETED
from nfmasq.engine.wire.gre import PPP
from tests.apps.connection import Connection
from tests.apps.pptp import (
    CLEAR_REQUEST,
    CONNECTED,
    DISCONNECT_NOTIFY,
    GRE,
    INCOMING_CONNECTED,
    INCOMING_REPLY,
    INCOMING_REQUEST,
    OUTGOING_REPLY,
    OUTGOING_REQUEST,
    REFUSED,
    SET_LINK_INFO,
    START_REQUEST,
    WAN_ERROR_NOTIFY,
    data,
    gre,
    message,
)
from tests.gateway import GATEWAY, Gateway
from tests.packets import (
    ACK,
    RST,
    checksums_are_right,
    cut,
    destination_address,
    error,
    ip,
    quoted,
)

INSIDE, NEIGHBOUR, SERVER, STRANGER = "10.0.0.2", "10.0.0.3", "198.51.100.7", "198.51.100.66"
ROUTER = "192.0.2.254"
CALL_IDS = st.sampled_from([0, 1, 7, PPP, 65535]) | st.integers(0, 65535)
OWN_IDS = CALL_IDS.filter(lambda n: n != PPP)


def gateway(**settings: object) -> Gateway:
    return Gateway(apps=helpers({"pptp": (1723,)}), **settings)


def control(gateway: Gateway, inside: str = INSIDE) -> Connection:
    """Open a control connection from a client inside."""
    over = Connection(gateway, (inside, 40000), (SERVER, 1723))
    over.say(over.client, message(START_REQUEST))
    return over


def called(over: Connection, own: int, peers: int) -> int:
    """Have a client's outgoing call answered; returns the ID that the server is told for it."""
    request = over.say(over.client, message(OUTGOING_REQUEST, own))
    ours = int.from_bytes(request[12:14], "big")
    assert request == message(OUTGOING_REQUEST, ours)
    reply = over.say(over.server, message(OUTGOING_REPLY, peers, ours, result=CONNECTED))
    assert reply == message(OUTGOING_REPLY, peers, own, result=CONNECTED)
    return ours


def calls(over: Connection) -> list[IpMasq]:
    """List the entries of calls."""
    return [ms for ms in over.gateway.sessions.entries() if ms.protocol == GRE]


@pytest.fixture
def pptp() -> Connection:
    return control(gateway())


# -- calls ------------------------------------------------------------------------------


def test_a_calls_packets_go_out_and_come_back(pptp: Connection) -> None:
    ours = called(pptp, 7, 99)
    assert pptp.gateway.out(data(INSIDE, SERVER, 99)) == data(GATEWAY, SERVER, 99)
    assert pptp.gateway.into(data(SERVER, GATEWAY, ours)) == data(SERVER, INSIDE, 7)


@given(
    st.lists(st.tuples(st.sampled_from([INSIDE, NEIGHBOUR]), OWN_IDS), max_size=8, unique=True),
    st.lists(CALL_IDS, min_size=8, max_size=8, unique=True),
)
def test_calls_of_whatever_ids_are_told_apart(
    wanted: list[tuple[str, int]], peers_ids: list[int]
) -> None:
    """Two inside hosts may pick the same ID, and an ID may be the number of PPP."""
    over = gateway()
    controls = {inside: control(over, inside) for inside in (INSIDE, NEIGHBOUR)}
    made: dict[tuple[str, int], tuple[int, int]] = {}
    for (inside, own), peers in zip(wanted, peers_ids, strict=False):
        made[inside, own] = peers, called(controls[inside], own, peers)
    for (inside, own), (peers, ours) in made.items():
        assert over.out(data(inside, SERVER, peers)) == data(GATEWAY, SERVER, peers)
        assert over.into(data(SERVER, GATEWAY, ours)) == data(SERVER, inside, own)
    for ms in over.masq.sessions.entries():
        if ms.app:
            over.masq.sessions.remove(ms, DELETED)
    assert not over.masq.sessions.entries()


def test_an_id_that_is_the_number_of_ppp(pptp: Connection) -> None:
    ours = called(pptp, PPP, 99)
    assert ours != PPP
    assert pptp.gateway.out(data(INSIDE, SERVER, 99)) == data(GATEWAY, SERVER, 99)
    assert pptp.gateway.into(data(SERVER, GATEWAY, ours)) == data(SERVER, INSIDE, PPP)


def test_two_inside_hosts_have_calls_of_one_id_with_the_same_server() -> None:
    over = gateway()
    first, second = (
        called(control(over, inside), 0, n) for inside, n in ((INSIDE, 1), (NEIGHBOUR, 2))
    )
    assert first != second
    assert over.into(data(SERVER, GATEWAY, first)) == data(SERVER, INSIDE, 0)
    assert over.into(data(SERVER, GATEWAY, second)) == data(SERVER, NEIGHBOUR, 0)


def test_messages_about_a_call_name_it_as_their_receiver_does(pptp: Connection) -> None:
    other = control(pptp.gateway, NEIGHBOUR)
    called(other, 7, 98)
    ours = called(pptp, 7, 99)
    assert ours != 7
    for kind in (SET_LINK_INFO, WAN_ERROR_NOTIFY, INCOMING_CONNECTED):
        assert pptp.say(pptp.server, message(kind, ours)) == message(kind, 7)
        assert pptp.say(pptp.client, message(kind, 99)) == message(kind, 99)
    assert pptp.say(pptp.client, message(CLEAR_REQUEST, 7)) == message(CLEAR_REQUEST, ours)


def test_a_call_that_the_server_begins() -> None:
    over = gateway()
    called(control(over, NEIGHBOUR), 7, 98)
    pptp = control(over)
    request = message(INCOMING_REQUEST, 99)
    assert pptp.say(pptp.server, request) == request
    reply = pptp.say(pptp.client, message(INCOMING_REPLY, 7, 99, result=CONNECTED))
    ours = int.from_bytes(reply[12:14], "big")
    assert reply == message(INCOMING_REPLY, ours, 99, result=CONNECTED)
    assert over.out(data(INSIDE, SERVER, 99)) == data(GATEWAY, SERVER, 99)
    assert over.into(data(SERVER, GATEWAY, ours)) == data(SERVER, INSIDE, 7)


def test_a_server_inside_behind_a_forwarded_port() -> None:
    over = gateway()
    pptp = Connection(over, (SERVER, 50000), (INSIDE, 1723), forwarded=1723)
    pptp.say(pptp.client, message(OUTGOING_REQUEST, 99))
    reply = pptp.say(pptp.server, message(OUTGOING_REPLY, 7, 99, result=CONNECTED))
    ours = int.from_bytes(reply[12:14], "big")
    assert over.out(data(INSIDE, SERVER, 99)) == data(GATEWAY, SERVER, 99)
    assert over.into(data(SERVER, GATEWAY, ours)) == data(SERVER, INSIDE, 7)


@given(st.integers(1, 200))
def test_messages_in_pieces_are_rewritten_as_if_they_were_whole(size: int) -> None:
    over = gateway()
    called(control(over, NEIGHBOUR), 7, 98)
    pptp = control(over)
    pptp.client.says(message(OUTGOING_REQUEST, 7) + message(OUTGOING_REQUEST, 8))
    pptp.finish(size)
    said = pptp.server.received[len(message(START_REQUEST)) :]
    own = {ms.mport: ms.sport for ms in calls(pptp) if ms.sport != PPP and ms.saddr & 255 == 2}
    ids = [int.from_bytes(said[at + 12 : at + 14], "big") for at in (0, 168)]
    assert said == b"".join(message(OUTGOING_REQUEST, n) for n in ids)
    assert [own[n] for n in ids] == [7, 8]


# -- nothing besides ----------------------------------------------------------------------


def test_only_the_server_of_the_call_gets_in_and_only_by_its_id(pptp: Connection) -> None:
    ours = called(pptp, 7, 99)
    for stray in (data(STRANGER, GATEWAY, ours), data(SERVER, GATEWAY, ours + 1)):
        assert pptp.gateway.into(stray) is stray


def test_only_the_host_of_the_call_gets_out_and_only_to_the_peers_id(pptp: Connection) -> None:
    called(pptp, 7, 99)
    for stray in (
        data(NEIGHBOUR, SERVER, 99),
        data(INSIDE, STRANGER, 99),
        data(INSIDE, SERVER, 98),
        data(SERVER, GATEWAY, 7),  # as if it came from outside
        ip(INSIDE, SERVER, GRE, b"\0\0\x08\0" + gre(99, b"")),  # GRE of version 0
    ):
        assert pptp.gateway.out(stray) is None
    assert pptp.gateway.errors == {"unsupported": 5}


def test_nothing_goes_out_before_the_call_is_answered(pptp: Connection) -> None:
    pptp.say(pptp.client, message(OUTGOING_REQUEST, 7))
    assert pptp.gateway.out(data(INSIDE, SERVER, 0)) is None


def over_by_notify(pptp: Connection) -> None:
    assert pptp.say(pptp.server, message(DISCONNECT_NOTIFY, 99)) == message(DISCONNECT_NOTIFY, 99)


def over_by_own_notify(pptp: Connection) -> None:
    pptp.say(pptp.client, message(DISCONNECT_NOTIFY, 7))


def over_by_refusal(pptp: Connection) -> None:
    pptp.say(pptp.server, message(OUTGOING_REPLY, 99, 7, result=REFUSED))


def over_by_reset(pptp: Connection) -> None:
    pptp.goes(pptp.server, pptp.server.sent, b"", RST | ACK)


def over_by_flush(pptp: Connection) -> None:
    (ms,) = (ms for ms in pptp.gateway.sessions.entries() if ms.app)
    pptp.gateway.sessions.remove(ms, DELETED)


@pytest.mark.parametrize(
    "ending",
    [over_by_notify, over_by_own_notify, over_by_refusal, over_by_reset, over_by_flush],
)
def test_a_call_ends(pptp: Connection, ending: object) -> None:
    ours = called(pptp, 7, 99)
    assert callable(ending)
    ending(pptp)
    assert not calls(pptp)
    stray = data(SERVER, GATEWAY, ours)
    assert pptp.gateway.into(stray) is stray
    assert pptp.gateway.out(data(INSIDE, SERVER, 99)) is None


def test_a_call_that_is_silent_lasts_as_long_as_its_control_connection_is_not(
    pptp: Connection,
) -> None:
    called(pptp, 7, 99)
    for _ in range(30):
        pptp.gateway.passes(60)
        pptp.acknowledges(pptp.client)
    assert len(calls(pptp)) == 2
    pptp.gateway.passes(700)
    assert not calls(pptp)


@pytest.mark.parametrize("way", [0, 1], ids=["inward", "outward"])
def test_a_call_ends_with_either_of_its_entries_and_can_be_had_anew(
    pptp: Connection, way: int
) -> None:
    called(pptp, 7, 99)
    pptp.gateway.sessions.remove(calls(pptp)[way], DELETED)
    pptp.acknowledges(pptp.client)
    assert not calls(pptp)
    ours = called(pptp, 7, 99)
    assert pptp.gateway.out(data(INSIDE, SERVER, 99)) == data(GATEWAY, SERVER, 99)
    assert pptp.gateway.into(data(SERVER, GATEWAY, ours)) == data(SERVER, INSIDE, 7)


def test_calls_that_nobody_answers_are_few(pptp: Connection) -> None:
    for own in range(100):
        pptp.say(pptp.client, message(OUTGOING_REQUEST, own))
    assert sorted(ms.sport for ms in calls(pptp)) == list(range(92, 100))


def test_a_control_connection_has_a_few_calls_and_no_packet_much_to_do(pptp: Connection) -> None:
    """More calls are asked for, and the server grants all of them."""
    with patch.object(pptp.gateway.sessions, "ip_masq_refresh") as refresh:
        for own in range(3 * MOST_CALLS):
            request = pptp.say(pptp.client, message(OUTGOING_REQUEST, own))
            ours = int.from_bytes(request[12:14], "big")
            refresh.reset_mock()
            pptp.say(pptp.server, message(OUTGOING_REPLY, own, ours, result=CONNECTED))
            assert (
                refresh.call_count <= 2 * 2 * MOST_CALLS
            )  # for the reply, and its acknowledgement
    assert request == message(OUTGOING_REQUEST, 0)
    assert len(calls(pptp)) == 2 * MOST_CALLS


def test_after_a_call_has_ended_another_can_be_had() -> None:
    pptp = control(gateway())
    for own in range(MOST_CALLS):
        called(pptp, own, own)
    pptp.say(pptp.client, message(DISCONNECT_NOTIFY, 3))
    called(pptp, 5000, 5000)
    assert len(calls(pptp)) == 2 * MOST_CALLS


def test_few_ids_are_looked_at_however_many_are_taken(pptp: Connection) -> None:
    index = pptp.gateway.sessions.tables.in_index[GRE] = Taken()
    assert pptp.say(pptp.client, message(OUTGOING_REQUEST, 7)) == message(OUTGOING_REQUEST, 0)
    assert 0 < index.looked_at <= NEIGHBOURS + DRAWS


class Taken(dict[bytes, IpMasq]):
    """An index in which all IDs are taken."""

    looked_at = 0

    def __contains__(self, key: object) -> bool:
        self.looked_at += 1
        return True


def test_where_the_ids_nearby_are_taken_another_is_drawn() -> None:
    over = gateway()
    first, second = (control(over, inside) for inside in (INSIDE, NEIGHBOUR))
    taken = {called(first, own, own) for own in range(100, 100 + 2 * NEIGHBOURS)}
    assert called(second, 100, 5000) not in taken


def test_a_segment_that_is_dropped_keeps_no_call_alive(pptp: Connection) -> None:
    called(pptp, 7, 99)
    timers = [ms.timer for ms in calls(pptp)]
    pptp.gateway.passes(10)
    pptp.client.says(bytes(100))
    assert pptp.goes(pptp.client, pptp.client.sent + 50, bytes(50)) is None
    assert [ms.timer for ms in calls(pptp)] == timers


def test_a_host_has_one_call_of_one_id_with_a_server(pptp: Connection) -> None:
    """A second call, of another control connection, is announced with an ID that no call has."""
    ours = called(pptp, 7, 99)
    over = pptp.gateway
    second = Connection(over, (INSIDE, 40001), (SERVER, 1723))
    assert second.say(second.client, message(OUTGOING_REQUEST, 7)) == message(OUTGOING_REQUEST, 0)
    assert over.into(data(SERVER, GATEWAY, ours)) == data(SERVER, INSIDE, 7)


def test_two_calls_with_one_id_of_the_server_do_not_both_go_out() -> None:
    over = gateway()
    for inside in (INSIDE, NEIGHBOUR):
        called(control(over, inside), 7, 99)
    assert over.out(data(INSIDE, SERVER, 99)) is not None
    assert over.out(data(NEIGHBOUR, SERVER, 99)) is None


@pytest.mark.parametrize(
    "text",
    [
        b"POST / HTTP/1.1\r\n\r\n",
        b"\0\x0b\0\1\x1a\x2b\x3c\x4d\0\7\0\0",  # shorter than a message can be
        b"\xff\xff\0\1\x1a\x2b\x3c\x4d\0\7\0\0",
        b"\0\xa8\0\1\x1a\x2b\x3c\x4e\0\7\0\0",
    ],
)
def test_what_speaks_something_else_is_left_alone(text: bytes) -> None:
    over = gateway()
    pptp = Connection(over, (INSIDE, 40000), (SERVER, 1723))
    said = text + message(OUTGOING_REQUEST, 7)
    assert pptp.say(pptp.client, said) == said
    assert pptp.say(pptp.client, message(OUTGOING_REQUEST, 8)) == message(OUTGOING_REQUEST, 8)
    assert not calls(pptp)


@given(st.lists(st.binary(max_size=60), max_size=6), st.integers(1, 80))
def test_whatever_both_ends_say_arrives_whole(texts: list[bytes], size: int) -> None:
    """Messages may have any content: only IDs may change, never a length."""
    pptp = control(gateway())
    for n, text in enumerate(texts):
        framed = message(OUTGOING_REQUEST)[:8] + text
        end = pptp.client if n % 2 else pptp.server
        end.says((len(framed)).to_bytes(2, "big") + framed[2:])
    pptp.finish(size)
    assert len(pptp.server.received) == len(pptp.client.text)
    assert len(pptp.client.received) == len(pptp.server.text)


# -- beside protocols that go by address ----------------------------------------------------


def test_packets_of_no_call_go_by_address() -> None:
    over = gateway(other_protocols="by-address")
    ours = called(control(over), 7, 99)
    tunnel = ip(NEIGHBOUR, SERVER, GRE, b"\0\0\x08\0text")
    assert over.out(tunnel) == ip(GATEWAY, SERVER, GRE, b"\0\0\x08\0text")
    assert over.out(data(NEIGHBOUR, SERVER, 5)) == data(GATEWAY, SERVER, 5)
    assert over.into(data(SERVER, GATEWAY, ours)) == data(SERVER, INSIDE, 7)
    assert over.into(data(SERVER, GATEWAY, 1234)) == data(SERVER, NEIGHBOUR, 1234)
    assert over.out(data(INSIDE, SERVER, 99)) == data(GATEWAY, SERVER, 99)


# -- errors ---------------------------------------------------------------------------------


def test_errors_about_a_calls_packets_find_it_in_both_directions() -> None:
    over = gateway()
    called(control(over, NEIGHBOUR), 7, 98)
    ours = called(control(over), 7, 99)
    out = over.out(data(INSIDE, SERVER, 99))
    assert out is not None
    told = over.into(error(ROUTER, GATEWAY, cut(out)))
    assert told is not None
    assert destination_address(told) == INSIDE
    assert quoted(told) == cut(data(INSIDE, SERVER, 99))
    assert checksums_are_right(told)
    arrived = over.into(data(SERVER, GATEWAY, ours))
    assert arrived is not None
    told = over.out(error(INSIDE, SERVER, cut(arrived)))
    assert told is not None
    assert quoted(told) == cut(data(SERVER, GATEWAY, ours))
    assert checksums_are_right(told)


def test_errors_about_a_packet_by_address_find_its_sender() -> None:
    over = Gateway(other_protocols="by-address")
    out = over.out(data(INSIDE, SERVER, 99))
    assert out is not None
    told = over.into(error(ROUTER, GATEWAY, cut(out)))
    assert told is not None
    assert destination_address(told) == INSIDE
    assert quoted(told) == cut(data(INSIDE, SERVER, 99))
