"""The fuzzer's laws see what they are there to see."""

from __future__ import annotations

import pytest

from nfmasq.engine import UDP
from tests.engine.two_ways import Step, Way
from tests.fuzz import laws
from tests.packets import error, number, udp, with_checksum

INSIDE, OUTSIDE, MADDR = ("10.0.0.2", 7), ("198.51.100.7", 80), ("203.0.113.1", 61000)
PACKET = udp(INSIDE, OUTSIDE, b"question")
LEAVES = udp(MADDR, OUTSIDE, b"question")


def goes_out(packet: bytes) -> Step:
    return Step(0, "out", (packet, number(MADDR[0]), False))


def test_a_packet_that_is_rewritten_is_sound() -> None:
    laws.of_a_packet(goes_out(PACKET), LEAVES)
    laws.of_a_packet(goes_out(PACKET), None)


@pytest.mark.parametrize(
    "sent",
    [
        PACKET,
        bytes(bytearray(PACKET)),
        with_checksum(LEAVES, 1),
        LEAVES + b"\0",
        error(MADDR[0], OUTSIDE[0], udp(OUTSIDE, INSIDE)),
    ],
    ids=["as it is", "an inside source", "a wrong checksum", "a wrong length", "an inside address"],
)
def test_a_packet_that_is_not_sound_is_seen(sent: bytes) -> None:
    with pytest.raises(AssertionError):
        laws.of_a_packet(goes_out(PACKET), sent)


def test_nothing_is_left_of_entries_that_expire() -> None:
    way = Way(fast=True)
    assert way.out(*goes_out(PACKET).args)
    laws.at_the_end(way)


def test_a_port_that_is_not_given_back_is_seen() -> None:
    way = Way(fast=True)
    assert way.out(*goes_out(PACKET).args)
    way.masq.sessions.choice.ports.take(UDP, number(MADDR[0]), 61005)
    with pytest.raises(AssertionError, match="given back"):
        laws.at_the_end(way)


def test_an_entry_that_does_not_end_is_seen() -> None:
    way = Way(fast=True)
    assert way.out(*goes_out(PACKET).args)
    (ms,) = way.entries()
    ms.refcnt += 1
    with pytest.raises(AssertionError):
        laws.at_the_end(way)
