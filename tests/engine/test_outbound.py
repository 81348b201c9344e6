"""New sessions from the inside: how they are opened, and what a refused host is told.

The first packet of a flow opens its session quickly (`Outbound.open_flow`) or on the plain way. A
property holds the two ways against each other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfmasq.apps import helpers
from nfmasq.engine import TCP, UDP, Flags, Timeouts
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.forward.trigger import Trigger
from nfmasq.engine.outbound import Outbound
from nfmasq.engine.table import ports
from tests.gateway import GATEWAY, INSIDE, NEIGHBOUR, NEW_ADDRESS, SERVER, Gateway, entries_on
from tests.packets import (
    ACK,
    ECHO,
    FIN,
    RST,
    SYN,
    Endpoint,
    checksums_are_right,
    destination_address,
    error,
    fragmentable,
    number,
    query,
    tcp,
    udp,
)

HOSTS = "10.0.0.2", "10.0.0.3"
SPORTS = 61000, 61001, 40000, 40000, 80, 0
SERVERS = "198.51.100.7", "198.51.100.8"
MPORTS = range(61000, 61004)
FTP, TFTP, TRIGGERING, FORWARDED, TRIGGERED = 21, 69, 9, 61002, 61003
DPORTS = 443, 443, FTP, TFTP, TRIGGERING, 0
PROTOCOLS = TCP, TCP, UDP
FLAGS = SYN, SYN, SYN, SYN, SYN, SYN, SYN | FIN, SYN | ACK, SYN | RST, ACK, FIN | ACK, RST

HELPERS = helpers({"ftp": [FTP], "tftp": [TFTP]})

Event = tuple[Any, ...]

packets_out = st.tuples(
    st.just("out"),
    st.sampled_from(PROTOCOLS),
    st.tuples(st.sampled_from(HOSTS), st.sampled_from(SPORTS)),
    st.tuples(st.sampled_from(SERVERS), st.sampled_from(DPORTS)),
    st.sampled_from(FLAGS),
    st.booleans(),
)
packets_in = st.tuples(
    st.just("into"),
    st.sampled_from(PROTOCOLS),
    st.tuples(st.sampled_from(SERVERS), st.sampled_from(DPORTS)),
    st.sampled_from((*MPORTS, FORWARDED, TRIGGERED)),
    st.sampled_from((SYN, SYN | ACK, ACK)),
)
others = st.one_of(
    st.tuples(st.just("server"), st.integers(0, 1), st.booleans(), st.sampled_from((0, 1, 1))),
    st.tuples(st.just("reload"), st.sampled_from((0, 1, 1, 2, 2))),
    st.tuples(st.just("passes"), st.sampled_from((0.3, 5, 25))),
    st.tuples(st.just("address"), st.sampled_from((GATEWAY, NEW_ADDRESS))),
)
events = st.lists(
    packets_out | packets_out | packets_out | packets_out | packets_in | packets_in | others,
    min_size=20,
    max_size=40,
)

IN_THE_WAY: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"mapping": "address-dependent"},
    {"mapping": "address-and-port-dependent"},
    {"max_entries": 3},
    {"max_entries_per_host": 2},
    {"max_ports_per_host": 1},
    {"max_new_per_host": 1},
    {"reset_on_address_change": False},
    {"forwarding": 1},
    {"forwarding": 2},
    {"triggers": True},
    {"listens": True},
)
choices = st.tuples(
    st.sampled_from(IN_THE_WAY),
    st.sampled_from(IN_THE_WAY),
    st.builds(dict, port_selection=st.sampled_from(list(ports.PORT_SELECTIONS))),
).map(lambda several: several[0] | several[1] | several[2])


class _First(random.Random):
    """A source of chance that always chooses the first."""

    def choice(self, seq: Any) -> Any:
        return seq[0]


def forwards_to(servers: int) -> list[Forward]:
    """Make forwards of TCP and UDP to the first hosts, so many; none where it is 0."""
    if not servers:
        return []
    ports = range(FORWARDED, FORWARDED + 1)
    return [
        Forward(protocol, ports, [Server(number(host), 80) for host in HOSTS[:servers]])
        for protocol in (TCP, UDP)
    ]


class Reloading(Gateway):
    """A gateway that can be told to forward to more or fewer servers."""

    def __init__(self, fast: bool = True, **told: Any) -> None:
        super().__init__(fast=fast, **told)
        self._told = told
        self.masq.inbound.maddrs = {number(GATEWAY), number(NEW_ADDRESS)}

    def reload(self, servers: int) -> None:
        forwards = Forwards(forwards_to(servers), self.sessions.forwards.triggers)
        self.configure(**(self._told | {"forwards": forwards}))
        for ms in self.sessions.entries():
            self.sessions.ip_masq_follow_forward(ms)


def gateway_with(
    forwarding: int = 0, triggers: bool = False, listens: bool = False, **settings: Any
) -> Reloading:
    """Make a gateway with all that may be in a packet's way.

    `forwarding` is how many servers share a port. With `listens`, an entry waits for whoever comes.
    """
    forwards = forwards_to(forwarding)
    trigger = Trigger((TCP, [range(TRIGGERING, TRIGGERING + 1)]), TCP, MPORTS[-1:], 20)
    gateway = Reloading(
        ports=MPORTS,
        apps=HELPERS,
        forwards=Forwards(forwards, [trigger] * triggers),
        timeouts=Timeouts(tcp_syn_sent=20, tcp_established=100, udp=10),
        **settings,
    )
    if listens:
        flags = int(Flags.USER | Flags.NO_DADDR | Flags.NO_DPORT)
        there = number(GATEWAY), 0, number(HOSTS[0]), SPORTS[0], 0, 0
        ms = gateway.sessions.ip_masq_new(UDP, *there, flags)
        assert ms is not None
        gateway.sessions.ip_masq_put(ms)
    return gateway


def happens(gateway: Reloading, what: str, *event: Any) -> object:
    """Have an event happen; returns what becomes of its packet, None where it has none."""
    if what == "out":
        protocol, inside, outside, flags, unsummed = event
        packet = tcp(inside, outside, flags) if protocol == TCP else udp(inside, outside, b"ask")
        return gateway.masq.ip_fw_masquerade(packet, number(gateway.address), gateway.now, unsummed)
    if what == "into":
        protocol, outside, mport, flags = event
        mapped = gateway.address, mport
        packet = tcp(outside, mapped, flags) if protocol == TCP else udp(outside, mapped, b"answer")
        return gateway.into(packet)
    if what == "passes":
        gateway.passes(*event)
    elif what == "server":
        at, alive, weight = event
        for forward in gateway.sessions.forwards.all:
            for server in forward.servers[at : at + 1]:
                server.alive, server.weight = alive, weight
    elif what == "reload":
        gateway.reload(*event)
    else:
        gone, (gateway.address,) = gateway.address, event
        if gone != gateway.address:
            for ms in entries_on(gateway, number(gone)):
                gateway.masq.masq_address_gone(ms, gateway.now)
    return None


def state(gateway: Gateway) -> Sequence[object]:
    """List all entries, counts and ports."""
    masq = gateway.masq
    names = (
        "protocol", "saddr", "sport", "maddr", "mport", "daddr", "dport", "state", "flags",
        "refcnt", "timer", "timeout", "packets_out", "packets_in", "bytes_out", "bytes_in", "app",
    )  # fmt: skip
    counters, triggers = masq.sessions.counters, masq.sessions.forwards.triggers
    servers = [server for forward in masq.sessions.forwards.all for server in forward.servers]
    return [
        [[getattr(ms, name) for name in names] for ms in masq.sessions.entries()],
        [str(ms.server) for ms in masq.sessions.entries()],
        [(server.active, server.inactive, server.total) for server in servers],
        [
            [(row.accepted, row.dropped, row.bytes) for row in traffic.values()]
            for traffic in (counters.outbound, counters.inbound)
        ],
        [counters.errors, counters.created, counters.ended],
        [masq.sessions.ports_free(protocol) for protocol in PROTOCOLS],
        [
            (masq.sessions.hosts.entries_of(number(h)), masq.sessions.hosts.ports_of(number(h)))
            for h in HOSTS
        ],
        [[(server.address, server.total) for server in trigger.servers] for trigger in triggers],
        [*masq.outbox],
    ]


@settings(max_examples=500, deadline=None)
@given(events, choices)
def test_quickly_or_plainly_the_same_sessions_are_opened(
    events: list[Event], choices: dict[str, Any]
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ports, "_random", _First())
        quick, plain = gateway_with(**choices), gateway_with(**choices, fast=False)
        for event in events:
            assert happens(quick, *event) == happens(plain, *event)
            assert state(quick) == state(plain)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note of each new flow whether it could be opened quickly."""
    answers = []
    opens = Outbound.open_flow

    def told(self: Outbound, *packet: Any) -> Any:
        ms = opens(self, *packet)
        answers.append(ms is not None)
        return ms

    monkeypatch.setattr(Outbound, "open_flow", told)
    return answers


CALM: Endpoint = ("10.0.0.9", 5000)


def test_a_first_segment_and_a_first_datagram_open_a_flow_quickly(opened: list[bool]) -> None:
    gateway = Gateway()
    assert gateway.out(tcp(INSIDE, SERVER, SYN)) is not None
    assert gateway.out(fragmentable(udp(INSIDE, SERVER, b"question"))) is not None
    assert opened == [True, True]
    assert len(gateway.sessions.entries()) == 2


def test_what_is_in_the_way_of_one_flow_sends_no_other_the_plain_way(opened: list[bool]) -> None:
    """A limit, an ended connection or a helper each concerns some flows, and no others."""
    forwards = Forwards([Forward(TCP, range(80, 81), [Server(number(HOSTS[0]), 80)])])
    gateway = Gateway(forwards=forwards, max_ports_per_host=1, apps=helpers({"ftp": [FTP]}))
    gateway.out(tcp(INSIDE, SERVER, SYN))
    gateway.into(tcp(SERVER, (GATEWAY, 61000), SYN | ACK))
    (ms,) = gateway.sessions.entries()
    gateway.masq.masq_address_gone(ms, gateway.now)
    gateway.out(tcp(INSIDE, SERVER, SYN))
    gateway.out(tcp((INSIDE[0], 5000), SERVER, SYN))
    gateway.out(tcp(CALM, (SERVER[0], FTP), SYN))
    assert opened == [True, False, False, False]
    gateway.out(tcp(CALM, SERVER, SYN))
    gateway.out(tcp(("10.0.0.10", 5000), SERVER, SYN))
    assert opened[4:] == [False, True]


def test_an_expected_session_and_a_trigger_send_no_other_flow_the_plain_way(
    opened: list[bool],
) -> None:
    trigger = Trigger((TCP, [range(TRIGGERING, TRIGGERING + 1)]), TCP, MPORTS[-1:], 20)
    gateway = Gateway(forwards=Forwards(triggers=[trigger]))
    flags = int(Flags.NO_DPORT | Flags.NO_REPLY)
    expected = number(GATEWAY), 0, number(CALM[0]), 6000, number(SERVER[0]), 0
    gateway.sessions.now = gateway.now
    ms = gateway.sessions.ip_masq_new(TCP, *expected, flags)
    assert ms is not None
    gateway.sessions.ip_masq_put(ms)
    gateway.out(tcp(CALM, SERVER, SYN))
    gateway.out(udp((CALM[0], 6000), SERVER))
    assert opened == [True, True]
    gateway.out(tcp((CALM[0], 6000), ("198.51.100.8", 443), SYN))
    gateway.out(tcp(INSIDE, (SERVER[0], TRIGGERING), SYN))
    assert opened[2:] == [False, False]


# -- what a refused host is told --------------------------------------------------------


@pytest.mark.parametrize(
    "packet",
    [tcp(NEIGHBOUR, SERVER, SYN), udp(NEIGHBOUR, SERVER), query(NEIGHBOUR, SERVER[0], ECHO)],
    ids=["tcp", "udp", "icmp"],
)
def test_a_host_whose_session_cannot_be_had_is_told_that_it_is_prohibited(packet: bytes) -> None:
    gateway = Gateway(max_entries=1)
    assert gateway.lets_in(SERVER, gateway.send(INSIDE, SERVER))
    assert gateway.out(packet) is None
    (told,) = gateway.masq.outbox
    assert destination_address(told) == NEIGHBOUR[0]
    assert told[12:16] == bytes(4)
    assert told[20:22] == b"\x03\x0d"
    assert told[28:] == packet
    assert checksums_are_right(told)


def test_refused_sessions_are_told_of_at_a_bounded_rate() -> None:
    gateway = Gateway(max_new_per_host=1)
    for _ in range(10):
        gateway.flood(INSIDE[0], 200)
        gateway.passes(0.1)
    assert 100 <= len(gateway.masq.outbox) <= 200


def test_nobody_is_told_of_a_dropped_error_or_of_a_refused_session_with_a_group() -> None:
    gateway = Gateway(max_entries=1)
    assert gateway.lets_in(SERVER, gateway.send(INSIDE, SERVER))
    gateway.out(udp(NEIGHBOUR, ("224.0.0.251", 5353)))
    gateway.out(udp(NEIGHBOUR, ("255.255.255.255", 67)))
    gateway.out(error(NEIGHBOUR[0], SERVER[0], udp(SERVER, NEIGHBOUR)))
    assert not gateway.masq.outbox
