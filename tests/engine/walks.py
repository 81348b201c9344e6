"""Random walks along which two masquerades are led, and that are made short where they fail.

A world is so small that all of it meets: packets of all kinds, reloads, servers that die, addresses
that come and go, sweeps and leaps of time.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pytest

from nfmasq.engine import BEHAVIOURS, ICMP, TCP, UDP, Flags, IpMasq
from nfmasq.engine.forward.schedulers import SCHEDULERS
from nfmasq.engine.table.ports import PORT_SELECTIONS
from nfmasq.engine.table.timeouts import PROFILES
from nfmasq.engine.watch import Identity
from tests.engine.two_ways import BRIEF, FTP, OPEN_ENDED, PUPPET, Step, TwoWays
from tests.packets import (
    ACK,
    ECHO,
    ECHO_REPLY,
    FIN,
    PARAMETER_PROBLEM,
    PSH,
    RST,
    SYN,
    TIME_EXCEEDED,
    UNREACHABLE,
    Endpoint,
    dotted,
    error,
    fragmentable,
    ip,
    number,
    query,
    reply,
    tcp,
    udp,
    udplite,
    with_checksum,
    with_data_offset,
    with_header,
    with_options,
    with_udp_length,
)

STEPS = 400
"""Steps of one walk: enough for ports and entries to run out many times."""

SECONDS_TO_SHORTEN = 60

HOSTS = "10.0.0.2", "10.0.0.3", "10.0.0.4"
OUTSIDERS = "198.51.100.7", "198.51.100.8", "198.51.100.9"
MADDRS = "203.0.113.1", "203.0.113.2"
SPORTS = 7, 7, 7, 7, 8, 8, 5000, 5000, 5001, FTP, FTP, PUPPET, 61001, 0
DPORTS = 80, 80, 80, 80, 81, 81, 53, 53, FTP, FTP, PUPPET, PUPPET, 9000, 9000, 61000, 0
FORWARDED, RANGE, TRIGGERING, TRIGGERED = 8080, range(8082, 8084), 9000, range(7000, 7002)
MPORTS = range(61000, 61004)
ELSEWHERE = (*MPORTS, FORWARDED, *RANGE, *TRIGGERED, FTP, 5000)

FLAGS = SYN, SYN, SYN | ACK, ACK, ACK, ACK, PSH | ACK, FIN | ACK, FIN | ACK, RST, RST | ACK, 0
LINES = (
    b"", b"", b"NOOP\r\n", b"PORT 10,0,0,2,19,136\r\n", b"EPRT |1|10.0.0.3|5001|\r\n", b"PASV\r\n",
    b"227 ok (10,0,0,2,19,137)\r\n", b"QU",
    b"expect 5000", b"anyone 5000", b"anyone 5001", b"pair 5000", b"keep 40", b"keep 0", b"nothing",
)  # fmt: skip
SEQS = 1000, 1001, 1001, 1007, 1023
ACKS = 1001, 1001, 1001, 1000, 1024, 70_000
TCP_OPTIONS = b"", b"", b"\1\3\3\0", b"\1\3\3\7", b"\4\0\3\3", b"\3\3\3\3\0\0\0\0"

TIMES = (0,) * 24 + (0.01, 0.1, 0.25, 0.3, 1, 1, 2, 3.9, 4.1, 6, 9.9, 10.1, 19.75, 20.3, 60, 121)
LEAPS = 241, 299.9, 301, 7441, 3 * 24 * 3600

CHOICES: dict[str, Sequence[Any]] = {
    "ports": (range(61000, 61004),) * 6 + (range(61001, 61003), (80, 5000, 61000, 61001)),
    "mapping": BEHAVIOURS,
    "filtering": BEHAVIOURS,
    "port_selection": (*["sequential"] * 3, *PORT_SELECTIONS),
    "when_ports_run_out": ("overlap", "refuse"),
    "other_protocols": ("by-address", "drop"),
    "timeouts": (BRIEF, BRIEF, *PROFILES.values()),
    "max_entries": (12, 12, 5, 30),
    "max_entries_per_host": (0, 0, 3, 6),
    "max_ports_per_host": (0, 0, 1, 3),
    "max_new_per_host": (0, 0, 1, 2),
    "inbound_refresh": (True, True, False),
    "unsolicited": ("drop", "accept"),
    "reset_on_address_change": (True, False),
}


Drawn: TypeAlias = "tuple[Any, ...]"
"""The method of `Way` that is to be called, and its arguments."""


def step_of(seconds: float, drawn: Drawn) -> Step:
    what, *args = drawn
    return Step(seconds, what, tuple(args))


class World:
    """Draws the steps of a walk. It looks at the plain way to go where something is."""

    flags: Sequence[int] = FLAGS
    lines: Sequence[bytes] = LINES
    times: Sequence[float] = TIMES

    def __init__(self, seed: int, ways: TwoWays) -> None:
        self._random = random.Random(seed)
        self._ways = ways
        self._settings: dict[str, Any] = {}
        self._seen: deque[bytes] = deque([udp((HOSTS[0], 7), (OUTSIDERS[0], 80))], maxlen=40)
        self._gone: deque[tuple[Endpoint, Endpoint]] = deque(maxlen=4)

    def step(self) -> Step:
        """Draw a step."""
        (draw,) = self._random.choices(list(KINDS), list(KINDS.values()))
        seconds = self._pick(LEAPS) if self._chance(0.01) else self._pick(self.times)
        return step_of(seconds, draw(self))

    def saw(self, step: Step, comes_of_it: object) -> None:
        """Remember packets, for errors to quote."""
        packets = [*step.args, *(comes_of_it if isinstance(comes_of_it, list) else [comes_of_it])]
        self._seen += [each for each in packets if isinstance(each, bytes)]

    # -- packets -------------------------------------------------------------------

    def from_inside(self) -> Drawn:
        ms, unsummed = self._any_entry(), self._chance(0.1)
        if self._gone and self._chance(0.05):
            inside, outside = self._pick(self._gone)
            return "out", self._packet(inside, outside, TCP), self._maddr(), unsummed
        if ms is None or self._chance(0.35):
            return "out", self._packet(self._inside(), self._outside()), self._maddr(), unsummed
        inside, outside = self._ends(ms, ms.saddr, ms.sport)
        packet = self._packet(inside, outside, ms.protocol)
        if ms.saddr == ms.maddr:
            return "own", packet, unsummed
        return "out", packet, ms.maddr if self._chance(0.9) else self._maddr(), unsummed

    def from_outside(self) -> Drawn:
        ms = self._any_entry()
        if ms is None or self._chance(0.35):
            there = self._pick(MADDRS), self._pick(ELSEWHERE)
            return "into", self._packet(self._outside(), there, answer=True), self._chance(0.1)
        mapped, outside = self._ends(ms, ms.maddr, ms.mport)
        if self._chance(0.1):
            outside = self._outside()
        return "into", self._packet(outside, mapped, ms.protocol, answer=True), self._chance(0.1)

    def own(self) -> Drawn:
        here = self._pick(MADDRS), self._pick(ELSEWHERE)
        return "own", self._packet(here, self._outside()), self._chance(0.1)

    def hairpin(self) -> Drawn:
        ms = self._any_entry()
        there = self._pick(MADDRS), self._pick(ELSEWHERE)
        if ms is not None and self._chance(0.8):
            there = dotted(ms.maddr), ms.mport
        packet = self._packet(self._inside(), there, self._pick((TCP, UDP)))
        return "hairpin", packet, self._maddr(), self._chance(0.1)

    def hairpin_source(self) -> Drawn:
        return "hairpin_source", self._pick(self._seen), False

    def icmp_error(self) -> Drawn:
        quote = self._pick(self._seen)
        if len(quote) < 20:
            return self.own()
        kind = self._pick((UNREACHABLE, UNREACHABLE, TIME_EXCEEDED, PARAMETER_PROBLEM))
        to = dotted(int.from_bytes(quote[12:16], "big"))
        if self._chance(0.1):
            to = self._pick((*HOSTS, *OUTSIDERS, *MADDRS))
        cut = quote[: self._pick((28, 28, 40, 548, 20))]
        source = self._pick((*HOSTS, *OUTSIDERS, *OUTSIDERS, *MADDRS))
        packet = error(source, to, cut, kind)
        return self._pick_drawn(
            ("out", packet, self._maddr(), False),
            ("into", packet, False),
            ("own", packet, False),
            ("hairpin", packet, self._maddr(), False),
            ("hairpin_own_error", packet),
        )

    def _packet(
        self, src: Endpoint, dst: Endpoint, protocol: int = 0, answer: bool = False
    ) -> bytes:
        protocol = protocol or self._pick((TCP, TCP, TCP, UDP, UDP, ICMP, 136))
        payload = self._pick(self.lines)
        if protocol == TCP:
            packet = self._segment(src, dst, payload)
        elif protocol == UDP:
            packet = udp(src, dst, payload, checksum=self._chance(0.9))
        elif protocol == ICMP and answer:
            packet = reply(src[0], dst, self._pick((ECHO_REPLY, ECHO_REPLY, ECHO)))
        elif protocol == ICMP:
            packet = query(src, dst[0], self._pick((ECHO, ECHO, ECHO_REPLY)))
        elif protocol == 136:
            packet = udplite(src, dst, payload)
        else:
            packet = ip(src[0], dst[0], protocol, bytes(16))
        if self._chance(0.1):
            packet = fragmentable(packet)
        return self._spoilt(packet) if self._chance(0.03) else packet

    def _segment(self, src: Endpoint, dst: Endpoint, payload: bytes) -> bytes:
        flags, numbers = self._pick(self.flags), (self._pick(SEQS), self._pick(ACKS))
        options = self._pick(TCP_OPTIONS) if flags & SYN else b""
        seq, ack = numbers
        return tcp(src, dst, flags, payload, seq=seq, ack=ack, tcp_options=options)

    def _spoilt(self, packet: bytes) -> bytes:
        """Return a packet that is damaged, cut short, or tells lies."""
        ways: list[Callable[[], bytes]] = [
            lambda: packet[: self._random.randrange(len(packet))],
            lambda: with_header(packet, version=6),
            lambda: with_header(packet, total_length=len(packet) + self._pick((-1, 1))),
            lambda: with_header(packet, fragment=self._pick((0x2000, 1, 0))),
            lambda: packet + b"\0",
            lambda: with_options(packet, self._pick((b"\1\1\1\0", b"\7\3\4\0"))),
        ]
        if packet[9] in (TCP, UDP):
            ways.append(lambda: with_checksum(packet, self._pick((0, 1, 0xFFFF))))
        if packet[9] == TCP:
            ways.append(lambda: with_data_offset(packet, self._pick((0, 4, 6, 15))))
        if packet[9] == UDP:
            ways.append(lambda: with_udp_length(packet, self._pick((0, 7, 8, 9, 2000))))
        spoilt: bytes = self._pick(ways)()
        return spoilt

    # -- what else happens ---------------------------------------------------------

    def sweep(self) -> Drawn:
        return "sweep", self._pick((1, 2, 4, 64, 64))

    def configure(self) -> Drawn:
        for name in self._random.sample(list(CHOICES), self._random.randrange(4)):
            self._settings[name] = self._pick(CHOICES[name])
        if self._chance(0.1):
            self._settings.clear()
        self._settings.setdefault("ports", MPORTS)
        self._settings.setdefault("timeouts", BRIEF)
        self._settings.setdefault("max_entries", 12)
        triggers = [((self._pick((TCP, UDP)), (range(TRIGGERING, TRIGGERING + 1),)), protocol,
                     TRIGGERED, 15) for protocol in (TCP, UDP)]  # fmt: skip
        forwards = [f for f in self._forwards() if self._chance(0.6)]
        apps = self._pick(("all", "all", "none"))
        return "configure", {**self._settings}, apps, forwards, triggers * self._chance(0.7)

    def _forwards(self) -> list[tuple[Any, ...]]:
        """Draw forwards: arguments of `Forward`, the servers as arguments of `Server`."""
        forwards = []
        for protocol in (TCP, UDP):
            for listened in (range(FORWARDED, FORWARDED + 1), RANGE, range(FTP, FTP + 1)):
                port = listened[0] if listened[0] == FTP else self._pick((7, 5000))
                hosts = HOSTS[: self._pick((1, 1, 2, 3))]
                weights = self._pick(((1, 1, 1), (1, 2, 0), (0, 1, 3)))
                servers = tuple(
                    (number(host), port, weight)
                    for host, weight in zip(hosts, weights, strict=False)
                )
                listen = self._pick((None, None, number(MADDRS[0])))
                scheduler, kept = self._pick(list(SCHEDULERS)), self._pick((0, 0, 5))
                forwards.append((protocol, listened, servers, listen, scheduler, kept))
        return forwards

    def follow(self) -> Drawn:
        return (self._pick(("follow", "follow", "retime")),)

    def addresses(self) -> Drawn:
        both = tuple(map(number, MADDRS))
        maddrs = self._pick((both, both, both[:1], both[1:], ()))
        beside = self._pick(((), (), ((both[0], (both[1],)),)))
        return "addresses", maddrs, beside

    def server(self) -> Drawn:
        return "server", self._random.randrange(6), self._chance(0.6), self._pick((0, 1, 1, 2))

    def new(self) -> Drawn:
        """Draw a caller's own `ip_masq_new`, which may leave some of the values open."""
        flags = self._pick((0, Flags.NO_DADDR | Flags.NO_DPORT, Flags.NO_DPORT, Flags.NO_SPORT,
                            Flags.DLOOSE, Flags.USER))  # fmt: skip
        flags |= self._pick((Flags.NO_REPLY, 0, 0))
        maddr, mport = number(self._pick(MADDRS)), self._pick((0, 0, *MPORTS))
        inside, outside = self._inside(), self._outside()
        sport = 0 if flags & Flags.NO_SPORT else inside[1] or SPORTS[0]
        daddr = 0 if flags & Flags.NO_DADDR else number(outside[0])
        dport = 0 if flags & Flags.NO_DPORT else outside[1] or DPORTS[0]
        values = self._pick((TCP, UDP)), maddr, mport, number(inside[0]), sport, daddr, dport
        return "new", *values, int(flags)

    def end(self) -> Drawn:
        ms = self._any_entry()
        if ms is None:
            return self.new()
        who = Identity.of(ms)
        self._gone.append(self._ends(ms, ms.saddr, ms.sport))
        return self._pick_drawn(("gone", who), ("gone", who), ("remove", who, "deleted"))

    # -- drawn ---------------------------------------------------------------------

    def _any_entry(self) -> IpMasq | None:
        entries = self._ways.plain.entries()
        return self._pick(entries) if entries else None

    def _ends(self, ms: IpMasq, address: int, port: int) -> tuple[Endpoint, Endpoint]:
        """Return the end of an entry that is given, and its outside end; what is open is drawn."""
        daddr, dport = self._outside()
        if ms.flags & OPEN_ENDED:
            port = port or self._pick(SPORTS)
        return (dotted(address), port), (dotted(ms.daddr) if ms.daddr else daddr, ms.dport or dport)

    def _inside(self) -> Endpoint:
        return self._pick(HOSTS), self._pick(SPORTS)

    def _outside(self) -> Endpoint:
        return self._pick(OUTSIDERS), self._pick(DPORTS)

    def _maddr(self) -> int:
        return number(self._pick((MADDRS[0], MADDRS[0], MADDRS[0], MADDRS[1])))

    def _pick(self, some: Sequence[Any]) -> Any:
        return self._random.choice(some)

    def _pick_drawn(self, *some: Drawn) -> Drawn:
        return self._random.choice(some)

    def _chance(self, of: float) -> bool:
        return self._random.random() < of


KINDS: dict[Callable[[World], Drawn], float] = {
    World.from_inside: 40,
    World.from_outside: 35,
    World.own: 2,
    World.hairpin: 4,
    World.hairpin_source: 1,
    World.icmp_error: 4,
    World.sweep: 5,
    World.configure: 1.5,
    World.follow: 1,
    World.addresses: 1,
    World.server: 1.5,
    World.new: 1,
    World.end: 1.5,
}
"""How often each kind of step is drawn, beside the others."""


def walk(world: World, ways: TwoWays) -> list[Step]:
    """Walk at random; return the steps up to the one that fails, or none where none does."""
    steps = list[Step]()
    begin = ("addresses", tuple(map(number, MADDRS)), ()), world.configure()
    for at in range(STEPS):
        steps.append(step_of(0, begin[at]) if at < len(begin) else world.step())
        try:
            world.saw(steps[-1], ways.take(steps[-1]))
        except Exception:
            return steps
    return []


def retrace(steps: Sequence[Step], ways: TwoWays) -> None:
    """Take the steps of a walk. Raises where the two ways differ, or something is not whole."""
    for step in steps:
        ways.take(step)


def fails(steps: Sequence[Step], ways: TwoWays) -> bool:
    try:
        retrace(steps, ways)
    except Exception:
        return True
    return False


def shortened(steps: list[Step], make: Callable[[], TwoWays]) -> list[Step]:
    """Leave out the steps without which a walk fails all the same."""
    until = time.monotonic() + SECONDS_TO_SHORTEN
    many = len(steps) // 2
    while many:
        at = 0
        while at < len(steps) and time.monotonic() < until:
            fewer = steps[:at] + steps[at + many :]
            if fails(fewer, make()):
                steps = fewer
            else:
                at += many
        many //= 2
    return steps


def walk_for(
    seconds: float, make: Callable[[], TwoWays] = TwoWays, kind: type[World] = World
) -> None:
    """Lead two ways along walks for some seconds. Fails with the steps of a walk that fails.

    `make` makes the two ways, which have been nowhere yet.
    """
    seed = 0 if os.environ.get("CI") == "true" else random.SystemRandom().randrange(10**9)
    until, walks = time.monotonic() + seconds, 0
    while walks == 0 or time.monotonic() < until:
        ways = make()
        failing = walk(kind(seed + walks, ways), ways)
        if failing:
            steps = shortened(failing, make)
            print(f"walk {seed + walks}:", *steps, sep="\n")
            retrace(steps, make())
            pytest.fail("the walk fails in the course of others only")
        walks += 1
