"""Hairpinning: an inside machine reaches another by an outside address of the gateway."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import BEHAVIOURS, TCP, UDP
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.endings import DELETED
from nfmasq.engine.wire.checksum import without_checksum
from tests.gateway import GATEWAY, INSIDE, NEIGHBOUR, NEW_ADDRESS, SERVER, Gateway
from tests.packets import (
    ACK,
    FIN,
    RST,
    SYN,
    Endpoint,
    checksums_are_right,
    cut,
    destination,
    dotted,
    error,
    fragmentable,
    identification,
    ip,
    number,
    query,
    source,
    source_address,
    tcp,
    udp,
)

EI, AD, APD = BEHAVIOURS
OTHER_ADDRESS = NEW_ADDRESS
GATEWAY_INSIDE = "10.0.0.1"


class Hairpin(Gateway):
    """A gateway that takes the two steps of a hairpin one by one, or both."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"filtering": EI} | settings)
        self.masq.inbound.maddrs = {number(GATEWAY), number(OTHER_ADDRESS)}

    def first(self, packet: bytes, unsummed: bool = False) -> bytes | None:
        return self.masq.ip_fw_hairpin(packet, number(self.address), self.now, unsummed)

    def second(self, packet: bytes) -> bytes | None:
        return self.masq.ip_fw_hairpin_source(packet, self.now)

    def across(self, packet: bytes) -> bytes | None:
        """Send a packet the whole way from one inside machine to the other."""
        between = self.first(packet)
        assert between is not packet
        return self.second(between) if between is not None else None

    def connect(self) -> tuple[Endpoint, Endpoint]:
        """Have INSIDE and NEIGHBOUR known outside; returns the endpoints that stand for them."""
        return self.send(INSIDE, SERVER), self.send(NEIGHBOUR, SERVER)


@pytest.fixture
def gateway() -> Hairpin:
    return Hairpin()


# -- there and back ----------------------------------------------------------------


def test_each_side_sees_the_other_s_outside_address_and_port(gateway: Hairpin) -> None:
    mine, theirs = gateway.connect()
    assert gateway.across(udp(INSIDE, theirs, b"?")) == udp(mine, NEIGHBOUR, b"?")
    assert gateway.across(udp(NEIGHBOUR, mine, b"!")) == udp(theirs, INSIDE, b"!")


def test_between_the_steps_both_directions_have_the_inside_addresses(gateway: Hairpin) -> None:
    """Connection tracking stands there, and sees one connection, which is ESTABLISHED."""
    mine, theirs = gateway.connect()
    assert gateway.first(udp(INSIDE, theirs, b"?")) == udp(INSIDE, NEIGHBOUR, b"?")
    assert gateway.first(udp(NEIGHBOUR, mine, b"!")) == udp(NEIGHBOUR, INSIDE, b"!")


def test_a_sender_that_is_not_known_outside_gets_a_port_as_toward_any_other(
    gateway: Hairpin,
) -> None:
    theirs = gateway.send(NEIGHBOUR, SERVER)
    arrived = gateway.across(udp(INSIDE, theirs))
    assert arrived is not None
    assert source(arrived) == gateway.send(INSIDE, SERVER)


def test_an_endpoint_reaches_itself(gateway: Hairpin) -> None:
    mine = gateway.send(INSIDE, SERVER)
    assert gateway.across(udp(INSIDE, mine, b"me")) == udp(mine, INSIDE, b"me")


def test_a_tcp_connection_has_the_states_of_one_that_goes_out_and_of_one_that_comes_in(
    gateway: Hairpin,
) -> None:
    listening = gateway.out(tcp(NEIGHBOUR, SERVER, SYN))
    assert listening is not None
    theirs = source(listening)

    def states() -> tuple[str, str]:
        pair = [ms for ms in gateway.sessions.entries() if ms.daddr == number(GATEWAY)]
        (calling,) = (ms for ms in pair if ms.saddr == number(INSIDE[0]))
        (called,) = (ms for ms in pair if ms.saddr == number(NEIGHBOUR[0]))
        return calling.state_name, called.state_name

    syn = gateway.across(tcp(INSIDE, theirs, SYN))
    assert syn is not None
    mine = source(syn)
    assert syn == tcp(mine, NEIGHBOUR, SYN)
    assert states() == ("SYN_SENT", "SYN_RECV")
    assert gateway.across(tcp(NEIGHBOUR, mine, SYN | ACK)) == tcp(theirs, INSIDE, SYN | ACK)
    assert gateway.across(tcp(INSIDE, theirs, ACK, b"GET")) == tcp(mine, NEIGHBOUR, ACK, b"GET")
    assert states() == ("ESTABLISHED", "ESTABLISHED")
    assert gateway.across(tcp(NEIGHBOUR, mine, FIN | ACK)) == tcp(theirs, INSIDE, FIN | ACK)
    assert states() == ("CLOSE_WAIT", "FIN_WAIT")
    gateway.across(tcp(INSIDE, theirs, RST))
    assert states() == ("CLOSE", "CLOSE")


def test_two_that_open_a_tcp_connection_to_each_other_get_it() -> None:
    """Simultaneous open: each has sent before it hears the other (RFC 5382, REQ-2)."""
    gateway = Hairpin(filtering=APD)
    sent = [gateway.out(tcp(inside, SERVER, SYN)) for inside in (INSIDE, NEIGHBOUR)]
    mine, theirs = (source(packet) for packet in sent if packet is not None)
    assert gateway.across(tcp(INSIDE, theirs, SYN)) is None
    assert gateway.across(tcp(NEIGHBOUR, mine, SYN)) == tcp(theirs, INSIDE, SYN)
    assert gateway.across(tcp(INSIDE, theirs, SYN | ACK)) == tcp(mine, NEIGHBOUR, SYN | ACK)
    assert gateway.across(tcp(NEIGHBOUR, mine, ACK)) == tcp(theirs, INSIDE, ACK)


def test_the_packets_of_each_session_are_counted_as_out_and_in(gateway: Hairpin) -> None:
    _, theirs = gateway.connect()
    gateway.across(udp(INSIDE, theirs, b"12345"))
    counts = {
        (dotted(ms.saddr), ms.packets_out, ms.packets_in)
        for ms in gateway.sessions.entries()
        if ms.daddr == number(GATEWAY)
    }
    assert counts == {(INSIDE[0], 1, 0), (NEIGHBOUR[0], 0, 1)}


# -- which address -----------------------------------------------------------------


def test_a_new_session_is_put_on_the_address_given(gateway: Hairpin) -> None:
    theirs = gateway.send(NEIGHBOUR, SERVER)
    gateway.address = OTHER_ADDRESS
    arrived = gateway.across(udp(INSIDE, theirs))
    assert arrived is not None
    assert source_address(arrived) == OTHER_ADDRESS


def test_an_endpoint_keeps_the_address_and_port_that_it_is_known_by(gateway: Hairpin) -> None:
    """This holds whatever address the endpoint sends to."""
    mine = gateway.send(INSIDE, SERVER)
    gateway.address = OTHER_ADDRESS
    theirs = gateway.send(NEIGHBOUR, SERVER)
    assert theirs[0] == OTHER_ADDRESS
    assert gateway.across(udp(INSIDE, theirs)) == udp(mine, NEIGHBOUR)
    assert gateway.across(udp(NEIGHBOUR, mine)) == udp(theirs, INSIDE)


def test_an_endpoint_gets_another_address_when_its_own_is_gone(gateway: Hairpin) -> None:
    gateway.send(INSIDE, SERVER)
    gateway.masq.inbound.maddrs = {number(OTHER_ADDRESS)}
    gateway.address = OTHER_ADDRESS
    arrived = gateway.across(udp(INSIDE, gateway.send(NEIGHBOUR, SERVER)))
    assert arrived is not None
    assert source_address(arrived) == OTHER_ADDRESS


# -- who is let in -----------------------------------------------------------------


@pytest.mark.parametrize("mapping", BEHAVIOURS)
@pytest.mark.parametrize(("filtering", "admitted"), [(EI, True), (AD, False), (APD, False)])
def test_a_stranger_is_filtered_as_one_from_outside(
    mapping: str, filtering: str, admitted: bool
) -> None:
    gateway = Hairpin(mapping=mapping, filtering=filtering)
    _, theirs = gateway.connect()
    assert (gateway.across(udp(INSIDE, theirs)) is not None) is admitted
    assert gateway.errors == ({} if admitted else {"filtered": 1})


@pytest.mark.parametrize("mapping", BEHAVIOURS)
@pytest.mark.parametrize("filtering", BEHAVIOURS)
def test_a_host_is_not_filtered_from_itself(mapping: str, filtering: str) -> None:
    """A host sends to its own outside endpoint, from another port.

    In this way it finds out that there is hairpinning.
    """
    gateway = Hairpin(mapping=mapping, filtering=filtering)
    _, theirs = gateway.connect()
    arrived = gateway.across(udp((NEIGHBOUR[0], 5000), theirs))
    assert arrived is not None
    assert destination(arrived) == NEIGHBOUR


@pytest.mark.parametrize("mapping", BEHAVIOURS)
@pytest.mark.parametrize("filtering", BEHAVIOURS)
def test_whom_the_receiver_has_sent_to_is_let_in(mapping: str, filtering: str) -> None:
    """Hole punching: a packet that was itself dropped has opened the way for the answer."""
    gateway = Hairpin(mapping=mapping, filtering=filtering)
    mine, theirs = gateway.connect()
    gateway.first(udp(INSIDE, theirs))
    (mport,) = (
        ms.mport
        for ms in gateway.sessions.entries()
        if (ms.saddr, ms.daddr) == (number(INSIDE[0]), number(GATEWAY))
    )
    mine = (GATEWAY, mport)
    answer = gateway.across(udp(NEIGHBOUR, mine, b"answer"))
    if mapping == EI:
        assert answer == udp(theirs, INSIDE, b"answer")
    elif filtering == APD:
        assert answer is None  # the answer comes from another port than the first packet went to
    else:
        assert answer is not None
        assert destination(answer) == INSIDE


def test_a_segment_of_no_connection_is_filtered(gateway: Hairpin) -> None:
    listening = gateway.out(tcp(NEIGHBOUR, SERVER, SYN))
    assert listening is not None
    assert gateway.first(tcp(INSIDE, source(listening), ACK)) is None
    assert gateway.errors == {"filtered": 1}


def test_a_syn_that_is_refused_is_answered_after_six_seconds_and_not_before() -> None:
    """RFC 5382, REQ-4: the error comes home by the way of the gateway's own errors."""
    gateway = Hairpin(filtering=APD)
    listening = gateway.out(tcp(NEIGHBOUR, SERVER, SYN))
    assert listening is not None
    syn = tcp(INSIDE, source(listening), SYN)
    assert gateway.first(syn) is None
    gateway.passes(5)
    assert not gateway.masq.outbox
    gateway.passes(2)
    told = gateway.masq.ip_fw_own(gateway.masq.outbox.popleft(), gateway.now)
    assert told is not None
    assert destination(told)[0] == INSIDE[0]
    assert told[28:] == syn


def test_a_limit_of_the_sender_is_told_as_toward_the_outside() -> None:
    gateway = Hairpin(max_entries_per_host=1)
    _, theirs = gateway.connect()
    assert gateway.first(udp(INSIDE, theirs)) is None
    assert gateway.errors == {"host_entries": 1}
    assert len(gateway.masq.outbox) == 1


# -- what is no hairpin ------------------------------------------------------------


@pytest.mark.parametrize(
    "packet",
    [
        udp(INSIDE, (GATEWAY, 53)),
        tcp(INSIDE, (GATEWAY, 61000), SYN),
        query(INSIDE, GATEWAY),
        ip(INSIDE[0], GATEWAY, 47, b"GRE"),
        error(INSIDE[0], GATEWAY, udp((GATEWAY, 53), INSIDE)),
    ],
    ids=["a service", "another protocol's port", "a ping", "another protocol", "an error"],
)
def test_what_is_for_the_gateway_is_left_alone(gateway: Hairpin, packet: bytes) -> None:
    gateway.connect()
    entries = gateway.sessions.entries()
    assert gateway.first(packet) is packet
    assert gateway.sessions.entries() == entries


def test_what_is_for_the_gateway_stays_without_its_checksum(gateway: Hairpin) -> None:
    packet = without_checksum(udp(INSIDE, (GATEWAY, 53)))
    assert gateway.first(packet, unsummed=True) is packet


def test_a_packet_that_has_not_taken_the_first_step_takes_no_second(gateway: Hairpin) -> None:
    gateway.connect()
    for packet in (udp(INSIDE, NEIGHBOUR), error(INSIDE[0], NEIGHBOUR[0], udp(NEIGHBOUR, INSIDE))):
        assert gateway.second(packet) is None
    assert gateway.errors == {"unknown": 2}


def test_ip_options_that_name_addresses_do_not_get_across(gateway: Hairpin) -> None:
    _, theirs = gateway.connect()
    record_route = b"\x07\x07\x08\x0a\x00\x00\x02\x00"
    assert gateway.first(udp(INSIDE, theirs, options=record_route)) is None
    assert gateway.errors == {"ip_option": 1}


# -- forwarded ports ---------------------------------------------------------------


def test_an_inside_client_reaches_a_forwarded_port_by_the_outside_address() -> None:
    server = Server(number(NEIGHBOUR[0]), 80, 1)
    gateway = Hairpin(forwards=Forwards([Forward(TCP, range(8080, 8081), [server])]))
    listened: Endpoint = (GATEWAY, 8080)
    syn = gateway.across(tcp(INSIDE, listened, SYN))
    assert syn is not None
    mine = source(syn)
    assert mine[0] == GATEWAY
    assert destination(syn) == (NEIGHBOUR[0], 80)
    answer = gateway.across(tcp((NEIGHBOUR[0], 80), mine, SYN | ACK))
    assert answer == tcp(listened, INSIDE, SYN | ACK)


def test_a_forwarded_port_is_none_of_the_gateway_s_inside_address() -> None:
    server = Server(number(NEIGHBOUR[0]), 80, 1)
    gateway = Hairpin(forwards=Forwards([Forward(TCP, range(8080, 8081), [server])]))
    packet = tcp(INSIDE, (GATEWAY_INSIDE, 8080), SYN)
    assert gateway.first(packet) is packet


# -- errors ------------------------------------------------------------------------


def conversation(gateway: Hairpin, inside: Endpoint = INSIDE) -> tuple[bytes, bytes, bytes]:
    """Send a datagram; returns it as it is sent, as it is between the steps, as it is received."""
    _, theirs = gateway.connect()
    sent = udp(inside, theirs, b"a datagram that somebody complains of")
    between = gateway.first(sent)
    assert between is not None
    received = gateway.second(between)
    assert received is not None
    return sent, between, received


@pytest.mark.parametrize("inside", [INSIDE, NEIGHBOUR], ids=["another", "itself"])
@pytest.mark.parametrize("transport", [8, 45], ids=["least", "whole"])
def test_an_error_comes_from_the_outside_address_and_quotes_what_was_sent(
    gateway: Hairpin, inside: Endpoint, transport: int
) -> None:
    """RFC 5508, REQ-7: the receiver's inside address is nowhere in the error."""
    sent, between, received = (cut(p, transport) for p in conversation(gateway, inside))
    first = gateway.first(error(NEIGHBOUR[0], GATEWAY, received))
    assert first == error(NEIGHBOUR[0], inside[0], between)  # as connection tracking knows it
    assert gateway.second(first) == error(GATEWAY, inside[0], sent)


def test_an_error_neither_makes_refreshes_nor_ends_a_session(gateway: Hairpin) -> None:
    _, _, received = conversation(gateway)
    before = [(ms, ms.timer, ms.refcnt, ms.state) for ms in gateway.sessions.entries()]
    gateway.now += 10
    assert gateway.across(error(NEIGHBOUR[0], GATEWAY, received)) is not None
    assert [(ms, ms.timer, ms.refcnt, ms.state) for ms in gateway.sessions.entries()] == before


def test_an_error_that_is_not_for_the_sender_of_what_it_quotes_is_left_alone(
    gateway: Hairpin,
) -> None:
    _, _, received = conversation(gateway)
    packet = error(NEIGHBOUR[0], OTHER_ADDRESS, received)
    assert gateway.first(packet) is packet


def test_a_damaged_error_is_dropped(gateway: Hairpin) -> None:
    _, _, received = conversation(gateway)
    packet = error(NEIGHBOUR[0], GATEWAY, received)
    assert gateway.first(packet[:-1] + bytes([packet[-1] ^ 1])) is None
    assert gateway.errors == {"malformed": 1}


def test_the_gateway_s_own_error_quotes_what_was_sent(gateway: Hairpin) -> None:
    """Time exceeded: the packet has taken the first step when its time is up."""
    sent, between, _ = conversation(gateway)
    packet = error(GATEWAY_INSIDE, INSIDE[0], between, 11, 0)
    mended = gateway.masq.ip_fw_hairpin_own_error(packet, gateway.now)
    assert mended == error(GATEWAY_INSIDE, INSIDE[0], sent, 11, 0)


@pytest.mark.parametrize(
    "packet",
    [
        error(GATEWAY_INSIDE, INSIDE[0], udp(INSIDE, SERVER), 11, 0),
        error(GATEWAY_INSIDE, INSIDE[0], udp(INSIDE, NEIGHBOUR)[:24]),
        query((GATEWAY_INSIDE, 7), INSIDE[0]),
        udp((GATEWAY_INSIDE, 53), INSIDE),
    ],
    ids=["about something else", "that quotes too little", "no error", "not even ICMP"],
)
def test_other_packets_of_the_gateway_to_the_inside_are_left_alone(
    gateway: Hairpin, packet: bytes
) -> None:
    conversation(gateway)
    assert gateway.masq.ip_fw_hairpin_own_error(packet, gateway.now) is packet


def test_the_gateway_s_own_error_after_both_steps_goes_to_the_sender(gateway: Hairpin) -> None:
    """Host unreachable: the packet comes from the gateway by then, and the gateway tells itself."""
    _, between, received = conversation(gateway)
    mended = gateway.masq.ip_fw_own(error(GATEWAY, GATEWAY, received, 3, 1), gateway.now)
    assert mended == error(GATEWAY, INSIDE[0], between, 3, 1)


# -- fragments ---------------------------------------------------------------------


def test_fragments_of_two_senders_are_not_mixed_up_by_the_receiver(gateway: Hairpin) -> None:
    """The receiver sees one address for both senders (RFC 7857, section 10).

    So their packets are numbered anew.
    """
    theirs = gateway.send(("10.0.0.4", 5000), SERVER)
    arrived = [
        gateway.across(fragmentable(udp(inside, theirs, b"of the same identification")))
        for inside in (INSIDE, NEIGHBOUR)
    ]
    first, second = (packet for packet in arrived if packet is not None)
    assert identification(first) != identification(second)
    assert checksums_are_right(first)
    assert checksums_are_right(second)


# -- counted -----------------------------------------------------------------------


def test_a_packet_is_counted_once_though_it_takes_two_steps(gateway: Hairpin) -> None:
    _, theirs = gateway.connect()
    gateway.across(udp(INSIDE, theirs))
    out, into = (
        gateway.sessions.counters.outbound["udp"],
        gateway.sessions.counters.inbound["udp"],
    )
    assert (out.accepted, out.dropped, into.accepted, into.dropped) == (3, 0, 0, 0)
    gateway.second(udp(NEIGHBOUR, INSIDE))
    assert (out.accepted, out.dropped, into.accepted, into.dropped) == (3, 1, 0, 0)


# -- checksums ---------------------------------------------------------------------


@pytest.mark.parametrize("build", [tcp, udp])
def test_a_checksum_left_to_the_network_card_is_computed(gateway: Hairpin, build: Any) -> None:
    gateway.out(build(INSIDE, SERVER))
    sent = gateway.out(build(NEIGHBOUR, SERVER))
    assert sent is not None
    theirs = source(sent)
    whole = build(INSIDE, theirs, SYN) if build is tcp else build(INSIDE, theirs, b"data")
    between = gateway.first(without_checksum(whole), unsummed=True)
    assert between is not None
    assert checksums_are_right(between)
    assert between == gateway.first(whole)


# -- laws --------------------------------------------------------------------------

ENDPOINTS: list[Endpoint] = [INSIDE, (INSIDE[0], 40001), NEIGHBOUR, ("10.0.0.4", 5000)]
FEW_PORTS = range(61000, 61004)

SEND = st.tuples(
    st.just("send"),
    st.sampled_from(ENDPOINTS),
    st.sampled_from(FEW_PORTS),
    st.sampled_from([UDP, UDP, TCP]),
    st.sampled_from([SYN, SYN | ACK, ACK, FIN | ACK, RST]),
)
GO_OUT = st.tuples(st.just("go_out"), st.sampled_from(ENDPOINTS), st.sampled_from([UDP, TCP]))
WAIT = st.tuples(st.just("wait"), st.sampled_from([1, 100, 1000, 10_000]))
END = st.tuples(st.just("end"), st.integers(0, 99))
STEPS = st.lists(st.one_of(SEND, SEND, SEND, SEND, GO_OUT, GO_OUT, WAIT, END), min_size=20)
SETTINGS = st.fixed_dictionaries(
    {
        "mapping": st.sampled_from(BEHAVIOURS),
        "filtering": st.sampled_from([EI, EI, AD, APD]),
        "max_entries": st.sampled_from([12, 1000, 1000]),
        "unsolicited": st.sampled_from(["drop", "accept"]),
    }
)


class Walk:
    """Takes the same steps at a gateway that hairpins and at a gateway with a mirror outside.

    What goes out to the mirror comes in again as it is, and a hairpin does just this. There is one
    difference: only with the mirror a host that sends to itself is filtered.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.hairpinning, self.mirrored = (Hairpin(ports=FEW_PORTS, **settings) for _ in range(2))
        self.both = (self.hairpinning, self.mirrored)
        self.is_filtered = settings["filtering"] != EI

    def send(self, inside: Endpoint, port: int, protocol: int, flags: int) -> None:
        if self.is_filtered and self.has_port(inside[0], protocol, port):
            return
        to = (GATEWAY, port)
        packet = tcp(inside, to, flags) if protocol == TCP else udp(inside, to, b"x")
        between = self.hairpinning.first(packet)
        if between is packet:
            return
        assert between is None or (source(between) == inside and checksums_are_right(between))
        arrived = self.hairpinning.second(between) if between is not None else None
        assert arrived == self.reflected(packet)
        assert arrived is None or checksums_are_right(arrived)

    def has_port(self, host: str, protocol: int, port: int) -> bool:
        holder = (number(host), protocol, port)
        entries = self.mirrored.masq.sessions.entries()
        return any((ms.saddr, ms.protocol, ms.mport) == holder for ms in entries)

    def reflected(self, packet: bytes) -> bytes | None:
        sent = self.mirrored.out(packet)
        arrived = self.mirrored.into(sent) if sent is not None else None
        return None if arrived is sent else arrived

    def go_out(self, inside: Endpoint, protocol: int) -> None:
        for gateway in self.both:
            gateway.out(tcp(inside, SERVER, SYN) if protocol == TCP else udp(inside, SERVER))

    def wait(self, seconds: float) -> None:
        for gateway in self.both:
            gateway.passes(seconds)

    def end(self, which: int) -> None:
        for gateway in self.both:
            if entries := gateway.sessions.entries():
                gateway.sessions.remove(entries[which % len(entries)], DELETED)

    def summary(self, gateway: Hairpin) -> list[tuple[object, ...]]:
        return [
            (
                *(ms.protocol, ms.saddr, ms.sport, ms.mport, ms.daddr, ms.dport),
                *(ms.flags, ms.refcnt, ms.state, ms.timer, ms.packets_out, ms.packets_in),
            )
            for ms in gateway.sessions.entries()
        ]


@given(SETTINGS, STEPS)
def test_a_hairpin_is_a_packet_that_goes_out_and_comes_in_again(
    settings: dict[str, Any], steps: list[tuple[Any, ...]]
) -> None:
    """Packets are the same to the byte, and entries in their flags, state, timer and counts."""
    walk = Walk(settings)
    for name, *arguments in steps:
        getattr(walk, name)(*arguments)
        assert walk.summary(walk.hairpinning) == walk.summary(walk.mirrored)


@pytest.mark.parametrize("which", ["the sender's", "the receiver's"])
def test_what_is_remembered_of_two_sessions_goes_with_either(gateway: Hairpin, which: str) -> None:
    _, between, _ = conversation(gateway)
    inside = INSIDE if which == "the sender's" else NEIGHBOUR
    for ms in gateway.sessions.entries():
        if ms.saddr == number(inside[0]):
            gateway.sessions.remove(ms, DELETED)
    assert gateway.second(between) is None
    assert gateway.errors == {"unknown": 1}
    assert gateway.masq.hairpins.sessions() == set()


def test_the_newest_packet_decides_which_of_two_sessions_with_a_peer_gives_the_source() -> None:
    """The mapping depends on the destination, and the peer is known by two ports."""
    gateway = Hairpin(mapping=APD)
    known = [gateway.send(NEIGHBOUR, (SERVER[0], port)) for port in (443, 444)]
    arrived = [gateway.across(udp(INSIDE, there)) for there in (*known, *known)]
    sources = [source(packet) for packet in arrived if packet is not None]
    assert sources[:2] == sources[2:]
    assert sources[0] != sources[1]
    gateway.passes(100_000)
    assert gateway.masq.hairpins.sessions() == set()


@given(SETTINGS, STEPS)
def test_nothing_is_remembered_of_sessions_that_are_gone(
    settings: dict[str, Any], steps: list[tuple[Any, ...]]
) -> None:
    walk = Walk(settings)
    masq = walk.hairpinning.masq
    for name, *arguments in steps:
        getattr(walk, name)(*arguments)
        assert masq.hairpins.sessions() <= set(masq.sessions.entries())
    walk.wait(100_000)
    assert not masq.sessions.entries()
    assert not masq.hairpins
    assert masq.hairpins.sessions() == set()


PIECES = st.sampled_from(
    [
        udp(INSIDE, (GATEWAY, 61001), b"x"),
        udp(INSIDE, NEIGHBOUR, b"x"),
        tcp(NEIGHBOUR, (GATEWAY, 61000), SYN),
        error(NEIGHBOUR[0], GATEWAY, udp((GATEWAY, 61000), NEIGHBOUR)),
        error(GATEWAY_INSIDE, INSIDE[0], udp(INSIDE, NEIGHBOUR)),
    ]
)
DAMAGE = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 255)), max_size=3)


@given(PIECES, DAMAGE, st.integers(0, 80))
def test_whatever_comes_nothing_leaves_with_the_sender_s_inside_address(
    packet: bytes, damage: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(packet[:length] if length > 60 else packet)
    for at, value in damage:
        damaged[at % len(damaged)] = value
    gateway = Hairpin()
    conversation(gateway)
    first = gateway.first(bytes(damaged))
    for step in (first, bytes(damaged)):
        second = gateway.second(step) if step is not None else None
        assert second is None or source_address(second) == GATEWAY
    own = gateway.masq.ip_fw_hairpin_own_error(bytes(damaged), gateway.now)
    assert own is None or own[:20] == bytes(damaged[:20])
