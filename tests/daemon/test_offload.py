"""What a host leaves to its network card is done, or handed on, as the card or the kernel needs it.

A packet is built with its checksum, which is then taken out, as a host does that leaves it to its
card. The slow sums of `tests/packets.py` are the measure.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfmasq.daemon import nfnetlink
from nfmasq.daemon.conntrack import Conntrack
from nfmasq.daemon.netfilter import FORWARD, HAIRPIN_MARK, OUTPUT, PREROUTING
from nfmasq.daemon.nfnetlink import CHECKSUM_MISSING, MOST_COPIED, SUPERPACKET
from nfmasq.daemon.verdicts import ENOUGH, MOST, Verdicts
from nfmasq.engine import Masquerade
from nfmasq.engine.wire.checksum import UnknownChecksum, ones_sum, with_checksum, without_checksum
from tests.daemon.test_daemon import MADDR, Gateway
from tests.gateway import masquerade_with
from tests.packets import (
    ACK,
    SYN,
    Endpoint,
    dotted,
    fragmentable,
    header_length,
    identification,
    internet_checksum,
    ip,
    source,
    tcp,
    transport_checksum_is_right,
    udp,
)

INSIDE: Endpoint = ("10.77.0.2", 5000)
SERVER: Endpoint = ("198.51.100.7", 443)

ENDPOINTS = st.tuples(st.integers(1, 0xFFFFFFFE).map(dotted), st.integers(1, 65535))
PAYLOADS = st.binary(max_size=41) | st.builds(
    lambda seed, size: (seed * (size // len(seed) + 1))[:size],
    st.binary(min_size=1, max_size=7),
    st.integers(1000, 65000),
)
IP_OPTIONS = st.sampled_from([b"", b"\x94\x04\x00\x00", b"\x01" * 40])


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    """Draw a TCP or UDP packet with its checksums."""
    ends = draw(ENDPOINTS), draw(ENDPOINTS)
    payload, options = draw(PAYLOADS), draw(IP_OPTIONS)
    if draw(st.booleans()):
        return tcp(*ends, payload=payload, options=options)
    return udp(*ends, payload=payload, options=options)


def field(packet: bytes) -> int:
    at = header_length(packet) + (16 if packet[9] == 6 else 6)
    return int.from_bytes(packet[at : at + 2], "big")


# -- the checksum -----------------------------------------------------------------


@given(packets())
def test_the_sum_is_that_of_the_words(packet: bytes) -> None:
    assert ones_sum(packet) == (0xFFFF - internet_checksum(packet)) % 0xFFFF


@given(packets())
def test_what_was_left_to_the_card_is_what_the_host_would_have_written(packet: bytes) -> None:
    assert with_checksum(without_checksum(packet)) == packet


@given(packets())
def test_the_sum_of_the_pseudo_header_is_left_in_the_field(packet: bytes) -> None:
    length = len(packet) - header_length(packet)
    pseudo_header = packet[12:20] + struct.pack("!HH", packet[9], length)
    assert field(without_checksum(packet)) == 0xFFFF - internet_checksum(pseudo_header)


def test_a_udp_checksum_that_comes_out_as_0_is_written_as_all_ones() -> None:
    packet = udp(INSIDE, SERVER, bytes(2))
    rest = internet_checksum(packet[12:20] + struct.pack("!HH", 17, 10) + packet[20:26] + bytes(4))
    packet = packet[:28] + rest.to_bytes(2, "big")
    assert field(with_checksum(without_checksum(packet))) == 0xFFFF


@given(st.binary(max_size=60), st.sampled_from([6, 17]))
def test_what_has_no_room_for_a_checksum_is_left_as_it_is(packet: bytes, protocol: int) -> None:
    packet = packet[:9] + bytes([protocol]) + packet[10:]
    summed = with_checksum(packet)
    assert len(summed) == len(packet)
    if len(packet) < 20:
        assert summed is packet


@pytest.mark.parametrize("protocol", [1, 4, 47, 132, 136])
def test_the_checksum_of_another_protocol_is_not_known(protocol: int) -> None:
    with pytest.raises(UnknownChecksum):
        with_checksum(ip(INSIDE[0], SERVER[0], protocol, bytes(40)))


@pytest.mark.parametrize("fast", [True, False])
@given(packet=packets())
def test_a_packet_without_its_checksum_is_rewritten_like_one_with_it(
    packet: bytes, fast: bool
) -> None:
    with_it, without_it = Masquerade(fast=fast), Masquerade(fast=fast)
    for now in (1.0, 2.0, 3.0):
        sent = with_it.ip_fw_masquerade(packet, MADDR, now)
        assert sent == without_it.ip_fw_masquerade(without_checksum(packet), MADDR, now, True)
        if sent is None:  # no answer to, say, a packet with a record of its route
            return
        assert transport_checksum_is_right(sent)
        build = tcp if packet[9] == 6 else udp
        there = (
            socket.inet_ntoa(packet[16:20]),
            int.from_bytes(packet[header_length(packet) + 2 :][:2], "big"),
        )
        answer = build(there, source(sent), payload=b"answer")
        back = with_it.ip_fw_demasquerade(answer, now)
        assert back == without_it.ip_fw_demasquerade(without_checksum(answer), now, True)
        assert back is not None
        assert transport_checksum_is_right(back)


def test_what_is_not_ours_stays_without_its_checksum() -> None:
    packet = without_checksum(udp(SERVER, (dotted(MADDR), 61000)))
    assert Masquerade().ip_fw_demasquerade(packet, 1.0, True) is packet


# -- what the kernel says of a packet ---------------------------------------------

ATTRIBUTES = st.lists(
    st.tuples(
        st.sampled_from([1, 3, 4, 5, 6, 7, 9, 11, 13, 19, 20]), st.binary(min_size=1, max_size=20)
    ),
    max_size=8,
)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value


def padded(attribute: bytes) -> bytes:
    return attribute + bytes(-len(attribute) % 4)


@given(ATTRIBUTES, ATTRIBUTES, st.none() | st.integers(0, 7), st.binary(min_size=1), st.booleans())
def test_what_the_kernel_says_of_a_packet_is_found(
    before: list[tuple[int, bytes]],
    between: list[tuple[int, bytes]],
    info: int | None,
    payload: bytes,
    at_the_end: bool,
) -> None:
    """It stands right before the packet, where the kernel puts it, or elsewhere, or is missing."""
    said = [] if info is None else [(14, struct.pack("!I", info))]
    attributes = [*before, *between, *said] if at_the_end else [*before, *said, *between]
    head = bytes(20) + b"".join(padded(attribute(*each)) for each in attributes)
    message = head + attribute(10, payload)
    assert nfnetlink.skb_info(message, len(payload)) == (info or 0) & 3


def test_what_only_looks_like_a_word_of_the_kernel_is_passed_over() -> None:
    """A hardware address of the inside and a payload look like a word of the kernel."""
    looks_so = attribute(14, struct.pack("!I", 3))
    message = bytes(20) + attribute(9, b"\0\6\0\0" + looks_so + bytes(4)) + attribute(10, looks_so)
    assert nfnetlink.skb_info(message, len(looks_so)) == 0


# -- verdicts ---------------------------------------------------------------------


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield our end and the kernel's end of a channel that keeps messages apart as netlink does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def messages(sent: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield the messages of one call: kind, queue, attributes."""
    while sent:
        length, kind, flags, _, _ = struct.unpack_from("=IHHII", sent)
        assert kind >> 8 == 3  # of NFQUEUE
        assert flags == 1  # a request that is not acknowledged
        yield kind & 0xFF, int.from_bytes(sent[18:20], "big"), sent[20:length]
        sent = sent[(length + 3) & ~3 :]


def verdict(attributes: bytes) -> tuple[int, int, bytes]:
    """Return the verdict, the packet's number, and the bytes that take the packet's place."""
    length, kind, number, packet_id = struct.unpack("!HHII", attributes[:12])
    assert attributes[:4] == struct.pack("=HH", 12, 2), (length, kind)
    if not attributes[12:]:
        return number, packet_id, b""
    length, kind = struct.unpack_from("=HH", attributes, 12)
    assert (length, kind) == (len(attributes) - 12, 10)
    return number, packet_id, attributes[16:]


@given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.none() | st.binary(max_size=9)),
        min_size=1,
        max_size=20,
    )
)
def test_many_verdicts_are_sent_at_once(decided: list[tuple[int, bytes | None]]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        verdicts = Verdicts(ours, 7)
        for packet, sent in decided:
            if sent is None:
                verdicts.drop(packet)
            elif sent:
                verdicts.replace(packet, sent)
            else:
                verdicts.accept(packet)
        verdicts.send()
        told = list(messages(theirs.recv(1 << 16)))
    assert {(kind, queue) for kind, queue, _ in told} == {(1, 7)}
    assert [verdict(attributes) for _, _, attributes in told] == [
        (0 if sent is None else 1, packet, sent or b"") for packet, sent in decided
    ]


def test_nothing_is_sent_where_nothing_waits(wire: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = wire
    verdicts = Verdicts(ours, 0)
    verdicts.accept(1)
    verdicts.send()
    assert theirs.recv(1 << 16)
    assert not verdicts.waiting
    verdicts.send()
    with pytest.raises(BlockingIOError):
        theirs.recv(1 << 16)


@pytest.mark.parametrize("size", [40, 1500, MOST_COPIED])
def test_verdicts_that_wait_are_enough_before_a_call_gets_too_long(
    wire: tuple[socket.socket, socket.socket], size: int
) -> None:
    ours, theirs = wire
    verdicts = Verdicts(ours, 0)
    packets = 0
    while verdicts.load < ENOUGH:
        verdicts.replace(packets, bytes(size))
        packets += 1
    verdicts.send()
    assert verdicts.load == 0
    sent = theirs.recv(1 << 20)
    assert len(list(messages(sent))) == packets <= 96
    assert len(sent) <= MOST


def test_the_kernel_cuts_a_superpacket_for_a_queue_that_asks_for_none(
    wire: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = wire
    verdicts = Verdicts(ours, 7)
    verdicts.cut(5)
    verdicts.send()
    off, queue_again, on = messages(theirs.recv(1 << 16))
    gso = struct.pack("!I", 4)
    assert off == (2, 7, attribute(5, bytes(4)) + attribute(4, gso))
    assert on == (2, 7, attribute(5, gso) + attribute(4, gso))
    assert queue_again[:2] == (1, 7)
    assert verdict(queue_again[2]) == (7 << 16 | 3, 5, b"")


# -- the handler ------------------------------------------------------------------

MISSING = CHECKSUM_MISSING | SUPERPACKET


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


def from_the_outside(gateway: Gateway, inside: bytes, payload: bytes) -> bytes:
    """Send a packet from the inside; returns an answer to it, with a payload."""
    sent = gateway.through(FORWARD, inside)
    assert isinstance(sent, bytes)
    return (tcp if inside[9] == 6 else udp)(SERVER, source(sent), payload=payload)


@pytest.mark.parametrize("build", [tcp, udp])
def test_a_single_packet_leaves_with_its_checksum(
    gateway: Gateway, build: Callable[..., bytes]
) -> None:
    packet = build(INSIDE, SERVER, payload=b"odd")
    for _ in range(3):
        sent = gateway.through(FORWARD, without_checksum(packet), CHECKSUM_MISSING)
        assert isinstance(sent, bytes)
        assert source(sent)[0] == dotted(MADDR)
        assert transport_checksum_is_right(sent)


@pytest.mark.parametrize("hook", [FORWARD, PREROUTING])
def test_a_superpacket_over_udp_leaves_with_the_sum_of_the_pseudo_header(
    gateway: Gateway, hook: int
) -> None:
    inside = udp(INSIDE, SERVER, bytes(9000))
    packet = inside if hook == FORWARD else from_the_outside(gateway, inside, bytes(9000))
    for _ in range(3):
        sent = gateway.through(hook, without_checksum(packet), MISSING)
        assert isinstance(sent, bytes)
        assert sent == without_checksum(sent)
        assert transport_checksum_is_right(with_checksum(sent))


@pytest.mark.parametrize("hook", [FORWARD, PREROUTING])
def test_a_superpacket_takes_identifications_for_all_its_segments(
    gateway: Gateway, hook: int
) -> None:
    """The second step of a hairpin takes them, too, since its receiver sees many hosts as one."""
    gateway.engine = masquerade_with(filtering="endpoint-independent")
    gateway.renew()
    known = gateway.through(FORWARD, udp(INSIDE, SERVER))
    assert isinstance(known, bytes)
    outgoing = [FORWARD] if hook == FORWARD else [PREROUTING, FORWARD]
    mark = 0 if hook == FORWARD else HAIRPIN_MARK
    to = SERVER if hook == FORWARD else source(known)
    seen = []
    for _ in range(2):
        sent: bytes | str | None = fragmentable(udp(INSIDE, to, bytes(9000)))
        for step in outgoing:
            assert isinstance(sent, bytes)
            sent = gateway.through(step, without_checksum(sent), MISSING, mark=mark)
        assert isinstance(sent, bytes)
        seen.append(identification(sent))
    assert (seen[1] - seen[0]) % 65536 >= 9000 // 1460


def test_a_superpacket_has_its_checksum_where_it_is_verified(gateway: Gateway) -> None:
    gateway.verifies = True
    gateway.through(FORWARD, tcp(INSIDE, SERVER, SYN))
    packet = from_the_outside(gateway, tcp(INSIDE, SERVER, ACK), bytes(9000))
    for _ in range(3):
        sent = gateway.through(PREROUTING, without_checksum(packet), MISSING)
        assert isinstance(sent, bytes)
        assert transport_checksum_is_right(sent)


@pytest.mark.parametrize("hook", [FORWARD, PREROUTING])
@pytest.mark.parametrize("info", [CHECKSUM_MISSING, MISSING])
@pytest.mark.parametrize("protocol", [47, 132], ids=["gre", "sctp"])
def test_of_another_protocol_the_kernel_finishes_what_was_left_to_a_card(
    gateway: Gateway, protocol: int, info: int, hook: int
) -> None:
    src, dst = (INSIDE[0], SERVER[0]) if hook == FORWARD else (SERVER[0], dotted(MADDR))
    before = gateway.counted()
    packet = ip(src, dst, protocol, bytes(3000))
    assert gateway.through(hook, packet, info) == "to be cut"
    assert gateway.counted() == before


@pytest.mark.parametrize("verified", [False, True])
@pytest.mark.parametrize("hook", [FORWARD, PREROUTING])
@pytest.mark.parametrize("build", [tcp, udp])
@pytest.mark.parametrize(
    ("info", "size"), [(MISSING, 9000), (MISSING, MOST_COPIED), (SUPERPACKET, 9000)]
)
def test_which_superpackets_are_cut_first(
    gateway: Gateway, build: Callable[..., bytes], hook: int, info: int, size: int, verified: bool
) -> None:
    packet = build(INSIDE, SERVER)
    if hook == PREROUTING:
        packet = from_the_outside(gateway, packet, b"")
    packet += bytes(size - len(packet))
    gateway.verifies = verified
    before = gateway.counted()
    cut = gateway.through(hook, packet, info) == "to be cut"
    over_udp_and_verified = build is udp and hook == PREROUTING and verified
    assert cut == (size == MOST_COPIED or info == SUPERPACKET or over_udp_and_verified)
    assert gateway.counted() == before + (not cut)


@pytest.mark.parametrize("build", [tcp, udp])
def test_a_superpacket_takes_both_steps_of_a_hairpin_in_one_piece(
    gateway: Gateway, build: Callable[..., bytes]
) -> None:
    """After the first step the kernel no longer says that the checksum is missing."""
    gateway.engine = masquerade_with(filtering="endpoint-independent")
    gateway.renew()
    known = gateway.through(FORWARD, build(INSIDE, SERVER))
    assert isinstance(known, bytes)
    mapped = source(known)
    opening = tcp(INSIDE, mapped, SYN) if build is tcp else udp(INSIDE, mapped)
    assert isinstance(gateway.through(PREROUTING, opening, mark=HAIRPIN_MARK), bytes)

    packet = build(INSIDE, mapped, payload=bytes(range(250)) * 40)
    between = gateway.through(PREROUTING, without_checksum(packet), MISSING, mark=HAIRPIN_MARK)
    assert isinstance(between, bytes)
    arrived = gateway.through(FORWARD, between, SUPERPACKET, mark=HAIRPIN_MARK)
    assert isinstance(arrived, bytes)
    # Over UDP the kernel goes by the sum of the pseudo header; over TCP it makes the sum itself.
    expected = without_checksum(build(mapped, INSIDE, payload=bytes(range(250)) * 40))
    assert (arrived if build is udp else without_checksum(arrived)) == expected


def test_what_the_gateway_sends_itself_is_no_affair_of_a_card(gateway: Gateway) -> None:
    packet = udp((dotted(MADDR), 9), SERVER)
    assert gateway.through(OUTPUT, packet, CHECKSUM_MISSING) is packet


# -- connection tracking ----------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "checksum", "verifies"),
    [("0", "1", False), ("0", "0", False), ("1", "0", False), ("1", "1", True), ("10", "1", True)],
)
def test_connection_tracking_verifies_where_it_tracks(
    tmp_path: Path, count: str, checksum: str, verifies: bool
) -> None:
    (tmp_path / "nf_conntrack_count").write_text(f"{count}\n")
    (tmp_path / "nf_conntrack_checksum").write_text(f"{checksum}\n")
    conntrack = Conntrack(tmp_path)
    assert conntrack.verifies() is verifies
    (tmp_path / "nf_conntrack_count").write_text("0\n")
    assert conntrack.verifies() is False
    conntrack.close()


def test_connection_tracking_may_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("nfmasq.daemon.conntrack.monotonic", lambda: now)
    conntrack = Conntrack(tmp_path)
    assert not conntrack.verifies()
    for name in ("nf_conntrack_count", "nf_conntrack_checksum"):
        (tmp_path / name).write_text("1\n")
    assert not conntrack.verifies()  # not looked for again so soon
    now += 1
    assert conntrack.verifies()
    conntrack.close()
