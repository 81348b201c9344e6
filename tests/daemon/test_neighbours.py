"""The kernel's table of neighbours, from which the daemon learns which hosts are there."""

from __future__ import annotations

import os
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.daemon.neighbours import reachable_in
from nfmasq.lab import Lab
from tests.packets import number

NEW_NEIGHBOUR, DONE = 28, 3
IPV4, IPV6 = 2, 10
INCOMPLETE, REACHABLE, STALE, PERMANENT = 1, 2, 4, 0x80
DESTINATION, LINK_ADDRESS = 1, 2


def attribute(kind: int, value: bytes) -> bytes:
    padded = value + bytes(-len(value) % 4)
    return pack("=HH", 4 + len(value), kind) + padded


def message(kind: int, body: bytes) -> bytes:
    return pack("=IHHII", 16 + len(body), kind, 2, 0, 0) + body


def neighbour(address: str, state: int, family: int = IPV4) -> bytes:
    destination = number(address).to_bytes(4, "big") + bytes(12 * (family == IPV6))
    body = pack("=BxxxiHBB", family, 3, state, 0, 1) + attribute(LINK_ADDRESS, b"\2\0\0\0\0\1")
    return message(NEW_NEIGHBOUR, body + attribute(DESTINATION, destination))


def test_those_that_have_answered_lately_are_there() -> None:
    messages = b"".join(
        [
            neighbour("10.0.0.2", REACHABLE),
            neighbour("10.0.0.3", STALE),
            neighbour("10.0.0.4", INCOMPLETE),
            neighbour("10.0.0.5", PERMANENT),
            neighbour("10.0.0.6", REACHABLE, IPV6),
            neighbour("10.0.0.7", REACHABLE),
        ]
    )
    assert reachable_in(messages) == ([number("10.0.0.2"), number("10.0.0.7")], True)
    assert reachable_in(messages + message(DONE, bytes(4)))[1] is False


@given(st.binary(max_size=200))
def test_nothing_that_the_kernel_may_write_is_too_much(messages: bytes) -> None:
    reachable_in(messages)
    reachable_in(neighbour("10.0.0.2", REACHABLE)[:24] + messages)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
def test_the_hosts_of_a_lab_are_found() -> None:
    from nfmasq.daemon.neighbours import Neighbours
    from tests.gateway import Gateway

    with Lab(inside=2, outside=1) as lab:
        gateway = Gateway()
        neighbours = lab.gateway.call(Neighbours, gateway.masq)
        lab.gateway.ip("neighbour flush dev lan")
        lab.gateway.run(["ping", "-q", "-c", "1", lab.inside[0].address])
        neighbours.look()
        neighbours.stop()
        hosts = gateway.sessions.hosts
        assert hosts.is_genuine(number(lab.inside[0].address))
        assert not hosts.is_genuine(number("10.77.0.99"))
