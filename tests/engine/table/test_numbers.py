"""Which segments change a connection's entry: those whose numbers their receiver accepts.

Whatever does not fit is passed on, and changes neither state nor timer.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nfmasq.engine import TCP, IpMasq
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.entry import NO_REPLY
from nfmasq.engine.table.states import CLOSE, CLOSE_WAIT, ESTABLISHED, FIN_WAIT, STATES
from tests.engine.carrier import Dictionary
from tests.gateway import GATEWAY, INSIDE, SERVER, Gateway
from tests.packets import ACK, FIN, PSH, RST, SYN, number, source, tcp

CIRCLE = 2**32
SYN_SENT = STATES.index("SYN_SENT")
SCALE = 7
SCALED = bytes((1, 3, 3, SCALE))
WINDOW = 65535 << SCALE
"""Bytes that each end of `Talk` takes; dpkt's segments have a window of 65,535."""

numbers = st.integers(0, CIRCLE - 1) | st.integers(CIRCLE - 300, CIRCLE - 1)
events = st.sampled_from((RST, RST | ACK, FIN | ACK, FIN, 0, PSH, SYN, SYN | ACK))


class Talk:
    """A connection that both ends have opened, with the numbers that each sends next."""

    def __init__(
        self, first: tuple[int, int] = (1000, 2000), *, cached: bool = False, **settings: Any
    ) -> None:
        self.gateway = Gateway(**settings)
        self.cache = Dictionary() if cached else None
        self.gateway.masq.use_cache(self.cache)
        self.inside, self.outside = ((seq + 1) % CIRCLE for seq in first)
        sent = self.gateway.out(tcp(INSIDE, SERVER, SYN, seq=first[0], tcp_options=SCALED))
        assert sent is not None
        self.mapped = source(sent)
        self.sends(False, SYN | ACK, first[1], self.inside, options=SCALED)
        self.goes_on()

    @property
    def entry(self) -> IpMasq:
        (ms,) = self.gateway.sessions.entries()
        return ms

    def sends(
        self,
        outbound: bool,
        flags: int,
        seq: int,
        ack: int,
        text: bytes = b"",
        options: bytes = b"",
    ) -> None:
        """Send a segment in the name of an end; it is passed on, whatever its numbers are."""
        ends = (INSIDE, SERVER) if outbound else (SERVER, self.mapped)
        packet = tcp(*ends, flags, text, seq=seq % CIRCLE, ack=ack % CIRCLE, tcp_options=options)
        now = self.gateway.now
        passed = self.cache.carry(packet, outbound, 7, now) if self.cache else None
        passed = passed or (self.gateway.out if outbound else self.gateway.into)(packet)
        assert passed is not None
        assert passed is not packet
        self.gateway.sessions.cached.lasts(7 if outbound else 0)
        self.gateway.masq.enter_lasting()

    def goes_on(self, times: int = 1, length: int = 0) -> None:
        """Have each end send bytes and acknowledge what has come."""
        for _ in range(times):
            self.sends(True, ACK, self.inside, self.outside, bytes(length))
            self.inside = (self.inside + length) % CIRCLE
            self.sends(False, ACK, self.outside, self.inside, bytes(length))
            self.outside = (self.outside + length) % CIRCLE
        self.sends(True, ACK, self.inside, self.outside)

    def next(self, outbound: bool) -> tuple[int, int]:
        """Return the numbers of the next segment of an end."""
        return (self.inside, self.outside) if outbound else (self.outside, self.inside)

    def seen(self) -> tuple[object, ...]:
        _, timer = self.gateway.sessions.account_of(self.entry)
        return self.entry.state, self.entry.timeout, timer, self.entry.flags

    def unbelieved(self) -> int:
        return sum(self.gateway.sessions.counters.unbelieved.values())


fast_and_plain = pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
both_ways = pytest.mark.parametrize("outbound", [True, False], ids=["out", "in"])


@fast_and_plain
@both_ways
@given(st.tuples(numbers, numbers), numbers, numbers, events, st.integers(0, 20))
def test_what_the_receiver_does_not_accept_changes_nothing(
    fast: bool,
    outbound: bool,
    first: tuple[int, int],
    seq: int,
    ack: int,
    flags: int,
    length: int,
) -> None:
    talk = Talk(first, fast=fast)
    talk.goes_on(3, length=100)
    expected, _ = talk.next(outbound)
    assume((seq + length - expected) % CIRCLE > WINDOW or flags & (SYN | RST) == SYN)
    assume((seq - expected) % CIRCLE > WINDOW or not flags & RST)
    talk.gateway.passes(10)
    before = talk.seen()
    talk.sends(outbound, flags, seq, ack, bytes(length))
    assert talk.seen() == before
    assert talk.unbelieved() == 1
    talk.goes_on()
    assert talk.entry.state == ESTABLISHED


@fast_and_plain
@both_ways
@given(st.tuples(numbers, numbers), st.integers(0, WINDOW) | st.sampled_from((0, WINDOW)))
def test_a_reset_in_the_window_is_believed(
    fast: bool, outbound: bool, first: tuple[int, int], ahead: int
) -> None:
    talk = Talk(first, fast=fast)
    seq, ack = talk.next(outbound)
    talk.sends(outbound, RST, seq + ahead, ack)
    assert talk.entry.state == CLOSE
    assert talk.unbelieved() == 0


@both_ways
@given(st.tuples(numbers, numbers), st.integers(0, 1000), st.integers(0, 1000))
def test_a_fin_is_believed_by_where_its_segment_ends(
    outbound: bool, first: tuple[int, int], length: int, again: int
) -> None:
    """A segment that is sent again may begin before what its receiver expects."""
    talk = Talk(first)
    talk.goes_on(length=1000)
    seq, ack = talk.next(outbound)
    again = min(again, length)
    talk.sends(outbound, FIN | ACK, seq - again, ack, bytes(length))
    assert talk.entry.state == (FIN_WAIT if outbound else CLOSE_WAIT)


@both_ways
@given(st.tuples(numbers, numbers), numbers, events)
def test_what_a_flow_cache_carries_counts(
    outbound: bool, first: tuple[int, int], seq: int, flags: int
) -> None:
    """The entry knows numbers that are old; the cache has those of now."""
    talk = Talk(first, cached=True, flow_cache_after=2)
    talk.goes_on(2)
    assert talk.cache is not None
    assert len(talk.cache.flows) == 2
    old = talk.next(outbound)
    talk.goes_on(10, length=1460)
    expected, ack = talk.next(outbound)
    before = talk.seen()
    for forged in (old[0], seq):
        if (forged - expected) % CIRCLE > WINDOW:
            talk.sends(outbound, flags, forged, ack)
            assert talk.seen() == before
    talk.sends(outbound, RST, expected, ack)
    assert talk.entry.state == CLOSE
    assert not talk.cache.flows


@both_ways
def test_what_passes_a_flow_cache_by_is_newer_than_what_it_has_seen(outbound: bool) -> None:
    """A segment with IP options comes here, while the cache carries the flow's other segments."""
    talk = Talk(cached=True, flow_cache_after=2)
    talk.goes_on(4)
    assert talk.cache is not None
    assert len(talk.cache.flows) == 2
    (seq, ack), far = talk.next(not outbound), 2 * WINDOW
    ends = (SERVER, talk.mapped) if outbound else (INSIDE, SERVER)
    packet = tcp(*ends, ACK, seq=seq, ack=(ack + far) % CIRCLE, options=bytes([1, 1, 1, 0]))
    assert (talk.gateway.into if outbound else talk.gateway.out)(packet) is not None
    before = talk.seen()
    talk.sends(outbound, RST, ack, seq)
    assert talk.seen() == before
    talk.sends(outbound, RST, ack + far, seq)
    assert talk.entry.state == CLOSE


def test_a_window_is_scaled_only_where_both_ends_say_so() -> None:
    for answer, window in ((SCALED, WINDOW), (b"", 65535)):
        for ahead, state in ((window + 1, ESTABLISHED), (window, CLOSE)):
            gateway = Gateway()
            sent = gateway.out(tcp(INSIDE, SERVER, SYN, tcp_options=SCALED))
            assert sent is not None
            gateway.into(tcp(SERVER, source(sent), SYN | ACK, tcp_options=answer))
            gateway.out(tcp(INSIDE, SERVER, ACK))
            gateway.into(tcp(SERVER, source(sent), RST, seq=1001 + ahead))
            (ms,) = gateway.sessions.entries()
            assert ms.state == state


@fast_and_plain
@given(numbers, numbers, numbers)
def test_a_reset_refuses_a_syn_by_acknowledging_it(
    fast: bool, first: int, seq: int, ack: int
) -> None:
    gateway = Gateway(fast=fast)
    sent = gateway.out(tcp(INSIDE, SERVER, SYN, seq=first))
    assert sent is not None
    (ms,) = gateway.sessions.entries()
    if not 0 < (ack - first) % CIRCLE <= 65536:
        for flags in (RST, RST | ACK, SYN | ACK):
            gateway.into(tcp(SERVER, source(sent), flags, seq=seq, ack=ack))
            assert ms.state == SYN_SENT
        assert ms.flags & NO_REPLY
    gateway.into(tcp(SERVER, source(sent), RST | ACK, seq=0, ack=(first + 1) % CIRCLE))
    assert ms.state == CLOSE


@both_ways
def test_where_the_beginning_was_not_seen_the_first_reset_is_believed(outbound: bool) -> None:
    gateway = Gateway()
    sent = gateway.out(tcp(INSIDE, SERVER, ACK if not outbound else RST, seq=5, ack=6))
    assert sent is not None
    if not outbound:
        gateway.into(tcp(SERVER, source(sent), RST, seq=6))
    (ms,) = gateway.sessions.entries()
    assert ms.state == CLOSE


@pytest.mark.parametrize("half_closed", [False, True])
@given(numbers, numbers)
def test_a_syn_that_the_other_end_accepts_begins_the_connection_anew(
    half_closed: bool, first: int, answer: int
) -> None:
    """Both hosts have started anew, or the reset that ended the old connection was lost."""
    talk = Talk()
    if half_closed:
        talk.sends(True, FIN | ACK, *talk.next(True))
    before = talk.seen()
    talk.sends(True, SYN, first, 0)
    assert talk.seen() == before
    for wrong in (first, first + 2):
        talk.sends(False, SYN | ACK, answer, wrong)
        assert talk.seen() == before
    talk.sends(False, SYN | ACK, answer, first + 1)
    assert talk.entry.state == ESTABLISHED
    talk.inside, talk.outside = (first + 1) % CIRCLE, (answer + 1) % CIRCLE
    talk.goes_on()
    talk.sends(False, RST, talk.outside, 0)
    assert talk.entry.state == CLOSE


def test_who_offers_a_syn_cannot_accept_it() -> None:
    talk = Talk()
    before = talk.seen()
    talk.sends(False, SYN, 7000, 0)
    for flags in (SYN | ACK, RST | ACK):
        talk.sends(False, flags, 0, 7001)
        assert talk.seen() == before


def test_a_host_that_has_started_anew_uses_its_port_again() -> None:
    talk = Talk()
    talk.sends(True, SYN, 90_000, 0)
    assert talk.entry.state == ESTABLISHED
    talk.sends(False, ACK, talk.outside, talk.inside)  # a challenge
    talk.sends(True, RST, talk.inside, 0)
    assert talk.entry.state == CLOSE
    talk.sends(True, SYN, 90_000, 0)
    talk.sends(False, SYN | ACK, 80_000, 90_001)
    talk.sends(True, ACK, 90_001, 80_001)
    assert talk.entry.state == ESTABLISHED


# -- confirmed ---------------------------------------------------------------------------


def test_forged_pairs_take_no_room_from_a_real_client() -> None:
    """A SYN, and an ACK of what its sender has not seen; the server answers every SYN."""
    server = (INSIDE[0], 80)
    forward = Forward(TCP, range(8080, 8081), [Server(number(server[0]), server[1])])
    gateway = Gateway(max_entries=20_000, forwards=Forwards([forward]))
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    here = (GATEWAY, 8080)

    def opens(client: tuple[str, int], ack: int) -> bool:
        arrived = gateway.into(tcp(client, here, SYN, seq=5))
        if arrived is None:
            return False
        gateway.out(tcp(server, client, SYN | ACK, seq=70_000, ack=6))
        gateway.into(tcp(client, here, ACK, seq=6, ack=ack))
        return True

    for n in range(12_000):
        opens((f"198.51.{n >> 8}.{n & 0xFF}", 1024), ack=(n * 7919) % 60_000)
    real = [("192.0.2.1", 2000 + n) for n in range(20)]
    assert all(opens(client, 70_001) for client in real)
    for n in range(12_000):
        assert opens((f"198.18.{n >> 8}.{n & 0xFF}", 1024), ack=70_002 + n)
    for client in real:
        arrived = gateway.into(tcp(client, here, ACK, b"go on", seq=6, ack=70_001))
        assert arrived == tcp(client, server, ACK, b"go on", seq=6, ack=70_001)
    assert gateway.errors == {}


@given(st.tuples(numbers, numbers), numbers)
def test_only_who_has_seen_the_server_s_number_confirms(first: tuple[int, int], ack: int) -> None:
    server = Forward(TCP, range(8080, 8081), [Server(number(INSIDE[0]), INSIDE[1])])
    gateway = Gateway(max_entries=2, forwards=Forwards([server]))
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    gateway.into(tcp(SERVER, (GATEWAY, 8080), SYN, seq=first[0]))
    gateway.out(tcp(INSIDE, SERVER, SYN | ACK, seq=first[1], ack=(first[0] + 1) % CIRCLE))
    gateway.into(tcp(SERVER, (GATEWAY, 8080), ACK, seq=(first[0] + 1) % CIRCLE, ack=ack))
    other = (SERVER[0], 9999)
    is_confirmed = (ack - first[1]) % CIRCLE <= 1
    assert (gateway.into(tcp(other, (GATEWAY, 8080), SYN)) is None) == is_confirmed
