"""TFTP: the server answers from a port that it was not asked at, and the answer arrives."""

from __future__ import annotations

import pytest

from nfmasq.apps import helpers
from nfmasq.engine import BEHAVIOURS
from tests.gateway import Gateway
from tests.packets import Endpoint, udp

CLIENT: Endpoint = ("10.0.0.2", 40000)
SERVER: Endpoint = ("198.51.100.7", 69)
ANSWERING: Endpoint = ("198.51.100.7", 51234)
STRANGER: Endpoint = ("198.51.100.8", 51234)

READ, WRITE, DATA = b"\0\1file\0octet\0", b"\0\2file\0octet\0", b"\0\3\0\1content"
STRICT = "address-and-port-dependent"


def gateway(apps: dict[str, tuple[int, ...]], mapping: str = "endpoint-independent") -> Gateway:
    return Gateway(apps=helpers(apps), filtering=STRICT, mapping=mapping)


@pytest.mark.parametrize("mapping", BEHAVIOURS)
@pytest.mark.parametrize("request_", [READ, WRITE])
def test_the_answer_arrives_and_the_transfer_goes_on(mapping: str, request_: bytes) -> None:
    over = gateway({"tftp": (69,)}, mapping)
    mapped = over.send(CLIENT, SERVER, request_)
    assert over.into(udp(ANSWERING, mapped, DATA)) == udp(ANSWERING, CLIENT, DATA)
    assert over.send(CLIENT, ANSWERING, b"\0\4\0\1") == mapped
    assert over.into(udp(ANSWERING, mapped, DATA)) == udp(ANSWERING, CLIENT, DATA)


def test_one_answer_is_let_in_and_from_nobody_else() -> None:
    over = gateway({"tftp": (69,)})
    mapped = over.send(CLIENT, SERVER, READ)
    assert not over.lets_in(STRANGER, mapped)
    assert over.lets_in(ANSWERING, mapped)
    assert not over.lets_in((ANSWERING[0], 51235), mapped)


def test_only_a_request_is_answered_from_elsewhere() -> None:
    over = gateway({"tftp": (69,)})
    mapped = over.send(CLIENT, SERVER, DATA)
    assert not over.lets_in(ANSWERING, mapped)


def test_requests_that_are_sent_again_expect_one_answer() -> None:
    over = gateway({"tftp": (69,)})
    for _ in range(20):
        over.send(CLIENT, SERVER, READ)
    assert len(over.masq.sessions.entries()) == 2


def test_without_the_helper_the_answer_is_nobodys() -> None:
    over = gateway({})
    assert not over.lets_in(ANSWERING, over.send(CLIENT, SERVER, READ))
