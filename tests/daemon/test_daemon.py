"""The daemon's parts that need no kernel queue: verdicts, addresses, the sweeper, netlink."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from netfilterqueue import Packet

from nfmasq.daemon import nfnetlink, oversize
from nfmasq.daemon.addresses import GivenAddresses
from nfmasq.daemon.handler import SAMPLE, log, packet_handler
from nfmasq.daemon.netfilter import FORWARD, HAIRPIN_MARK, OUTPUT, PREROUTING
from nfmasq.daemon.pace import paced
from nfmasq.daemon.sweeper import Sweeper
from nfmasq.daemon.verdicts import Verdicts
from nfmasq.engine import UDP, Masquerade
from tests.gateway import masquerade_with
from tests.packets import fragments

MADDR = int(IPv4Address("192.0.2.1"))
INSIDE, OUTSIDE = IPv4Address("10.77.0.2"), IPv4Address("198.51.100.7")
WAN = 3


def udp(source: IPv4Address = INSIDE, destination: IPv4Address = OUTSIDE) -> bytes:
    """Return a UDP datagram without a checksum and without data, from port 5000 to port 53."""
    ip = (
        struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0, 64, UDP, 0) + source.packed + destination.packed
    )
    checksum = 0xFFFF - sum(struct.unpack("!10H", ip)) % 0xFFFF
    return ip[:10] + struct.pack("!H", checksum) + ip[12:] + struct.pack("!HHHH", 5000, 53, 8, 0)


class QueuedPacket(NamedTuple):
    """A packet that the kernel hands over, with what the handler looks at."""

    hook: int
    payload: bytes
    outdev: int = WAN
    id: int = 1
    mark: int = 0

    def get_payload(self) -> bytes:
        return self.payload


class Verdict:
    """The verdict on one packet: `fate` has the bytes that go on, None (dropped), or a text."""

    def __init__(self, packet: QueuedPacket) -> None:
        self.fate: bytes | str | None = "without a verdict"
        self._packet = packet

    def accept(self, number: int) -> None:
        self.replace(number, self._packet.payload)

    def drop(self, number: int) -> None:
        self._give(number, None)

    def replace(self, number: int, packet: bytes) -> None:
        self._give(number, packet)

    def cut(self, number: int) -> None:
        self._give(number, "to be cut")

    def _give(self, number: int, fate: bytes | str | None) -> None:
        assert self.fate == "without a verdict"
        assert number == self._packet.id
        self.fate = fate


class NoAddress(GivenAddresses):
    def pick(self, interface: int, packet: bytes) -> int:
        return cast(int, None)


class Gateway:
    """A handler with an engine of its own, and the times that it observed."""

    def __init__(self, addresses: GivenAddresses | None = None) -> None:
        self.engine = Masquerade()
        self.observed: list[float] = []
        self.addresses = addresses or GivenAddresses([MADDR])
        self.verifies = False
        self.renew()

    def renew(self) -> None:
        """Take up an engine whose methods were replaced."""
        self.handle = packet_handler(
            self.engine, self.addresses, self.observed.append, verifies=lambda: self.verifies
        )

    def through(
        self, hook: int, payload: bytes, info: int = 0, **attributes: Any
    ) -> bytes | str | None:
        packet = QueuedPacket(hook, payload, **attributes)
        verdict = Verdict(packet)
        self.handle(cast(Packet, packet), message(info, payload), cast(Verdicts, verdict))
        return verdict.fate

    def counted(self) -> int:
        counters = self.engine.sessions.counters
        rows = (*counters.outbound.values(), *counters.inbound.values())
        return sum(row.accepted + row.dropped for row in rows)


def message(info: int, payload: bytes) -> bytes:
    """Return the end of a message from the kernel: what it says of a packet, and the packet."""
    said = struct.pack("=HH", 8, 14) + struct.pack("!I", info)
    return bytes(20) + said + struct.pack("=HH", 4 + min(len(payload), 65531), 10) + payload


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


def test_a_packet_from_the_inside_leaves_with_the_masquerade_address(gateway: Gateway) -> None:
    sent = gateway.through(FORWARD, udp())
    assert isinstance(sent, bytes)
    assert sent[12:16] == MADDR.to_bytes(4, "big")
    assert sent[16:20] == OUTSIDE.packed


def test_the_answer_comes_back_to_the_inside(gateway: Gateway) -> None:
    sent = gateway.through(FORWARD, udp())
    assert isinstance(sent, bytes)
    answer = bytearray(udp(OUTSIDE, IPv4Address(MADDR)))
    answer[20:24] = sent[22:24] + sent[20:22]
    back = gateway.through(PREROUTING, bytes(answer))
    assert isinstance(back, bytes)
    assert (back[12:16], back[16:20]) == (OUTSIDE.packed, INSIDE.packed)
    assert back[20:24] == struct.pack("!HH", 53, 5000)


@pytest.mark.parametrize("hook", [PREROUTING, OUTPUT])
def test_what_is_not_ours_passes_untouched(gateway: Gateway, hook: int) -> None:
    packet = udp(OUTSIDE, IPv4Address(MADDR))
    assert gateway.through(hook, packet) is packet


def test_what_the_engine_has_to_say_is_sent_after_the_verdict(gateway: Gateway) -> None:
    sent = list[bytes]()

    def send() -> None:
        sent.extend(gateway.engine.outbox)
        gateway.engine.outbox.clear()

    gateway.handle = packet_handler(
        gateway.engine, gateway.addresses, gateway.observed.append, send_own=send
    )
    gateway.through(FORWARD, udp())
    assert sent == []
    gateway.engine.outbox.append(b"first")
    gateway.through(FORWARD, udp())
    gateway.engine.outbox.append(b"second")
    gateway.through(4, udp())
    assert sent == [b"first", b"second"]


def test_without_a_sender_what_the_engine_has_to_say_does_not_pile_up(gateway: Gateway) -> None:
    gateway.engine.outbox.append(b"nobody sends it")
    gateway.through(FORWARD, udp())
    assert not gateway.engine.outbox


def test_without_an_address_nothing_leaves() -> None:
    gateway = Gateway(NoAddress([MADDR]))
    assert gateway.through(FORWARD, udp()) is None
    assert gateway.engine.sessions.counters.errors["no_address"] == 1
    assert gateway.engine.sessions.counters.outbound["udp"].dropped == 1


@pytest.mark.parametrize("hook", [1, 4, 5])
def test_a_packet_from_another_hook_is_dropped(gateway: Gateway, hook: int) -> None:
    assert gateway.through(hook, udp()) is None
    assert gateway.engine.sessions.counters.errors["exception"] == 1


def test_a_marked_packet_takes_both_steps_of_a_hairpin(gateway: Gateway) -> None:
    gateway.engine = masquerade_with(filtering="endpoint-independent")
    gateway.renew()
    mine, theirs = gateway.through(FORWARD, udp()), gateway.through(FORWARD, udp(INSIDE + 1))
    assert isinstance(mine, bytes)
    assert isinstance(theirs, bytes)
    packet = udp(INSIDE, IPv4Address(MADDR))
    packet = packet[:22] + theirs[20:22] + packet[24:]
    between = gateway.through(PREROUTING, packet, mark=HAIRPIN_MARK | 1)
    assert isinstance(between, bytes)
    assert (between[12:16], between[16:20]) == (INSIDE.packed, (INSIDE + 1).packed)
    arrived = gateway.through(FORWARD, between, mark=HAIRPIN_MARK | 1)
    assert isinstance(arrived, bytes)
    assert (arrived[12:16], arrived[20:22]) == (MADDR.to_bytes(4, "big"), mine[20:22])
    assert gateway.engine.sessions.counters.outbound["udp"].accepted == 3
    assert gateway.engine.sessions.counters.inbound["udp"].accepted == 0


@pytest.mark.parametrize("hook", [PREROUTING, OUTPUT])
def test_what_is_marked_and_not_ours_passes_untouched(gateway: Gateway, hook: int) -> None:
    packet = udp(INSIDE, IPv4Address(MADDR))
    assert gateway.through(hook, packet, mark=HAIRPIN_MARK) is packet


@pytest.mark.parametrize("hook", [1, 4, 5])
def test_a_marked_packet_from_another_hook_is_dropped(gateway: Gateway, hook: int) -> None:
    assert gateway.through(hook, udp(), mark=HAIRPIN_MARK) is None
    assert gateway.engine.sessions.counters.errors["exception"] == 1


@given(hook=st.integers(0, 5), payload=st.binary(max_size=80))
def test_every_packet_gets_one_verdict_and_is_counted_once(hook: int, payload: bytes) -> None:
    gateway = Gateway()
    fate = gateway.through(hook, payload)
    assert fate is None or isinstance(fate, bytes)
    assert gateway.counted() == 1
    if hook == FORWARD:
        assert fate is None or fate[12:16] == MADDR.to_bytes(4, "big")


@pytest.mark.parametrize(
    ("hook", "function"),
    [
        (FORWARD, "ip_fw_masquerade"),
        (PREROUTING, "ip_fw_demasquerade"),
        (OUTPUT, "ip_fw_own"),
    ],
)
@pytest.mark.parametrize("fault", [ZeroDivisionError, MemoryError])
def test_a_fault_costs_that_packet_only(
    monkeypatch: pytest.MonkeyPatch, hook: int, function: str, fault: type[Exception]
) -> None:
    def fail(*_: object) -> bytes:
        raise fault

    gateway = Gateway()
    with monkeypatch.context() as patched:
        patched.setattr(gateway.engine, function, fail)
        gateway.renew()
        assert gateway.through(hook, udp()) is None
    gateway.renew()
    assert gateway.through(hook, udp()) is not None
    assert gateway.engine.sessions.counters.errors["exception"] == 1
    assert gateway.counted() == 2


def test_a_fault_for_want_of_memory_may_lack_memory_for_its_log_line_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> bytes:
        raise MemoryError

    gateway = Gateway()
    monkeypatch.setattr(gateway.engine, "ip_fw_masquerade", fail)
    monkeypatch.setattr(gateway.engine.sessions, "drop", fail)
    gateway.renew()
    assert gateway.through(FORWARD, udp()) is None


def test_faults_are_logged_a_few_times_and_with_a_traceback_only_for_debugging(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("nfmasq"), "propagate", True)
    caplog.set_level(logging.INFO, "nfmasq")
    monkeypatch.setattr(log.filters[0], "_kinds", {})
    for _ in range(1000):
        gateway.through(4, udp())
    assert len(caplog.records) == 5
    assert not any(record.exc_info for record in caplog.records)

    caplog.set_level(logging.DEBUG, "nfmasq")
    monkeypatch.setattr(log.filters[0], "_kinds", {})
    gateway.through(4, udp())
    assert caplog.records[-1].exc_info


def test_one_packet_in_many_is_timed(gateway: Gateway) -> None:
    for number in range(1, 4 * SAMPLE + 1):
        gateway.through(FORWARD, udp(), id=number)
    assert len(gateway.observed) == 4
    assert all(0 < seconds < 10 for seconds in gateway.observed)


@given(
    pool=st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=5, unique=True),
    hosts=st.lists(st.ip_addresses(v=4), min_size=1),
)
def test_each_inside_host_has_one_address_of_the_pool(
    pool: list[int], hosts: list[IPv4Address]
) -> None:
    addresses = GivenAddresses(pool)
    for host in hosts:
        first, second = (
            addresses.known.get(interface)
            or addresses.pick(interface, udp(host, IPv4Address(destination)))
            for interface, destination in ((WAN, 1), (WAN + 1, 2))
        )
        assert first == second == addresses.pick_for_hairpin(udp(host))
        assert first in pool


def test_neighbouring_hosts_share_out_the_pool() -> None:
    addresses = GivenAddresses([10, 20, 30])
    picked = {addresses.pick(WAN, udp(INSIDE + n)) for n in range(3)}
    assert picked == {10, 20, 30}


@given(
    total_length=st.integers(nfnetlink.MOST_COPIED + 1, 65535),
    # With 3,448 bytes a fragment, what NFQUEUE leaves out is spread over two fragments.
    size=st.integers(548 // 8, 9000 // 8).map(lambda n: n * 8).filter(lambda n: 65512 % n),
)
def test_the_last_fragment_completes_what_the_queue_has_no_room_for(
    total_length: int, size: int
) -> None:
    header = udp()[:2] + struct.pack("!H", total_length) + udp()[4:20]
    packet = header + bytes(total_length - 24) + b"tail"
    cut = packet[: nfnetlink.MOST_COPIED]
    *earlier, last = fragments(packet, size)
    assert oversize.completed(cut, last) == packet
    assert not any(oversize.completed(cut, fragment) for fragment in earlier)
    assert oversize.ended(cut, packet[-4:]) == packet
    assert oversize.ended(cut, packet[-3:]) == (packet if total_length < 65535 else None)
    assert oversize.ended(cut, b"") is None
    from_another_host = last[:12] + OUTSIDE.packed + last[16:]
    assert oversize.completed(cut, from_another_host) is None


class Sweep:
    """An engine that only sweeps: first `failing` steps fail, then `due` steps are to be done."""

    def __init__(self, due: int, failing: int = 0) -> None:
        self.outbox: deque[bytes] = deque()
        self.due = due
        self.failing = failing
        self.done = threading.Event()
        self.limits: set[int] = set()

    def sweep(self, now: float, limit: int) -> bool:
        assert abs(time.monotonic() - now) < 30
        self.limits.add(limit)
        if self.failing:
            self.failing -= 1
            raise ZeroDivisionError
        self.due -= 1
        if self.due <= 0:
            self.done.set()
        return self.due > 0


@pytest.mark.parametrize("failing", [0, 2])
def test_the_sweeper_takes_small_steps_until_nothing_is_due(failing: int) -> None:
    engine, observed = Sweep(due=100, failing=failing), list[float]()
    sweeper = Sweeper(cast(Masquerade, engine), observed.append)
    sweeper.start()
    try:
        assert engine.done.wait(30), "not everything that was due was swept"
    finally:
        sweeper.stop()
    assert max(engine.limits) <= 64
    assert len(observed) >= 99


def test_what_the_engine_has_to_say_is_sent_after_each_step() -> None:
    sent = threading.Event()
    engine = Sweep(due=1)
    sweeper = Sweeper(cast(Masquerade, engine), lambda _: None, sent.set)
    sweeper.start()
    try:
        assert sent.wait(30)
    finally:
        sweeper.stop()


def test_the_sweeper_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait until its rest is over."""
    monkeypatch.setattr("nfmasq.daemon.sweeper.REST", 60)
    sweeper = Sweeper(Masquerade(), lambda _: None)
    sweeper.start()
    began = time.monotonic()
    sweeper.stop()
    assert time.monotonic() - began < 30
    assert "sweeper" not in {thread.name for thread in threading.enumerate()}


def test_a_paced_walk_pauses_before_each_step() -> None:
    seen: list[object] = []

    def wait(seconds: float) -> bool:
        seen.append(f"{seconds} s")
        return False

    for entry in paced([1, 2, 3, 4, 5], step=2, pause=0.1, wait=wait):
        seen.append(entry)
    assert seen == ["0.1 s", 1, 2, "0.1 s", 3, 4, "0.1 s", 5]


def test_a_paced_walk_ends_when_its_event_is_set() -> None:
    stopping = threading.Event()
    walk = paced([1, 2, 3, 4, 5], 2, 0.001, stopping.wait)
    assert next(walk) == 1
    stopping.set()
    assert list(walk) == [2]


@pytest.fixture
def kernel() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield our end and the kernel's end of a channel that keeps messages apart as netlink does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def answer(sequence: int, error: int) -> bytes:
    return struct.pack("=IHHIIi", 20, 2, 0, sequence, 0, -error)


def test_configuration_asks_for_whole_packets(
    kernel: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = kernel
    theirs.send(answer(nfnetlink.SEQUENCE, 0))
    nfnetlink.copy_whole_packets(ours, 7)
    message = theirs.recv(4096)
    assert struct.unpack_from("=IHH", message) == (len(message), 3 << 8 | 2, 1 | 4)
    assert message[16:20] == b"\0\0\0\x07"
    assert message[20:] == struct.pack("=HH", 9, 2) + struct.pack("!IB", 65531, 2) + bytes(3)


def test_configuration_asks_for_superpackets(
    kernel: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = kernel
    theirs.send(answer(nfnetlink.SEQUENCE, 0))
    nfnetlink.ask_for_superpackets(ours, 7)
    message = theirs.recv(4096)
    assert struct.unpack_from("=IHH", message) == (len(message), 3 << 8 | 2, 1 | 4)
    flag = struct.pack("!I", 4)
    assert message[20:] == b"\x08\0\x05\0" + flag + b"\x08\0\x04\0" + flag


@pytest.mark.parametrize(
    "configure", [nfnetlink.copy_whole_packets, nfnetlink.ask_for_superpackets]
)
def test_a_refusal_by_the_kernel_is_noticed(
    kernel: tuple[socket.socket, socket.socket], configure: Callable[[socket.socket, int], None]
) -> None:
    ours, theirs = kernel
    theirs.send(answer(nfnetlink.SEQUENCE - 1, 0))  # to somebody else's question
    theirs.send(answer(nfnetlink.SEQUENCE, errno.EOPNOTSUPP))
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        configure(ours, 7)


def test_a_kernel_that_does_not_answer_is_noticed(
    kernel: tuple[socket.socket, socket.socket],
) -> None:
    with pytest.raises(TimeoutError):
        nfnetlink.copy_whole_packets(kernel[0], 7)
