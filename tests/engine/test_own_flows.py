"""The gateway's own flows from ports that the masquerade uses: answers reach whom they are for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.wire.checksum import without_checksum
from nfmasq.engine.wire.protocols import UDP
from tests.gateway import GATEWAY, INSIDE, NEIGHBOUR, OTHER_SERVER, SERVER, Gateway
from tests.packets import (
    ACK,
    FIN,
    RST,
    SYN,
    Endpoint,
    checksums_are_right,
    destination,
    error,
    number,
    query,
    reply,
    source,
    tcp,
    udp,
)

RESOLVER: Endpoint = ("198.51.100.53", 53)
FIRST = 61000


def gateway_with(**settings: object) -> Gateway:
    gateway = Gateway(**settings)
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    return gateway


def own(gateway: Gateway, packet: bytes, *, unsummed: bool = False) -> bytes | None:
    """Have the gateway itself send a packet."""
    return gateway.masq.ip_fw_own(packet, gateway.now, unsummed)


def test_a_question_of_the_gateway_keeps_its_port_and_gets_its_answer() -> None:
    gateway = gateway_with()
    question = udp((GATEWAY, FIRST), RESOLVER)
    assert own(gateway, question) is question
    assert gateway.send(INSIDE, RESOLVER) != (GATEWAY, FIRST)
    answer = gateway.into(udp(RESOLVER, (GATEWAY, FIRST)))
    assert answer == udp(RESOLVER, (GATEWAY, FIRST))


def test_where_an_inside_host_was_first_the_gateway_s_question_leaves_by_another_port() -> None:
    gateway = gateway_with()
    mapped = gateway.send(INSIDE, RESOLVER)
    sent = own(gateway, udp(mapped, RESOLVER, b"whose?"))
    assert sent is not None
    assert checksums_are_right(sent)
    assert source(sent) != mapped
    for at, owner in ((source(sent), mapped), (mapped, INSIDE)):
        assert gateway.into(udp(RESOLVER, at, b"yours")) == udp(RESOLVER, owner, b"yours")


def test_toward_another_server_the_gateway_keeps_the_port_of_an_inside_host() -> None:
    gateway = gateway_with()
    mapped = gateway.send(INSIDE, RESOLVER)
    question = udp(mapped, SERVER)
    assert own(gateway, question) is question
    assert gateway.into(udp(SERVER, mapped)) == udp(SERVER, mapped)
    assert gateway.into(udp(RESOLVER, mapped)) == udp(RESOLVER, INSIDE)


def test_a_ping_of_the_gateway_and_one_of_an_inside_host_with_its_identifier() -> None:
    gateway = gateway_with()
    sent = gateway.out(query(INSIDE, SERVER[0]))
    assert sent is not None
    identifier = int.from_bytes(sent[24:26], "big")
    mine = own(gateway, query((GATEWAY, identifier), SERVER[0]))
    assert mine is not None
    other = int.from_bytes(mine[24:26], "big")
    assert other != identifier
    answer = gateway.into(reply(SERVER[0], (GATEWAY, other)))
    assert answer == reply(SERVER[0], (GATEWAY, identifier))
    assert gateway.into(reply(SERVER[0], (GATEWAY, identifier))) == reply(SERVER[0], INSIDE)


def test_a_connection_of_the_gateway_is_followed_and_ends() -> None:
    gateway = gateway_with(ports=range(FIRST, FIRST + 1))
    mine = (GATEWAY, FIRST)
    for packet in (tcp(mine, SERVER, SYN), tcp(mine, SERVER, ACK), tcp(mine, SERVER, FIN | ACK)):
        assert own(gateway, packet) is packet
        answer = tcp(SERVER, mine, packet[33] | ACK)
        assert gateway.into(answer) == answer
    (ms,) = gateway.sessions.entries()
    assert ms.state_name == "TIME_WAIT"
    gateway.passes(1)
    assert gateway.connects(INSIDE, SERVER)


def test_a_connection_that_the_gateway_resets_is_kept_no_longer_than_a_reset_one() -> None:
    gateway = gateway_with()
    for port in (FIRST, FIRST + 1):
        for flags in (SYN, ACK):
            own(gateway, tcp((GATEWAY, port), SERVER, flags))
            gateway.into(tcp(SERVER, (GATEWAY, port), flags | ACK))
    own(gateway, tcp((GATEWAY, FIRST), SERVER, RST | ACK))
    gateway.passes(241)
    assert [ms.mport for ms in gateway.sessions.entries()] == [FIRST + 1]


def test_the_error_about_a_question_that_left_by_another_port_finds_the_gateway() -> None:
    gateway = gateway_with()
    mapped = gateway.send(INSIDE, RESOLVER)
    sent = own(gateway, udp(mapped, RESOLVER))
    assert sent is not None
    told = gateway.into(error(RESOLVER[0], GATEWAY, sent))
    assert told is not None
    assert told[12:20] == error(RESOLVER[0], GATEWAY, udp(mapped, RESOLVER))[12:20]
    assert source(told[28:]) == mapped


def test_a_checksum_left_to_the_card_is_filled_in_only_where_the_port_changes() -> None:
    gateway = gateway_with()
    kept = without_checksum(udp((GATEWAY, FIRST + 1), SERVER))
    assert own(gateway, kept, unsummed=True) is kept
    mapped = gateway.send(INSIDE, RESOLVER)
    sent = own(gateway, without_checksum(udp(mapped, RESOLVER)), unsummed=True)
    assert sent is not None
    assert checksums_are_right(sent)


def test_other_packets_of_the_gateway_are_left_alone() -> None:
    gateway = gateway_with()
    for packet in (
        udp((GATEWAY, 40_000), RESOLVER),
        udp(("203.0.113.9", FIRST), RESOLVER),
        reply(GATEWAY, (SERVER[0], FIRST)),
        tcp((GATEWAY, FIRST), SERVER, RST),
        tcp((GATEWAY, FIRST), SERVER, SYN | ACK),
    ):
        assert own(gateway, packet) is packet
    assert gateway.sessions.entries() == []


def test_without_a_free_port_the_packet_is_lost_rather_than_its_answer_misled() -> None:
    gateway = gateway_with(ports=range(FIRST, FIRST + 1))
    assert gateway.connects(INSIDE, SERVER)
    assert own(gateway, tcp((GATEWAY, FIRST), SERVER, SYN)) is None
    other = tcp((GATEWAY, FIRST), OTHER_SERVER, SYN)
    assert own(gateway, other) is other


def test_a_program_on_the_gateway_sends_from_a_forwarded_port_and_gets_the_answer() -> None:
    forward = Forward(UDP, range(123, 124), [Server(number(INSIDE[0]), 123)])
    gateway = gateway_with(forwards=Forwards([forward]))
    question = udp((GATEWAY, 123), (SERVER[0], 123))
    assert own(gateway, question) is question
    assert gateway.into(udp((SERVER[0], 123), (GATEWAY, 123))) == udp(
        (SERVER[0], 123), (GATEWAY, 123)
    )
    led_inside = gateway.into(udp(OTHER_SERVER, (GATEWAY, 123)))
    assert led_inside is not None
    assert destination(led_inside) == (INSIDE[0], 123)


def test_an_inside_host_reaches_the_gateway_itself_where_the_gateway_holds_the_port() -> None:
    gateway = gateway_with()
    own(gateway, udp((GATEWAY, FIRST), RESOLVER))
    packet = udp(INSIDE, (GATEWAY, FIRST))
    assert gateway.masq.ip_fw_hairpin(packet, number(GATEWAY), gateway.now) is packet


SENDERS = st.sampled_from([INSIDE, NEIGHBOUR, *((GATEWAY, FIRST + at) for at in range(3))])


@given(steps=st.lists(st.tuples(SENDERS, st.sampled_from([RESOLVER, SERVER, OTHER_SERVER]))))
def test_every_answer_comes_to_whoever_asked(steps: list[tuple[Endpoint, Endpoint]]) -> None:
    gateway = gateway_with(ports=range(FIRST, FIRST + 3))
    for sender, server in steps:
        packet = udp(sender, server)
        sent = own(gateway, packet) if sender[0] == GATEWAY else gateway.out(packet)
        if sent is not None:
            assert gateway.into(udp(server, source(sent))) == udp(server, sender)
