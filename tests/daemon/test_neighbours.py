"""The kernel's table of neighbours, from which the daemon learns which hosts are there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.daemon.neighbours import Neighbours, neighbours_in
from nfmasq.lab import Lab
from tests.gateway import Gateway
from tests.packets import dotted, number, udp
from tests.traffic.observed import eventually

NEW_NEIGHBOUR, DONE = 28, 3
IPV4, IPV6 = 2, 10
INCOMPLETE, REACHABLE, STALE, DELAY, PERMANENT = 1, 2, 4, 8, 0x80
DESTINATION, LINK_ADDRESS = 1, 2
NOBODY = "10.77.0.99"

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 and os.environ.get("CI") != "true", reason="takes root"
)


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
            neighbour("10.0.0.8", DELAY),
        ]
    )
    found, more = neighbours_in(messages)
    assert more
    assert [dotted(each.address) for each in found if each.is_reachable] == ["10.0.0.2", "10.0.0.7"]
    assert [dotted(each.address) for each in found if each.may_be_asked] == ["10.0.0.3", "10.0.0.8"]
    assert neighbours_in(messages + message(DONE, bytes(4))) == (found, False)


@given(st.binary(max_size=200))
def test_nothing_that_the_kernel_may_write_is_too_much(messages: bytes) -> None:
    neighbours_in(messages)
    neighbours_in(neighbour("10.0.0.2", REACHABLE)[:24] + messages)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(inside=2, outside=1) as lab:
        lab.gateway.ip("neighbour flush dev lan")
        yield lab


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def neighbours(lab: Lab, gateway: Gateway) -> Iterator[Neighbours]:
    neighbours = lab.gateway.call(Neighbours, gateway.masq)
    yield neighbours
    neighbours.stop()


@needs_root
def test_the_hosts_of_a_lab_are_found(lab: Lab, gateway: Gateway, neighbours: Neighbours) -> None:
    lab.gateway.run(["ping", "-q", "-c", "1", lab.inside[0].address])
    assert not neighbours.look()
    hosts = gateway.sessions.hosts
    assert hosts.is_genuine(number(lab.inside[0].address))
    assert not hosts.is_genuine(number(NOBODY))


@needs_root
def test_a_host_that_is_stale_and_has_sessions_is_asked(
    lab: Lab, gateway: Gateway, neighbours: Neighbours
) -> None:
    """Who sends ARP first makes an entry that is stale, and so does who forges it."""
    there, quiet = (host.address for host in lab.inside)
    for address in (there, quiet):
        lab.gateway.run(["ping", "-q", "-c", "1", address])
    for address in (there, quiet, NOBODY):
        become_stale(lab, address)
    for address in (there, NOBODY):
        gateway.out(udp((address, 4000), ("203.0.113.9", 53)))
    assert neighbours.look()
    hosts = gateway.sessions.hosts
    assert eventually(lambda: neighbours.look() or hosts.is_genuine(number(there)))
    assert not hosts.is_genuine(number(NOBODY))
    assert "STALE" in lab.gateway.ip(f"neighbour show {quiet}")


@needs_root
def test_after_a_failure_an_answer_is_to_the_question_before_it(
    lab: Lab, neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of an answer that was not read to its end must not be taken for the next."""
    known = [f"10.77.0.{n}" for n in range(100, 200)] + [f"10.78.0.{n}" for n in range(1, 250)]
    line = "neighbour replace {} dev lan lladdr 02:00:00:00:00:99 nud stale\n"
    lab.gateway.run(["ip", "-batch", "-"], input="".join(map(line.format, known)))

    def fail(addresses: object) -> None:
        raise MemoryError

    monkeypatch.setattr(neighbours, "_tell", fail)
    with pytest.raises(MemoryError):
        neighbours.look()
    lab.gateway.call(neighbours._begin_anew)
    read = [dotted(each.address) for some in neighbours._read() for each in some]
    assert set(known) <= set(read)
    assert len(read) == len(set(read))


def become_stale(lab: Lab, address: str) -> None:
    """Have the kernel of the gateway not have heard of a neighbour, known or new, for a while."""
    known = lab.gateway.ip(f"neighbour show {address}").split()
    hardware = known[known.index("lladdr") + 1] if known else "02:00:00:00:00:99"
    lab.gateway.ip(f"neighbour replace {address} dev lan lladdr {hardware} nud stale")
