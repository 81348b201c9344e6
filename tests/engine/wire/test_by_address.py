"""Protocols other than TCP, UDP and ICMP go by address: an inside host for each outside host."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nfmasq.engine import PROFILES
from nfmasq.engine.wire.by_address import REFUSED, name_of, number_of
from tests.gateway import Gateway, masquerade_with
from tests.packets import (
    TIME_EXCEEDED,
    UNREACHABLE,
    checksums_are_right,
    dccp,
    destination_address,
    error,
    header_checksum_is_right,
    ip,
    number,
    quoted,
    source_address,
    udp,
    udplite,
)

INSIDE, NEIGHBOUR = "10.0.0.2", "10.0.0.3"
SERVER, OTHER_SERVER = "198.51.100.7", "198.51.100.8"
GATEWAY, NEW_ADDRESS = "203.0.113.1", "203.0.113.2"
ROUTER = "192.0.2.254"

GRE, ESP, AH, SCTP, UDPLITE, DCCP = 47, 50, 51, 132, 136, 33
PING_IN_TUNNEL = ip("192.168.0.1", "192.168.0.2", 1, b"\x08\x00\xf7\xff" + bytes(4))


def packet(protocol: int, src: str, dst: str, payload: bytes = b"payload") -> bytes:
    """Build a whole and well-formed packet of a protocol."""
    if protocol == UDPLITE:
        return udplite((src, 5004), (dst, 5004), payload)
    if protocol == DCCP:
        return dccp((src, 5001), (dst, 5001), payload)
    head = {GRE: b"\x00\x00\x08\x00", ESP: b"\x00\x00\x10\x00" + bytes(4), SCTP: bytes(range(12))}
    if protocol in (4, 41):
        head[4], head[41] = PING_IN_TUNNEL, b"\x60" + bytes(39)
    return ip(src, dst, protocol, head.get(protocol, b"") + payload)


EACH_PROTOCOL = pytest.mark.parametrize(
    "protocol",
    [GRE, ESP, SCTP, UDPLITE, DCCP, 4, 41, 115, 253],
    ids=["gre", "esp", "sctp", "udplite", "dccp", "ipip", "6in4", "l2tp", "experimental"],
)
WITHOUT_ADDRESSES = st.integers(0, 255).filter(lambda p: p not in REFUSED | {1, 6, 17, 33, 136})
"""Protocols whose checksums, if any, do not cover the addresses."""


@pytest.fixture
def gateway() -> Gateway:
    return Gateway(other_protocols="by-address")


# -- out and back ---------------------------------------------------------------------


@EACH_PROTOCOL
def test_a_packet_goes_out_from_the_gateway_s_address_and_its_answer_comes_back(
    gateway: Gateway, protocol: int
) -> None:
    for _ in range(2):
        sent = gateway.out(packet(protocol, INSIDE, SERVER))
        assert sent == packet(protocol, GATEWAY, SERVER)
        answer = gateway.into(packet(protocol, SERVER, GATEWAY, b"answer"))
        assert answer == packet(protocol, SERVER, INSIDE, b"answer")
    (entry,) = gateway.sessions.entries()
    assert (entry.protocol, entry.sport, entry.mport, entry.dport) == (protocol, 0, 0, 0)
    assert (entry.packets_out, entry.packets_in) == (2, 2)


@given(WITHOUT_ADDRESSES, st.binary(min_size=40, max_size=90), st.sampled_from([b"", bytes(4)]))
def test_nothing_but_the_address_is_changed_in_a_protocol_of_any_number(
    protocol: int, payload: bytes, options: bytes
) -> None:
    gateway = Gateway(other_protocols="by-address")
    sent = gateway.out(ip(INSIDE, SERVER, protocol, payload, options))
    assert sent == ip(GATEWAY, SERVER, protocol, payload, options)
    answer = gateway.into(ip(SERVER, GATEWAY, protocol, payload, options))
    assert answer == ip(SERVER, INSIDE, protocol, payload, options)


ADDRESSES = st.integers(1 << 24, (224 << 24) - 1).map(
    lambda a: ".".join(str(a >> shift & 255) for shift in (24, 16, 8, 0))
)


@given(
    inside=ADDRESSES,
    maddr=ADDRESSES,
    outside=ADDRESSES,
    payload=st.binary(max_size=30),
    coverage=st.integers(0, 30),
    build=st.sampled_from(["udplite", "dccp"]),
)
def test_a_checksum_that_covers_the_addresses_is_right_afterwards(
    inside: str, maddr: str, outside: str, payload: bytes, coverage: int, build: str
) -> None:
    def built(src: str, dst: str) -> bytes:
        if build == "dccp":
            return dccp((src, 9), (dst, 10), payload)
        covered = min(coverage + 8, len(payload) + 8) if coverage else 0
        return udplite((src, 9), (dst, 10), payload, coverage=covered)

    masquerade = masquerade_with(other_protocols="by-address")
    sent = masquerade.ip_fw_masquerade(built(inside, outside), number(maddr), 1.0)
    received = masquerade.ip_fw_demasquerade(built(outside, maddr), 1.0)
    for got, src, dst in ((sent, maddr, outside), (received, outside, inside)):
        assert got is not None
        assert checksums_are_right(got)
        assert got == built(src, dst)


def test_a_wrong_udplite_checksum_stays_wrong(gateway: Gateway) -> None:
    right = udplite((INSIDE, 9), (SERVER, 9), b"payload")
    for checksum in (bytes(2), b"\x12\x34"):
        sent = gateway.out(right[:26] + checksum + right[28:])
        assert sent is not None
        assert header_checksum_is_right(sent)
        assert not checksums_are_right(sent)


def test_by_default_what_goes_out_is_dropped_and_what_comes_in_is_left_alone() -> None:
    gateway = Gateway()
    assert gateway.out(packet(GRE, INSIDE, SERVER)) is None
    assert gateway.errors == {"unsupported": 1}
    stray = packet(GRE, SERVER, GATEWAY)
    assert gateway.into(stray) is stray


# -- who may speak with whom ----------------------------------------------------------


@EACH_PROTOCOL
def test_a_second_inside_host_toward_the_same_outside_host_is_refused_while_the_first_lives(
    gateway: Gateway, protocol: int
) -> None:
    assert gateway.out(packet(protocol, INSIDE, SERVER)) is not None
    assert gateway.out(packet(protocol, NEIGHBOUR, SERVER)) is None
    assert gateway.errors == {"no_port": 1}
    received = gateway.into(packet(protocol, SERVER, GATEWAY))
    assert received == packet(protocol, SERVER, INSIDE)

    gateway.passes(599)
    assert gateway.out(packet(protocol, NEIGHBOUR, SERVER)) is None
    gateway.passes(2)
    assert gateway.out(packet(protocol, NEIGHBOUR, SERVER)) == packet(protocol, GATEWAY, SERVER)
    assert gateway.out(packet(protocol, INSIDE, SERVER)) is None


def test_other_outside_hosts_and_other_protocols_are_to_be_had(gateway: Gateway) -> None:
    assert gateway.out(packet(GRE, INSIDE, SERVER)) is not None
    assert gateway.out(packet(GRE, INSIDE, OTHER_SERVER)) is not None
    assert gateway.out(packet(ESP, NEIGHBOUR, SERVER)) is not None
    received = gateway.into(packet(ESP, SERVER, GATEWAY))
    assert received == packet(ESP, SERVER, NEIGHBOUR)


@pytest.mark.parametrize("filtering", ["endpoint-independent", "address-dependent"])
def test_an_outside_host_without_an_entry_is_not_let_in(filtering: str) -> None:
    gateway = Gateway(other_protocols="by-address", filtering=filtering)
    gateway.out(packet(GRE, INSIDE, SERVER))
    for stray in (packet(GRE, OTHER_SERVER, GATEWAY), packet(ESP, SERVER, GATEWAY)):
        assert gateway.into(stray) is stray
    assert len(gateway.sessions.entries()) == 1


def test_the_gateway_s_own_protocols_are_left_alone(gateway: Gateway) -> None:
    gateway.out(packet(GRE, INSIDE, SERVER))
    for own in (
        ip(ROUTER, "224.0.0.5", 89, bytes(44)),
        ip(ROUTER, "224.0.0.1", 2, bytes(8)),
        ip(ROUTER, GATEWAY, AH, bytes(24)),
        packet(GRE, ROUTER, GATEWAY),
        packet(GRE, ROUTER, "224.0.0.9"),
    ):
        assert gateway.into(own) is own
    assert gateway.errors == {}


# -- what does not leave --------------------------------------------------------------


@pytest.mark.parametrize("protocol", sorted(REFUSED))
def test_what_works_through_no_masquerade_does_not_leave(gateway: Gateway, protocol: int) -> None:
    assert gateway.out(ip(INSIDE, SERVER, protocol, bytes(60))) is None
    assert gateway.errors == {"unsupported": 1}


@pytest.mark.parametrize("group", ["224.0.0.18", "239.1.2.3", "255.255.255.255"])
def test_nothing_leaves_for_a_group(gateway: Gateway, group: str) -> None:
    assert gateway.out(packet(GRE, INSIDE, group)) is None
    assert gateway.errors == {"unsupported": 1}


@pytest.mark.parametrize(
    "malformed",
    [
        ip(INSIDE, SERVER, GRE, bytes(3)),
        ip(INSIDE, SERVER, ESP, bytes(7)),
        ip(INSIDE, SERVER, SCTP, bytes(11)),
        ip(INSIDE, SERVER, UDPLITE, bytes(7)),
        ip(INSIDE, SERVER, DCCP, bytes(11)),
        ip(INSIDE, SERVER, DCCP, b"\x00\x01\x00\x01\x02" + bytes(7)),
        ip(INSIDE, SERVER, DCCP, b"\x00\x01\x00\x01\x04" + bytes(7)),
        udplite((INSIDE, 9), (SERVER, 9), b"payload", coverage=7),
        udplite((INSIDE, 9), (SERVER, 9), b"payload", coverage=16),
        packet(GRE, INSIDE, SERVER)[:-1],
        packet(GRE, INSIDE, SERVER) + b"\x00",
    ],
)
def test_malformed_packets_do_not_leave(gateway: Gateway, malformed: bytes) -> None:
    assert gateway.out(malformed) is None
    assert gateway.errors == {"malformed": 1}


@given(protocol=st.integers(0, 255), rest=st.binary(max_size=60), into=st.booleans())
@settings(max_examples=300)
def test_whatever_comes_is_dropped_or_rewritten_or_left_alone(
    protocol: int, rest: bytes, into: bool
) -> None:
    gateway = Gateway(other_protocols="by-address")
    for known in (GRE, ESP, SCTP, UDPLITE, DCCP):
        gateway.out(packet(known, INSIDE, SERVER))
    if into:
        came = ip(SERVER, GATEWAY, protocol, rest)
        received = gateway.into(came)
        assert received is None or received is came or destination_address(received) == INSIDE
    else:
        sent = gateway.out(ip(INSIDE, SERVER, protocol, rest))
        assert sent is None or source_address(sent) == GATEWAY


# -- ICMP errors ----------------------------------------------------------------------


@EACH_PROTOCOL
@pytest.mark.parametrize("transport", [8, 100], ids=["8 bytes quoted", "all quoted"])
def test_errors_are_put_right_in_both_directions(
    gateway: Gateway, protocol: int, transport: int
) -> None:
    def quote(src: str, dst: str) -> bytes:
        return packet(protocol, src, dst)[: 20 + transport]

    gateway.out(packet(protocol, INSIDE, SERVER))
    gateway.into(packet(protocol, SERVER, GATEWAY))

    from_router = error(ROUTER, GATEWAY, quote(GATEWAY, SERVER), TIME_EXCEEDED, 0)
    received = gateway.into(from_router)
    assert received == error(ROUTER, INSIDE, quote(INSIDE, SERVER), TIME_EXCEEDED, 0)

    from_inside = error(INSIDE, SERVER, quote(SERVER, INSIDE), UNREACHABLE, 2)
    sent = gateway.out(from_inside)
    assert sent == error(GATEWAY, SERVER, quote(SERVER, GATEWAY), UNREACHABLE, 2)

    own_error = gateway.masq.ip_fw_own
    to_outside = own_error(error(GATEWAY, SERVER, quote(SERVER, INSIDE), UNREACHABLE, 4), 1000.0)
    assert to_outside == error(GATEWAY, SERVER, quote(SERVER, GATEWAY), UNREACHABLE, 4)
    to_itself = own_error(error(GATEWAY, GATEWAY, quote(GATEWAY, SERVER), UNREACHABLE, 1), 1000.0)
    assert to_itself == error(GATEWAY, INSIDE, quote(INSIDE, SERVER), UNREACHABLE, 1)


def test_an_error_about_a_packet_of_less_than_8_bytes_is_put_right(gateway: Gateway) -> None:
    short = ip(INSIDE, SERVER, GRE, bytes(4))
    sent = gateway.out(short)
    assert sent is not None
    received = gateway.into(error(ROUTER, GATEWAY, sent))
    assert received is not None
    assert quoted(received) == short


@pytest.mark.parametrize("stray", [GRE, SCTP], ids=["another host", "another protocol"])
def test_an_error_about_none_of_ours_is_left_alone_or_dropped(gateway: Gateway, stray: int) -> None:
    gateway.out(packet(GRE, INSIDE, SERVER))
    there = OTHER_SERVER if stray == GRE else SERVER
    from_outside = error(ROUTER, GATEWAY, packet(stray, GATEWAY, there))
    assert gateway.into(from_outside) is from_outside
    assert gateway.out(error(INSIDE, there, packet(stray, there, INSIDE))) is None
    assert gateway.errors == {"unknown": 1}


# -- counted, named, timed ------------------------------------------------------------


def test_entries_by_address_are_counted_as_other(gateway: Gateway) -> None:
    gateway.out(packet(GRE, INSIDE, SERVER))
    gateway.out(packet(SCTP, INSIDE, SERVER))
    gateway.out(udp((INSIDE, 1), (SERVER, 53)))
    assert gateway.sessions.entry_counts() == {"tcp": 0, "udp": 1, "icmp": 0, "other": 2}
    assert gateway.sessions.counters.created == {"tcp": 0, "udp": 1, "icmp": 0, "other": 2}
    gateway.passes(601)
    assert gateway.sessions.entry_counts() == {"tcp": 0, "udp": 0, "icmp": 0, "other": 0}
    assert gateway.sessions.account().expired == {"tcp": 0, "udp": 1, "icmp": 0, "other": 2}


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_an_entry_lives_for_ten_minutes_without_a_packet(profile: object) -> None:
    gateway = Gateway(other_protocols="by-address", timeouts=profile)
    gateway.out(packet(GRE, INSIDE, SERVER))
    gateway.passes(599)
    gateway.into(packet(GRE, SERVER, GATEWAY))
    gateway.passes(599)
    (entry,) = gateway.sessions.entries()
    assert entry.state_name == "OTHER"
    gateway.passes(2)
    assert gateway.sessions.entries() == []


def test_entries_by_address_take_room() -> None:
    gateway = Gateway(other_protocols="by-address", max_entries=2)
    for protocol in (GRE, ESP):
        gateway.out(packet(protocol, INSIDE, SERVER))
        gateway.into(packet(protocol, SERVER, GATEWAY))
    assert gateway.out(packet(SCTP, INSIDE, SERVER)) is None
    assert gateway.errors == {"no_room": 1}


def test_entries_by_address_take_no_port() -> None:
    gateway = Gateway(other_protocols="by-address", max_ports_per_host=1)
    for protocol in (GRE, ESP):
        gateway.out(packet(protocol, INSIDE, SERVER))
    assert gateway.send((INSIDE, 1), (SERVER, 53))
    assert gateway.out(packet(GRE, NEIGHBOUR, SERVER)) is None
    assert gateway.errors == {"no_port": 1}


def test_who_is_refused_is_told(gateway: Gateway) -> None:
    gateway.out(packet(SCTP, INSIDE, SERVER))
    asked = packet(SCTP, NEIGHBOUR, SERVER)
    assert gateway.out(asked) is None
    (told,) = gateway.masq.outbox
    assert destination_address(told) == NEIGHBOUR
    assert told[20:22] == bytes([UNREACHABLE, 13])
    assert quoted(told) == asked


@given(st.integers(0, 255))
def test_a_protocol_is_known_by_its_name_and_by_its_number(protocol: int) -> None:
    assert number_of(name_of(protocol)) == number_of(str(protocol)) == protocol


def test_known_protocols_have_names_and_other_texts_name_none() -> None:
    names = ["gre", "esp", "ah", "sctp", "udplite", "dccp", "tcp", "udp", "icmp"]
    assert [name_of(number_of(name) or 0) for name in names] == names
    assert [number_of(text) for text in ("", "256", "-1", "GRE", "4.0", "²", "0047")] == [None] * 7


# -- against a model ------------------------------------------------------------------


@dataclass
class Entry:
    maddr: str
    deadline: float
    replied: bool = False


HOSTS, SERVERS = st.sampled_from([INSIDE, NEIGHBOUR]), st.sampled_from([SERVER, OTHER_SERVER])
MADDRS, PROTOCOLS = st.sampled_from([GATEWAY, NEW_ADDRESS]), st.sampled_from([GRE, UDPLITE])


class ByAddress(RuleBasedStateMachine):
    """Compares the entries with a dictionary by protocol, inside host and outside host."""

    @initialize(mapping=st.sampled_from(["endpoint-independent", "address-and-port-dependent"]))
    def start(self, mapping: str) -> None:
        self.gateway = Gateway(other_protocols="by-address", mapping=mapping)
        self.entries: dict[tuple[int, str, str], Entry] = {}
        self.refused = 0

    def holder(self, protocol: int, maddr: str, outside: str) -> str | None:
        """Find the inside host that has an outside host to itself; None where there is none."""
        held = (
            inside
            for (p, inside, o), entry in self.entries.items()
            if (p, o, entry.maddr) == (protocol, outside, maddr)
        )
        return next(held, None)

    @rule(protocol=PROTOCOLS, inside=HOSTS, outside=SERVERS, maddr=MADDRS)
    def from_inside(self, protocol: int, inside: str, outside: str, maddr: str) -> None:
        self.gateway.address = maddr
        outcome = self.gateway.out(packet(protocol, inside, outside))
        entry = self.entries.get((protocol, inside, outside))
        if entry is not None and entry.maddr != maddr and entry.replied:
            entry = None  # it has ended
            del self.entries[protocol, inside, outside]
        if entry is None or entry.maddr != maddr:
            if self.holder(protocol, maddr, outside) is not None:
                assert outcome is None
                self.refused += 1
                return
            entry = self.entries[protocol, inside, outside] = Entry(maddr, 0)
        entry.deadline = self.gateway.now + 600
        assert outcome == packet(protocol, entry.maddr, outside)

    @rule(protocol=PROTOCOLS, outside=SERVERS, maddr=MADDRS)
    def from_outside(self, protocol: int, outside: str, maddr: str) -> None:
        came = packet(protocol, outside, maddr)
        received = self.gateway.into(came)
        inside = self.holder(protocol, maddr, outside)
        if inside is None:
            assert received is came
            return
        entry = self.entries[protocol, inside, outside]
        entry.replied, entry.deadline = True, self.gateway.now + 600
        assert received == packet(protocol, outside, inside)

    @rule(seconds=st.sampled_from([1, 250, 601]))
    def time_passes(self, seconds: int) -> None:
        self.gateway.passes(seconds)
        now = self.gateway.now
        self.entries = {key: entry for key, entry in self.entries.items() if entry.deadline > now}

    @invariant()
    def the_tables_say_the_same(self) -> None:
        entries = {
            (ms.protocol, ms.saddr, ms.daddr): (ms.maddr, ms.timer)
            for ms in self.gateway.sessions.entries()
        }
        assert entries == {
            (protocol, number(inside), number(outside)): (number(entry.maddr), entry.deadline)
            for (protocol, inside, outside), entry in self.entries.items()
        }
        assert self.gateway.errors == ({"no_port": self.refused} if self.refused else {})

    def teardown(self) -> None:
        self.gateway.passes(10_000)
        tables = self.gateway.sessions.tables
        assert not any([*tables.in_index.values(), *tables.out_index.values()])
        assert not tables.m_table.heads
        assert not tables.s_table.heads


TestByAddress = ByAddress.TestCase
TestByAddress.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
