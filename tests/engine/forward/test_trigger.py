"""Port triggering: a session from the inside opens ports to its host for a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import TCP, UDP
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.trigger import Trigger
from tests.gateway import GATEWAY, NEW_ADDRESS, Gateway
from tests.packets import RST, SYN, Endpoint, destination, number, source, tcp, udp

HOST: Endpoint = ("10.0.0.2", 40000)
NEIGHBOUR: Endpoint = ("10.0.0.3", 40000)
GAME: Endpoint = ("198.51.100.7", 6112)
CALLER: Endpoint = ("198.51.100.9", 5000)
SECONDS = 600


def gateway(**settings: object) -> Gateway:
    """Make a gateway where TCP to port 6112, or 7000 to 7009, opens UDP 27000 to 27009."""
    trigger = Trigger(
        (TCP, (range(6112, 6113), range(7000, 7010))), UDP, range(27000, 27010), SECONDS
    )
    made = Gateway(forwards=Forwards(triggers=[trigger]), **settings)
    made.masq.inbound.maddrs = {number(GATEWAY)}
    return made


def called(gateway: Gateway, port: int = 27000, caller: Endpoint = CALLER) -> Endpoint | None:
    """Send a datagram to a triggered port; returns the inside endpoint that it reaches, or None."""
    sent = gateway.into(udp(caller, (GATEWAY, port)))
    return None if sent is None else destination(sent)


def test_triggered_ports_are_closed_until_the_inside_opens_them() -> None:
    closed = gateway()
    assert called(closed) is None
    closed.out(tcp(HOST, (GAME[0], 6113), SYN))
    closed.out(udp(HOST, GAME))
    assert called(closed) is None


@pytest.mark.parametrize("port", [6112, 7000, 7009])
def test_a_packet_to_a_triggering_port_opens_the_ports_to_its_host(port: int) -> None:
    opened = gateway()
    opened.out(tcp(HOST, (GAME[0], port), SYN))
    for triggered in (27000, 27009):
        assert called(opened, triggered) == (HOST[0], triggered)
    answer = opened.out(udp((HOST[0], 27000), CALLER))
    assert answer is not None
    assert source(answer) == (GATEWAY, 27000)
    beside = udp(CALLER, (GATEWAY, 27010))
    assert opened.into(beside) is beside


def test_the_ports_close_when_the_time_is_over_and_no_triggering_session_is_left() -> None:
    opened = gateway()
    opened.out(tcp(HOST, GAME, SYN))
    opened.into(tcp(GAME, (GATEWAY, 61000), RST))
    opened.passes(SECONDS - 1)
    assert opened.masq.sessions.entry_count(TCP) == 0
    assert called(opened) == (HOST[0], 27000)
    opened.passes(2)
    assert called(opened, caller=("198.51.100.10", 1)) is None
    assert called(opened) == (HOST[0], 27000), "what came in before goes on"


def test_a_triggering_session_keeps_the_ports_open_as_long_as_it_lasts() -> None:
    opened = gateway()
    opened.out(tcp(HOST, GAME, SYN))
    opened.into(tcp(GAME, (GATEWAY, 61000), SYN | 0x10))
    opened.out(tcp(HOST, GAME))
    opened.passes(SECONDS * 5)
    assert called(opened) == (HOST[0], 27000)


def test_another_triggering_session_extends_the_time() -> None:
    opened = gateway()
    opened.out(tcp(HOST, GAME, SYN))
    opened.passes(SECONDS - 1)
    opened.out(tcp(HOST, (GAME[0], 7000), SYN))
    opened.passes(SECONDS - 1)
    assert called(opened) == (HOST[0], 27000)


def test_one_host_at_a_time_has_the_ports() -> None:
    opened = gateway()
    opened.out(tcp(HOST, GAME, SYN))
    opened.out(tcp(NEIGHBOUR, GAME, SYN))
    assert called(opened) == (HOST[0], 27000)
    opened.passes(SECONDS + 1)
    opened.out(tcp(NEIGHBOUR, GAME, SYN))
    assert called(opened, caller=("198.51.100.10", 1)) == (NEIGHBOUR[0], 27000)


def test_what_came_in_before_stays_with_its_host_when_another_has_the_ports() -> None:
    opened = gateway()
    opened.out(tcp(HOST, GAME, SYN))
    assert called(opened) == (HOST[0], 27000)
    for _ in range(3):
        opened.passes(250)
        assert called(opened) == (HOST[0], 27000)
    opened.out(tcp(NEIGHBOUR, GAME, SYN))
    assert called(opened) == (HOST[0], 27000)
    assert called(opened, caller=("198.51.100.10", 1)) == (NEIGHBOUR[0], 27000)


def test_what_came_in_on_one_address_stays_when_another_host_has_the_ports_on_another() -> None:
    opened = gateway()
    opened.masq.inbound.maddrs = {number(GATEWAY), number(NEW_ADDRESS)}
    opened.out(tcp(HOST, GAME, SYN))
    assert called(opened) == (HOST[0], 27000)
    for _ in range(3):
        opened.passes(250)
        assert called(opened) == (HOST[0], 27000)
    opened.address = NEW_ADDRESS
    opened.out(tcp(NEIGHBOUR, GAME, SYN))
    assert called(opened) == (HOST[0], 27000)


@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["host", "neighbour", "call"]),
            st.floats(0, 400),
            st.integers(1024, 1030),
        ),
        max_size=30,
    )
)
def test_a_caller_reaches_whoever_opened_the_ports_first_and_nobody_after_their_time(
    events: list[tuple[str, float, int]],
) -> None:
    """Compared with a model, in which a session lasts as long as its entry is in the table."""
    opened = gateway()
    holder: str | None = None
    until = 0.0
    for at, (event, seconds, port) in enumerate(events):
        opened.passes(seconds)
        lasting = {ms.saddr for ms in opened.masq.sessions.entries() if ms.protocol == TCP}
        if holder is not None and opened.now >= until and number(holder) not in lasting:
            holder = None
        if event == "call":
            reached = called(opened, caller=("198.51.100.9", 10_000 + at))
            assert reached == (None if holder is None else (holder, 27000))
            continue
        saddr = HOST[0] if event == "host" else NEIGHBOUR[0]
        before = opened.masq.sessions.counters.created["tcp"]
        opened.out(tcp((saddr, port), GAME, SYN))
        is_new = opened.masq.sessions.counters.created["tcp"] > before
        if is_new and holder in (None, saddr):
            holder, until = saddr, opened.now + SECONDS
