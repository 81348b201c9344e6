"""What the outside must not be able to do, and what a mapping keeps whatever it does."""

from __future__ import annotations

from nfmasq.engine import UDP, Flags, Masquerade
from tests.gateway import ended, masquerade_with
from tests.packets import Endpoint, error, number, source, udp

INSIDE = ("10.0.0.5", 4000)
SERVER = ("203.0.113.9", 53)
GATEWAY, OTHER_GATEWAY = "198.51.100.2", "192.0.2.2"


def ask(masquerade: Masquerade, server: Endpoint, maddr: str = GATEWAY) -> Endpoint:
    """Send a datagram from the inside; returns the endpoint that the server sees."""
    sent = masquerade.ip_fw_masquerade(udp(INSIDE, server), number(maddr), 1.0)
    assert sent is not None
    return source(sent)


def test_the_outside_cannot_take_the_room_that_the_inside_needs() -> None:
    masquerade = masquerade_with(filtering="endpoint-independent", max_entries=4)
    mapped = ask(masquerade, SERVER)
    strangers = [udp((f"203.0.113.{n}", 9), mapped) for n in (20, 21, 22)]
    for packet in (*strangers[:2], *strangers[:2]):  # who goes on after an answer makes no room
        assert masquerade.ip_fw_demasquerade(packet, 1.0) is not packet
        assert ask(masquerade, source(packet)) == mapped
    assert masquerade.ip_fw_demasquerade(strangers[2], 1.0) is strangers[2]
    assert ask(masquerade, (SERVER[0], 54)) == mapped
    assert masquerade.sessions.entry_count(UDP) == 4
    assert ended(masquerade) == {}


def test_a_packet_for_an_inside_port_that_is_not_known_yet_is_left_alone() -> None:
    masquerade = Masquerade()
    flags = Flags.NO_SPORT | Flags.NO_DADDR | Flags.NO_DPORT
    masquerade.sessions.ip_masq_new(UDP, number(GATEWAY), 61000, number(INSIDE[0]), 0, 0, 0, flags)
    packet = udp(SERVER, (GATEWAY, 61000))
    assert masquerade.ip_fw_demasquerade(packet, 1.0) is packet
    (ms,) = masquerade.sessions.entries()
    assert ms.sport == ms.daddr == 0


def test_an_error_goes_to_the_sender_of_what_it_quotes_and_to_nobody_else() -> None:
    masquerade = Masquerade()
    mapped = ask(masquerade, SERVER)
    quote = udp(mapped, SERVER)
    genuine = error(SERVER[0], GATEWAY, quote)
    forged = error(SERVER[0], OTHER_GATEWAY, quote)
    assert masquerade.ip_fw_demasquerade(genuine, 1.0) is not genuine
    assert masquerade.ip_fw_demasquerade(forged, 1.0) is forged


def test_an_inside_endpoint_keeps_one_mapping_on_each_masquerade_address() -> None:
    masquerade = Masquerade()
    here = ask(masquerade, SERVER)
    there = ask(masquerade, ("192.0.2.53", 53), OTHER_GATEWAY)
    assert ask(masquerade, ("203.0.113.10", 53)) == here
    assert ask(masquerade, ("192.0.2.54", 53), OTHER_GATEWAY) == there
