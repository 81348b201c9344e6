"""Which packets restart an entry's timer, and which do not."""

from __future__ import annotations

import pytest

from nfmasq.engine import ICMP, TCP, UDP
from nfmasq.engine.table.timeouts import PROFILES
from tests.gateway import INSIDE, SERVER, Gateway
from tests.packets import ACK, FIN, RST, SYN, error, source, tcp, udp

pytestmark = pytest.mark.parametrize("fast", [True, False], ids=["fast path", "plain way"])


def connect(gateway: Gateway) -> tuple[str, int]:
    """Open a connection in both directions; returns the endpoint that the outside sees."""
    sent = gateway.out(tcp(INSIDE, SERVER, SYN))
    assert sent is not None
    assert gateway.into(tcp(SERVER, source(sent), SYN | ACK)) is not None
    assert gateway.out(tcp(INSIDE, SERVER, ACK)) is not None
    return source(sent)


def test_a_datagram_from_inside_restarts_the_timer(fast: bool) -> None:
    gateway = Gateway(fast=fast)
    for _ in range(3):
        gateway.send(INSIDE, SERVER)
        gateway.passes(290)
    assert gateway.sessions.entry_count(UDP) == 1


def test_a_datagram_from_outside_restarts_the_timer_by_choice(fast: bool) -> None:
    for refreshes in (True, False):
        gateway = Gateway(fast=fast, inbound_refresh=refreshes)
        mapped = gateway.send(INSIDE, SERVER)
        gateway.passes(200)
        assert gateway.lets_in(SERVER, mapped)
        gateway.passes(200)
        assert gateway.sessions.entry_count(UDP) == refreshes


def test_a_segment_from_outside_restarts_the_timer_by_choice(fast: bool) -> None:
    for refreshes in (True, False):
        gateway = Gateway(fast=fast, inbound_refresh=refreshes)
        mapped = connect(gateway)
        gateway.passes(7000)
        gateway.into(tcp(SERVER, mapped, ACK))
        gateway.passes(7000)
        assert gateway.sessions.entry_count(TCP) == refreshes


def test_an_icmp_error_does_not_restart_the_timer(fast: bool) -> None:
    gateway = Gateway(fast=fast)
    mapped = gateway.send(INSIDE, SERVER)
    gateway.passes(200)
    assert gateway.into(error(SERVER[0], mapped[0], udp(mapped, SERVER))) is not None
    gateway.passes(101)
    assert gateway.sessions.entry_count(UDP) == 0
    assert gateway.sessions.entry_count(ICMP) == 0


def test_a_reset_leaves_the_entry_for_four_minutes(fast: bool) -> None:
    gateway = Gateway(fast=fast)
    mapped = connect(gateway)
    assert gateway.into(tcp(SERVER, mapped, RST)) == tcp(SERVER, INSIDE, RST)
    gateway.passes(239)
    assert gateway.sessions.entry_count(TCP) == 1
    gateway.passes(2)
    assert gateway.sessions.entry_count(TCP) == 0


def test_resets_that_answer_what_comes_in_do_not_keep_a_closed_connection(fast: bool) -> None:
    gateway = Gateway(fast=fast, inbound_refresh=False)
    mapped = connect(gateway)
    gateway.out(tcp(INSIDE, SERVER, RST))
    for _ in range(3):
        gateway.passes(70)
        gateway.into(tcp(SERVER, mapped, ACK))
        gateway.out(tcp(INSIDE, SERVER, RST))
    gateway.passes(31)
    assert gateway.sessions.entry_count(TCP) == 0


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_repeated_reset_does_not_restart_the_timer(fast: bool, way: str) -> None:
    gateway = Gateway(fast=fast)
    mapped = connect(gateway)
    for _ in range(3):
        if way == "in":
            gateway.into(tcp(SERVER, mapped, RST))
        else:
            gateway.out(tcp(INSIDE, SERVER, RST))
        gateway.passes(100)
    assert gateway.sessions.entry_count(TCP) == 0


def test_a_new_syn_on_a_closing_connection_opens_it_anew(fast: bool) -> None:
    gateway = Gateway(fast=fast)
    mapped = connect(gateway)
    gateway.out(tcp(INSIDE, SERVER, RST))
    gateway.passes(100)
    assert connect(gateway) == mapped
    gateway.passes(7000)
    assert [ms.state_name for ms in gateway.sessions.entries()] == ["ESTABLISHED"]


def test_a_segment_that_changes_no_state_changes_no_timeout(fast: bool) -> None:
    """Other timeouts count from an entry's next state on, unless all entries are told of them."""
    gateway = Gateway(fast=fast)
    mapped = connect(gateway)
    gateway.configure(timeouts=PROFILES["linux-2.2"])
    gateway.out(tcp(INSIDE, SERVER, ACK))
    gateway.into(tcp(SERVER, mapped, ACK))
    (ms,) = gateway.sessions.entries()
    assert ms.timeout == 7440
    gateway.out(tcp(INSIDE, SERVER, FIN | ACK))
    assert ms.timeout == 120
