"""The programs rewrite just the packets that they may, as the engine's plain way does, to the byte.

They are run by the kernel on single packets (BPF_PROG_TEST_RUN). What the kernel runs begins with
an Ethernet header; its type is read at the bytes 12 and 13. The programs for interfaces without
Ethernet headers find the IP header there, so their packets come from 8.0.0.0/16: in this place are
the first two bytes of the source then, which say IPv4.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from socket import if_nametoindex, inet_aton

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfmasq.engine import TCP, UDP, IpMasq
from nfmasq.engine.cached import UNUSED
from nfmasq.engine.table.entry import CACHED_IN
from nfmasq.flowcache.flows import Flows
from nfmasq.flowcache.marks import KNOWN_MARK
from nfmasq.flowcache.programs import ETHERNET, INSIDE, OUTSIDE, Counts, Programs
from tests.engine.carrier import needs_a_rewrite_alone, told_of
from tests.flowcache.trial import (
    DROP,
    HEADER,
    LO,
    PASS,
    REDIRECT,
    Tried,
    attempt,
    known,
)
from tests.gateway import Gateway
from tests.packets import (
    ACK,
    FIN,
    MORE_FRAGMENTS,
    PSH,
    RST,
    SYN,
    URG,
    Endpoint,
    dotted,
    fragmentable,
    fragments,
    header_checksum_is_right,
    icmp,
    identification,
    ip,
    number,
    source_address,
    tcp,
    udp,
    with_checksum,
    with_data_offset,
    with_header,
    with_options,
    with_udp_length,
)
from tests.traffic.tunnels import open_tun

INSIDE_INTERFACE, OTHER_INTERFACE = 5, 6
"""Numbers of interfaces: on the inside, and of neither side."""

NO_OPERATION = b"\x01"

COARSE = 0.02
"""Seconds by which the clock that the programs read may be behind."""

# The programs and their maps are the same for all examples, which leave nothing there.
examples = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

octets = st.integers(0, 255)
ports = st.integers(1, 65535)
checksums = st.sampled_from((0, 1, 0x1234, 0xFFFE, 0xFFFF)) | st.integers(0, 0xFFFF)
flag_bytes = st.sampled_from(
    (ACK, ACK, ACK, PSH | ACK, URG | ACK, SYN, SYN | ACK, FIN | ACK, RST, RST | ACK, FIN, PSH, 0)
)
payloads = st.binary(max_size=60) | st.builds(
    lambda piece, length: (piece * length)[:length],
    st.binary(min_size=1, max_size=40),
    st.integers(1300, 1500),
)


def addresses(first: st.SearchStrategy[int], bare: bool) -> st.SearchStrategy[str]:
    """Draw addresses; `bare` those that say IPv4 where there is no Ethernet header."""
    beginning = st.just("8.0") if bare else st.builds("{}.{}".format, first, octets)
    return st.builds("{}.{}.{}".format, beginning, octets, st.integers(1, 254))


Session = tuple[int, Endpoint, str, Endpoint]
"""A protocol, an inside endpoint, a masquerade address and an outside endpoint."""


@st.composite
def sessions(draw: st.DrawFn, bare: bool = False) -> Session:
    inside = draw(addresses(st.sampled_from((10, 172, 192)), bare))
    outside = draw(addresses(st.integers(20, 100), bare).filter(lambda it: it != inside))
    maddr = draw(addresses(st.integers(110, 126), False))
    return (
        draw(st.sampled_from((TCP, UDP))),
        (inside, draw(ports)),
        maddr,
        (outside, draw(ports.filter(lambda port: port != 53))),
    )


@st.composite
def packets(draw: st.DrawFn, protocol: int, src: Endpoint, dst: Endpoint, bare: bool) -> bytes:
    """Draw a packet: one in two needs a rewrite alone, the others are odd or say something.

    The kernel tries no frame that is shorter than an Ethernet header and an IP header.
    """
    payload = draw(payloads) + bytes(6 * bare)
    options = draw(st.sampled_from((b"",) * 12 + (4 * NO_OPERATION, 40 * NO_OPERATION)))
    if protocol == UDP:
        packet = udp(src, dst, payload)
        lie = draw(st.sampled_from((0,) * 12 + (-8, -1, 1, 2000)))
        packet = with_udp_length(packet, max(0, 8 + len(payload) + lie))
    else:
        words = draw(st.sampled_from((5,) * 12 + (0, 4, 6, 15)))
        packet = with_data_offset(tcp(src, dst, draw(flag_bytes), payload), words)
    if draw(st.booleans()):
        packet = with_checksum(packet, draw(checksums))
    if draw(st.booleans()):
        packet = fragmentable(packet)
    if options:
        packet = with_options(packet, options)
    odd = draw(st.sampled_from((None,) * 12 + ("more", "offset", "version", "long", "short")))
    if odd in ("more", "offset"):
        packet = with_header(packet, fragment=MORE_FRAGMENTS if odd == "more" else 1)
    elif odd == "version":
        packet = with_header(packet, version=6)
    elif odd in ("long", "short"):
        lie = draw(st.integers(1, 30))
        packet = with_header(packet, total_length=len(packet) + (lie if odd == "long" else -lie))
    return packet


def source_of(session: Session) -> tuple[Endpoint, Endpoint]:
    """Return from where to where a session's packets go when they come from the inside."""
    return session[1], session[3]


def answer_of(session: Session) -> tuple[Endpoint, Endpoint]:
    """Return from where to where a session's packets go when they come from the outside.

    The first session of a masquerade has its first port.
    """
    return session[3], (session[2], 61000)


@st.composite
def trials(draw: st.DrawFn, outward: bool, bare: bool) -> tuple[Session, bytes]:
    """Draw a session, and a packet from its endpoint inside, or outside."""
    session = draw(sessions(bare))
    ends = source_of(session) if outward else answer_of(session)
    return session, draw(packets(session[0], *ends, bare))


def run_ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True)


@pytest.fixture(scope="module")
def kernel(namespace: None) -> Iterator[Programs]:
    """Load the programs once for all examples; all ways lead out by lo."""
    for line in ("link set lo up", "route add default dev lo metric 9"):
        run_ip(line)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    programs = Programs(16)
    programs.set_interface(INSIDE_INTERFACE, INSIDE | ETHERNET)
    yield programs
    programs.close()


def change(programs: Programs, before: Counts) -> Counts:
    """Return what the programs have counted since."""
    return Counts(*(now - then for now, then in zip(programs.counts(), before, strict=True)))


def whole(packet: bytes) -> bytes:
    """Return a packet without what stands behind its end: a frame may be filled up."""
    return packet[: int.from_bytes(packet[2:4], "big")]


def is_renewed(sent: bytes, expected: bytes) -> bool:
    """Say whether a packet that may be fragmented is as expected, with an identification of ours.

    In it the cache and the masquerade differ, so that they never give the same.
    """
    same = sent[:4] + sent[6:10] + sent[12:] == expected[:4] + expected[6:10] + expected[12:]
    return same and identification(sent) % 2 == 1 and header_checksum_is_right(sent)


# -- routed: what is known -------------------------------------------------------------


@pytest.mark.parametrize("link", ["ether", "bare"])
@examples
@given(st.data())
def test_what_leaves_is_as_the_plain_way_sends_it(
    kernel: Programs, link: str, data: st.DataObject
) -> None:
    session, packet = data.draw(trials(outward=True, bare=link == "bare"))
    header = HEADER if link == "ether" else b""
    before = kernel.counts()
    with known(kernel, *session) as (gateway, flows, ms):
        earliest = time.monotonic()
        seen = attempt(kernel, f"leaving_{link}", header + packet, mark=KNOWN_MARK | 7, came_by=9)
        usage, counted = flows.usage(ms), change(kernel, before)
        if not needs_a_rewrite_alone(whole(packet)):
            assert seen == Tried(DROP, header + packet, 7)
            assert (usage.packets_out, usage.bytes_out, usage.last_out) == (0, 0, 0)
            assert counted == Counts(dropped=1)
            return
        expected = gateway.out(whole(packet))
        assert expected is not None
        assert usage.told_out == told_of(ms, True)
        sent = seen.frame[len(header) :]
        assert (seen.verdict, seen.mark) == (PASS, 7)
        assert seen.frame == header + sent
        assert sent[len(expected) :] == packet[len(expected) :]
        if packet[6] & 0x40:
            assert whole(sent) == expected
        else:
            assert is_renewed(whole(sent), expected)
        assert usage[:2] == (1, len(expected))
        assert earliest - COARSE <= usage.last_out <= time.monotonic()
        assert counted == Counts(packets_out=1, bytes_out=len(expected))


@pytest.mark.parametrize("link", ["ether", "bare"])
@examples
@given(st.data())
def test_what_comes_in_is_as_the_plain_way_sends_it(
    kernel: Programs, link: str, data: st.DataObject
) -> None:
    session, packet = data.draw(trials(outward=False, bare=link == "bare"))
    header = HEADER if link == "ether" else b""
    before = kernel.counts()
    with known(kernel, *session) as (gateway, flows, ms):
        earliest = time.monotonic()
        seen = attempt(kernel, f"outside_{link}", header + packet, mark=7)
        usage, counted = flows.usage(ms), change(kernel, before)
        if not needs_a_rewrite_alone(whole(packet)):
            assert seen == Tried(PASS, header + packet, 7)
            assert (usage[:6], counted) == (UNUSED[:6], Counts())
            return
        expected = gateway.into(whole(packet))
        assert expected is not None
        assert usage.told_in == told_of(ms, False)
        filled = header + expected + packet[len(expected) :]
        assert seen == Tried(PASS, filled, KNOWN_MARK | 7)
        assert usage[3:5] == (1, len(expected))
        assert earliest - COARSE <= usage.last_in <= time.monotonic()
        assert counted == Counts(packets_in=1, bytes_in=len(expected))


@pytest.mark.parametrize("link", ["ether", "bare"])
@examples
@given(st.data())
def test_what_comes_from_the_inside_is_marked_where_its_flow_is_known(
    kernel: Programs, link: str, data: st.DataObject
) -> None:
    session, packet = data.draw(trials(outward=True, bare=link == "bare"))
    frame = (HEADER if link == "ether" else b"") + packet
    before = kernel.counts()
    with known(kernel, *session) as (_, flows, ms):
        mark = KNOWN_MARK if needs_a_rewrite_alone(whole(packet)) else 0
        assert attempt(kernel, f"inside_{link}", frame, mark=7) == Tried(PASS, frame, mark | 7)
        assert flows.usage(ms)[:6] == UNUSED[:6]
    assert attempt(kernel, f"inside_{link}", frame, mark=7) == Tried(PASS, frame, 7)
    assert change(kernel, before) == Counts()


@examples
@given(sessions(), st.integers(0, 4), st.integers(1, 65534))
def test_what_differs_in_any_of_the_five_values_is_not_known(
    kernel: Programs, session: Session, which: int, by: int
) -> None:
    protocol = session[0]
    kernel.add_maddr(number("192.0.2.1"))

    def altered(ends: tuple[Endpoint, Endpoint]) -> bytes:
        values = [number(ends[0][0]), ends[0][1], number(ends[1][0]), ends[1][1], protocol]
        if which == 4:
            values[4] = TCP + UDP - protocol
        else:
            values[which] = (values[which] + by) % (2**32 if which in (0, 2) else 65536)
        make = tcp if values[4] == TCP else udp
        return make((dotted(values[0]), values[1]), (dotted(values[2]), values[3]))

    out, into = (HEADER + altered(ends) for ends in (source_of(session), answer_of(session)))
    with known(kernel, *session):
        assert attempt(kernel, "inside_ether", out) == Tried(PASS, out, 0)
        assert attempt(kernel, "outside_ether", into) == Tried(PASS, into, 0)
        assert attempt(kernel, "leaving_ether", out, mark=KNOWN_MARK, came_by=9).verdict == DROP


@examples
@given(sessions(), st.integers(34, 53), st.booleans())
def test_a_packet_that_is_cut_is_not_known(
    kernel: Programs, session: Session, length: int, outward: bool
) -> None:
    make = tcp if session[0] == TCP else udp
    packet = make(*(source_of(session) if outward else answer_of(session)))
    frame = (HEADER + packet)[:length]
    cut = frame != HEADER + packet
    with known(kernel, *session):
        if outward:
            seen = attempt(kernel, "inside_ether", frame)
        else:
            seen = attempt(kernel, "outside_ether", frame)
    assert (seen.mark == 0) == cut
    assert (seen.frame == frame) == (cut or outward)


@pytest.mark.parametrize(
    "program", ["inside_ether", "outside_ether", "inside_direct", "outside_direct"]
)
@pytest.mark.parametrize("what", ["ipv6", "vlan", "icmp", "arp", "other protocol"])
def test_what_is_no_tcp_or_udp_over_ipv4_passes_untouched(
    kernel: Programs, program: str, what: str
) -> None:
    session: Session = (UDP, ("10.0.0.2", 4000), "203.0.113.1", ("198.51.100.7", 443))
    ends = answer_of(session) if program.startswith("outside") else source_of(session)
    packet = udp(*ends, b"what may look like anything")
    frames = {
        "ipv6": HEADER[:12] + b"\x86\xdd" + packet,
        "vlan": HEADER[:12] + b"\x81\x00\x00\x07\x08\x00" + packet,
        "icmp": HEADER + icmp(ends[0][0], ends[1][0], 8, 0, packet[20:]),
        "arp": HEADER[:12] + b"\x08\x06" + packet,
        "other protocol": HEADER + ip(ends[0][0], ends[1][0], 136, packet[20:]),
    }
    with known(kernel, *session):
        assert attempt(kernel, program, frames[what], mark=7) == Tried(PASS, frames[what], 7)


# -- routed: the guard -----------------------------------------------------------------


@examples
@given(
    trials(outward=True, bare=False),
    st.booleans(),
    st.sampled_from((0, INSIDE_INTERFACE, OTHER_INTERFACE)),
    st.sampled_from(("known", "unknown", "masqueraded")),
)
def test_nothing_leaves_with_an_inside_source(
    kernel: Programs, trial: tuple[Session, bytes], marked: bool, came_by: int, what: str
) -> None:
    """What the gateway itself sends, and what comes from elsewhere unmarked, is not looked at."""
    session, packet = trial
    if what == "masqueraded":
        packet = packet[:12] + inet_aton("192.0.2.1") + packet[16:]
        kernel.add_maddr(number("192.0.2.1"))
    mark = 7 | KNOWN_MARK * marked
    frame, before = HEADER + packet, kernel.counts()

    def leaves() -> Tried:
        return attempt(kernel, "leaving_ether", frame, mark=mark, came_by=came_by)

    if what == "known":
        with known(kernel, *session):
            seen = leaves()
    else:
        seen = leaves()
    looked_at = came_by == INSIDE_INTERFACE or (marked and came_by)
    rewritten = what == "known" and needs_a_rewrite_alone(whole(packet))
    if not looked_at:
        assert seen == Tried(PASS, frame, mark)
    elif rewritten:
        assert seen.verdict == PASS
        assert source_address(seen.frame[14:]) == session[2]
    else:
        assert seen == Tried(PASS if what == "masqueraded" else DROP, frame, 7)
    dropped = bool(looked_at) and not rewritten and what != "masqueraded"
    assert change(kernel, before).dropped == dropped


def test_what_leaves_by_another_interface_is_dropped_once(kernel: Programs) -> None:
    """Then its packets go to nfmasq, until it has the flow go the new way."""
    session: Session = (UDP, ("10.0.0.2", 4000), "203.0.113.1", ("198.51.100.7", 443))
    frame = HEADER + udp(*source_of(session))
    with known(kernel, *session) as (_, flows, ms):
        assert attempt(kernel, "leaving_ether", frame, mark=KNOWN_MARK, came_by=9).verdict == PASS
        assert attempt(kernel, "inside_ether", frame).mark == KNOWN_MARK
        elsewhere = Flows(kernel, {LO, OTHER_INTERFACE})
        ms.flags &= ~CACHED_IN
        flows.drop(ms)
        assert elsewhere.put(ms, True, OTHER_INTERFACE)
        before = kernel.counts()
        seen = attempt(kernel, "leaving_ether", frame, mark=KNOWN_MARK, came_by=9)
        assert seen == Tried(DROP, frame, 0)
        assert change(kernel, before) == Counts(dropped=1)
        assert attempt(kernel, "inside_ether", frame).mark == 0
        assert elsewhere.put(ms, True, LO)
        assert attempt(kernel, "inside_ether", frame).mark == KNOWN_MARK
        assert attempt(kernel, "leaving_ether", frame, mark=KNOWN_MARK, came_by=9).verdict == PASS
        ms.flags |= CACHED_IN


def test_what_a_flow_has_done_stays_with_it_when_it_goes_another_way(kernel: Programs) -> None:
    session: Session = (UDP, ("10.0.0.2", 4000), "203.0.113.1", ("198.51.100.7", 443))
    frame = HEADER + udp(*source_of(session))
    with known(kernel, *session) as (_, _, ms):
        flows = Flows(kernel, {LO, OTHER_INTERFACE})
        attempt(kernel, "leaving_ether", frame, mark=KNOWN_MARK, came_by=9)
        usage = flows.usage(ms)
        assert usage.packets_out == 1
        assert flows.put(ms, True, OTHER_INTERFACE)
        assert flows.usage(ms) == usage


# -- routed: what is too large ---------------------------------------------------------

NARROW = 600
"""The MTU of the way out, in bytes."""


@pytest.fixture(scope="module")
def ways_out(namespace: None) -> Iterator[dict[str, int]]:
    """Make an interface of each kind, narrow; yields their indices."""
    tun = open_tun("narrow-bare")
    run_ip("link add narrow-ether type veth peer name other-end")
    run_ip("link set other-end up")
    for name in ("narrow-ether", "narrow-bare"):
        run_ip(f"link set {name} mtu {NARROW} up")
    yield {kind: if_nametoindex(f"narrow-{kind}") for kind in ("ether", "bare")}
    run_ip("link delete narrow-ether")
    os.close(tun)


@contextmanager
def leaving_by(
    kernel: Programs, session: Session, interface: int, way: str = ""
) -> Iterator[Callable[[], object]]:
    """Have the programs know a session that leaves by an interface, in this direction alone.

    The route to its outside end leads `way`, to an interface by its name, if that is given. Yields
    a function that puts the session anew.
    """
    route = f"{session[3][0]}/32 dev {way}"
    with known(kernel, *session) as (_, flows, ms):
        flows.drop(ms)
        ms.flags &= ~CACHED_IN
        leaving = Flows(kernel, {interface})
        assert leaving.put(ms, True, interface)
        if way:
            run_ip(f"route add {route}")
        yield lambda: leaving.put(ms, True, interface)
        if way:
            run_ip(f"route delete {route}")


@pytest.mark.parametrize("segments", [0, 2], ids=["packet", "superpacket"])
@pytest.mark.parametrize("out", ["ether", "bare"])
@pytest.mark.parametrize("link", ["ether", "bare"])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_packet_is_marked_unless_it_or_its_segments_are_larger_than_the_way_out(
    kernel: Programs, ways_out: dict[str, int], link: str, out: str, protocol: int, segments: int
) -> None:
    """Whether the ways in and out have Ethernet headers makes no difference."""
    session = protocol, ("8.0.0.2", 4000), "203.0.113.1", ("198.51.100.7", 443)
    make, headers = (tcp, 40) if protocol == TCP else (udp, 28)
    link_header = HEADER if link == "ether" else b""
    with leaving_by(kernel, session, ways_out[out], f"narrow-{out}") as put_anew:
        for length in range(NARROW - 20, NARROW + 21):
            put_anew()
            size = length - headers
            packet = make(*source_of(session), payload=bytes(size + bool(segments)))
            seen = attempt(
                kernel,
                f"inside_{link}",
                link_header + packet,
                segments=segments,
                segment_size=size if segments else 0,
            )
            assert (seen.mark == KNOWN_MARK) == (length <= NARROW), length


def test_the_options_of_tcp_are_a_part_of_each_segment(
    kernel: Programs, ways_out: dict[str, int]
) -> None:
    session = TCP, ("10.0.0.2", 4000), "203.0.113.1", ("198.51.100.7", 443)
    frame = HEADER + tcp(*source_of(session), payload=bytes(2000), tcp_options=bytes(12))
    with leaving_by(kernel, session, ways_out["ether"], "narrow-ether"):
        for size, mark in ((NARROW - 52, KNOWN_MARK), (NARROW - 51, 0)):
            seen = attempt(kernel, "inside_ether", frame, segments=4, segment_size=size)
            assert seen.mark == mark


def test_what_would_leave_by_an_interface_that_is_gone_is_not_marked(kernel: Programs) -> None:
    session = UDP, ("10.0.0.2", 4000), "203.0.113.1", ("198.51.100.7", 443)
    with leaving_by(kernel, session, 4711):
        assert attempt(kernel, "inside_ether", HEADER + udp(*source_of(session))).mark == 0


def test_a_superpacket_takes_a_number_for_each_of_its_packets(kernel: Programs) -> None:
    session: Session = (UDP, ("10.0.0.2", 4000), "203.0.113.1", ("198.51.100.7", 443))
    frame = HEADER + fragmentable(udp(*source_of(session), payload=bytes(900)))

    def number_of(segments: int) -> int:
        seen = attempt(
            kernel,
            "leaving_ether",
            frame,
            mark=KNOWN_MARK,
            came_by=9,
            segments=segments,
            segment_size=100 if segments else 0,
        )
        return identification(seen.frame[14:])

    with known(kernel, *session):
        numbers = [number_of(segments) for segments in (0, 9, 0, 0)]
    steps = [(b - a) % 65536 for a, b in pairwise(numbers)]
    assert steps == [2, 18, 2]


def test_the_maddrs_that_there_have_been_pass_the_guard(kernel: Programs) -> None:
    """However many there have been: what was rewritten a moment ago is on its way."""
    first = number("192.0.2.0")
    for maddr in range(first, first + 6000):
        kernel.add_maddr(maddr)
    for maddr in range(first, first + 6000, 7):
        frame = HEADER + udp((dotted(maddr), 61000), ("198.51.100.7", 443))
        assert attempt(kernel, "leaving_ether", frame, came_by=INSIDE_INTERFACE).verdict == PASS


@pytest.mark.parametrize("outward", [True, False], ids=["out", "in"])
def test_what_follows_a_fragment_goes_to_nfmasq_too_until_the_flow_is_put_anew(
    kernel: Programs, outward: bool
) -> None:
    """So it does not overtake the fragment. Only the first one tells of which flow it is."""
    session: Session = (UDP, ("10.0.0.2", 4000), "203.0.113.1", ("198.51.100.7", 443))
    ends = source_of(session) if outward else answer_of(session)
    program = "inside_ether" if outward else "outside_ether"
    packet = fragmentable(udp(*ends, payload=bytes(1000)))
    first, second = fragments(packet, 504)[:2]

    def is_known(packet: bytes) -> bool:
        return attempt(kernel, program, HEADER + packet).mark == KNOWN_MARK

    with known(kernel, *session) as (_, flows, ms):
        assert not is_known(second)
        assert is_known(packet)
        assert not is_known(first)
        assert not is_known(packet)
        assert flows.put(ms, outward, LO)
        assert is_known(packet)


def test_no_fragment_leaves_with_an_inside_source(kernel: Programs) -> None:
    """Only the first has ports."""
    session: Session = (UDP, ("10.0.0.2", 4000), "203.0.113.1", ("198.51.100.7", 443))
    packet = fragmentable(udp(*source_of(session), payload=bytes(1000)))
    first, second = fragments(packet, 504)[:2]
    with known(kernel, *session):
        for piece in (second, first):
            frame = HEADER + piece
            seen = attempt(kernel, "leaving_ether", frame, mark=KNOWN_MARK, came_by=9)
            assert seen == Tried(DROP, frame, 0)


# -- hosts that crowd the others ---------------------------------------------------------

PACE = 10_000


def passes(kernel: Programs, program: str, packet: bytes) -> bool:
    seen = attempt(kernel, program, HEADER + packet)
    assert seen.verdict in (PASS, DROP)
    return seen.verdict == PASS


@pytest.mark.parametrize(
    ("program", "host"), [("inside_ether", "10.0.0.76"), ("inside_direct", "10.0.0.77")]
)
def test_a_host_that_is_held_gets_no_more_to_nfmasq_than_its_pace(
    kernel: Programs, program: str, host: str
) -> None:
    other = "10.0.0.78"
    flood = tcp((host, 4000), ("198.51.100.7", 443), SYN)
    assert all(passes(kernel, program, flood) for _ in range(1000))
    before = kernel.counts()
    kernel.hold(number(host), PACE)
    begun = time.monotonic()
    passed = [passes(kernel, program, flood) for _ in range(1000)]
    spurt, seconds = PACE // 100, time.monotonic() - begun
    assert spurt <= passed.count(True) <= spurt + 2 + seconds * PACE
    assert change(kernel, before) == Counts(held=passed.count(False))
    assert passes(kernel, program, tcp((other, 4000), ("198.51.100.7", 443), SYN))


def test_a_host_is_let_go_when_it_keeps_to_its_pace(kernel: Programs) -> None:
    flood = tcp(("10.0.0.79", 4000), ("198.51.100.7", 443), SYN)
    kernel.hold(number("10.0.0.79"), 10)
    assert not all(passes(kernel, "inside_ether", flood) for _ in range(20))
    time.sleep(1.1)
    assert all(passes(kernel, "inside_ether", flood) for _ in range(1000))


def test_known_flows_of_a_host_that_is_held_go_on(kernel: Programs) -> None:
    session: Session = (UDP, ("10.0.0.80", 4000), "203.0.113.1", ("198.51.100.7", 443))
    flood = udp(session[1], ("198.51.100.7", 444))
    kernel.hold(number("10.0.0.80"), 10)
    with known(kernel, *session):
        assert not all(passes(kernel, "inside_ether", flood) for _ in range(100))
        for _ in range(100):
            seen = attempt(kernel, "inside_ether", HEADER + udp(*source_of(session)))
            assert seen.mark == KNOWN_MARK


# -- what NFQUEUE has no room for ------------------------------------------------------

MOST_QUEUED = 65531
SEES_FRAGMENTS = "inside_ether", "outside_ether", "inside_direct", "outside_direct"


def last_fragment(length: int, size: int) -> tuple[bytes, bytes]:
    """Return a packet of `length` bytes, and its fragment that begins with a multiple of `size`."""
    packet = fragmentable(udp(*source_of(DIRECT), os.urandom(length - 28)))
    return packet, fragments(packet, size)[-1]


@pytest.mark.parametrize("program", SEES_FRAGMENTS)
@examples
@given(
    length=st.integers(MOST_QUEUED - 8, 65535),
    size=st.integers(548 // 8, 2000 // 8).map(lambda eighths: eighths * 8),
    options=st.integers(0, 10),
)
def test_the_end_of_a_datagram_that_the_queue_cuts_is_noted(
    kernel: Programs, program: str, length: int, size: int, options: int
) -> None:
    packet, last = last_fragment(length, size)
    attempt(kernel, program, HEADER + with_options(last, 4 * options * NO_OPERATION))
    assert kernel.take_end(packet[:4] + b"\xff\xff" + packet[6:]) == b""
    seen = kernel.take_end(packet[:MOST_QUEUED])
    assert seen == (last[20:][-4:] if length + 4 * options > MOST_QUEUED else b"")
    assert kernel.take_end(packet) == b"", "it is taken once"


def test_no_other_fragment_is_noted(kernel: Programs) -> None:
    packet, last = last_fragment(65535, 1480)
    *earlier, _ = fragments(packet, 1480)
    for fragment in (*earlier, last[:-1], with_header(last, version=6)):
        attempt(kernel, "inside_ether", HEADER + fragment)
        assert kernel.take_end(packet) == b""


# -- direct ----------------------------------------------------------------------------

ROUTES = """
link add lan type veth peer name lan-end
link add wan type veth peer name wan-end
address add 10.0.0.1/16 dev lan
address add 203.0.113.1/24 dev wan
link set lan address 02:00:00:00:01:01
link set wan address 02:00:00:00:01:02
link set lan mtu 2000
link set wan mtu 2000
link set lan-end up
link set wan-end up
link set lan up
link set wan up
route add default via 203.0.113.254
neighbour add 203.0.113.254 lladdr 02:00:00:00:00:fe dev wan
neighbour add 10.0.0.2 lladdr 02:00:00:00:00:aa dev lan
"""
DIRECT: Session = (UDP, ("10.0.0.2", 4000), "203.0.113.1", ("198.51.100.7", 443))


@pytest.fixture(scope="module")
def routed(kernel: Programs) -> Iterator[dict[str, int]]:
    """Make a gateway's interfaces, lan and wan, with neighbours; yields their indices."""
    for line in ROUTES.strip().splitlines():
        run_ip(line)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    indices = {name: if_nametoindex(name) for name in ("lan", "wan")}
    kernel.set_interface(indices["lan"], INSIDE | ETHERNET)
    kernel.set_interface(indices["wan"], OUTSIDE | ETHERNET)
    yield indices
    run_ip("link delete lan")
    run_ip("link delete wan")


@contextmanager
def known_direct(
    kernel: Programs, routed: dict[str, int], session: Session
) -> Iterator[tuple[Gateway, Flows, IpMasq]]:
    """Have the programs know a session that leaves by wan."""
    with known(kernel, *session) as (gateway, flows, ms):
        flows.drop(ms)
        flows = Flows(kernel, {routed["wan"]})
        assert flows.put(ms, True, routed["wan"])
        assert flows.put(ms, False, 0)
        yield gateway, flows, ms


def hop(packet: bytes) -> bytes:
    """Return a packet after a router, with one hop less to go."""
    return with_header(packet[:8] + bytes([packet[8] - 1]) + packet[9:])


@pytest.mark.parametrize("outward", [True, False], ids=["out", "in"])
@examples
@given(st.data())
def test_what_is_forwarded_directly_is_as_the_plain_way_sends_it_one_hop_on(
    kernel: Programs, routed: dict[str, int], outward: bool, data: st.DataObject
) -> None:
    ends = source_of(DIRECT) if outward else answer_of(DIRECT)
    protocol = data.draw(st.sampled_from((TCP, UDP)))
    packet = data.draw(packets(protocol, *ends, bare=False))
    before = kernel.counts()
    with known_direct(kernel, routed, (protocol, *DIRECT[1:])) as (gateway, _, _):
        if outward:
            seen = attempt(kernel, "inside_direct", HEADER + packet, mark=7, at=routed["lan"])
        else:
            seen = attempt(kernel, "outside_direct", HEADER + packet, mark=7, at=routed["wan"])
    if not needs_a_rewrite_alone(whole(packet)):
        assert seen == Tried(PASS, HEADER + packet, 7)
        assert change(kernel, before) == Counts()
        return
    sent = gateway.out(whole(packet)) if outward else gateway.into(whole(packet))
    assert sent is not None
    expected = hop(sent)
    macs = "0200000000fe 020000000102" if outward else "0200000000aa 020000000101"
    header = bytes.fromhex(macs) + HEADER[12:]
    assert (seen.verdict, seen.mark, seen.frame[:14]) == (REDIRECT, 7, header)
    if outward and not packet[6] & 0x40:
        assert is_renewed(whole(seen.frame[14:]), expected)
    else:
        assert whole(seen.frame[14:]) == expected
    counted = change(kernel, before)
    assert counted == (
        Counts(packets_out=1, bytes_out=len(expected))
        if outward
        else Counts(packets_in=1, bytes_in=len(expected))
    )


def test_what_cannot_be_forwarded_directly_takes_the_long_way(
    kernel: Programs, routed: dict[str, int]
) -> None:
    packet = udp(*source_of(DIRECT), payload=bytes(1000))
    last_hop = with_header(packet[:8] + b"\1" + packet[9:])

    anew: list[Callable[[], object]] = []

    def verdict(of: bytes = packet, **more: int) -> int:
        for put_anew in anew:
            put_anew()
        seen = attempt(kernel, "inside_direct", HEADER + of, at=routed["lan"], **more)
        assert seen.verdict == REDIRECT or seen.frame == HEADER + of
        return seen.verdict

    @contextmanager
    def changed(*lines: str) -> Iterator[None]:
        for line in lines[: len(lines) // 2]:
            run_ip(line)
        yield
        for line in lines[len(lines) // 2 :]:
            run_ip(line)

    with known_direct(kernel, routed, DIRECT) as (_, flows, ms):
        anew.append(lambda: flows.put(ms, True, routed["wan"]))
        assert verdict() == REDIRECT
        assert verdict(last_hop) == PASS
        assert verdict(segments=2, segment_size=1972) == REDIRECT
        assert verdict(segments=2, segment_size=1973) == PASS
        with changed("link set wan mtu 1028", "link set wan mtu 2000"):
            assert verdict() == REDIRECT
        with changed("link set wan mtu 1027", "link set wan mtu 2000"):
            assert verdict() == PASS
        narrow = "route replace default via 203.0.113.254 mtu lock 1000"
        with changed(narrow, "route replace default via 203.0.113.254"):
            assert verdict() == PASS
        with changed("route delete default", "route add default via 203.0.113.254"):
            assert verdict() == PASS
        neighbour = "203.0.113.254 lladdr 02:00:00:00:00:fe dev wan"
        with changed(f"neighbour delete {neighbour}", f"neighbour add {neighbour}"):
            assert verdict() == PASS
        kernel.set_interface(routed["wan"], OUTSIDE)
        assert verdict() == PASS
        kernel.set_interface(routed["wan"], INSIDE | ETHERNET)
        assert verdict() == PASS
        kernel.set_interface(routed["wan"], OUTSIDE | ETHERNET)
        assert verdict() == REDIRECT
    anew.clear()
    with known(kernel, *DIRECT):  # it leaves by lo
        assert verdict() == PASS
