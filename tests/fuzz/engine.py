"""The engine, led along a program of steps that a fuzzer writes.

The first byte of a program picks what is led: the fast path beside the plain way, or a masquerade
with a flow cache. All other bytes steer a walk (`steering.py`) through the small world of the
random walks (`tests/engine/walks.py`). In addition there are connections whose sequence numbers
fit, what is said where a helper listens (`phrases.py`), and packets of any bytes.

After each step the masquerades are whole (`tests/engine/two_ways.py`), and the packet that leaves
is sound (`laws.py`). When the program is over all entries expire, and nothing is left of them.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

from nfmasq.apps import OWN, helpers
from nfmasq.engine import TCP, UDP, IpMasq
from nfmasq.engine.helper.app import LONGEST_KEPT, App, Apps, Packet, Session
from tests.apps.pptp import data as call_data
from tests.engine.test_cached import CachedWay, holds_what_it_may
from tests.engine.two_ways import PUPPET, Puppet, Step, TwoWays, Way, forwards_of, hold_together
from tests.engine.walks import HOSTS, KINDS, MADDRS, OUTSIDERS, Drawn, World, step_of
from tests.fuzz import laws
from tests.fuzz.phrases import PHRASES, SIP, TFTP
from tests.fuzz.steering import Steering, nothing_left_to_chance
from tests.gateway import told
from tests.packets import ACK, FIN, PSH, RST, SYN, Endpoint, number, tcp, udp, with_header

MOST_STEPS = 300

UDP_PUPPET = 70
FAILS_BOUND, FAILS_UNBOUND = 8, 5001
HELPED = *PHRASES, PUPPET, UDP_PUPPET

FIRST_SEQS = 1000, 2**32 - 300
FLAGS = (*[PSH | ACK] * 8, *[ACK] * 6, SYN, SYN, SYN | ACK, SYN | ACK, FIN | ACK, RST, RST | ACK)
ORDERS = (b"expect 5000", b"anyone 5000", b"anyone 5001", b"pair 5000", b"keep 40", b"keep 0",
          b"nothing", b"fail")  # fmt: skip


class Failed(Exception):
    """Raised by a helper: somebody else's helper may raise anything, anywhere."""


class ObeyingPuppet(Puppet):
    """A puppet that does what it is ordered, and leaves alone what is no order.

    It fails where it is told to, when it is bound to a session from one inside port, and when a
    session from another ends.
    """

    def bind(self, session: Session) -> None:
        if session.sport == FAILS_BOUND:
            raise Failed

    def unbind(self, session: Session) -> None:
        super().unbind(session)
        if session.sport == FAILS_UNBOUND:
            raise Failed

    def _obey(self, session: Session, packet: Packet) -> None:
        if packet.payload == b"fail":
            raise Failed
        if packet.payload in ORDERS:
            super()._obey(session, packet)


def every_helper() -> Apps:
    """Make nfmasq's own helpers, each on its usual port, and puppets beside them."""
    apps: dict[tuple[int, int], App] = dict(helpers({name: OWN[name]().ports for name in OWN}))
    apps[TCP, PUPPET] = ObeyingPuppet(TCP)
    apps[UDP, UDP_PUPPET] = ObeyingPuppet(UDP)
    return apps


class HelpedWay(Way):
    """A masquerade that may have every helper."""

    longest_kept = LONGEST_KEPT

    def take(self, step: Step) -> object:
        try:
            return super().take(step)
        except Failed:
            return "a helper has failed"

    def configure(self, settings: dict[str, Any], apps: str, written: Any, triggers: Any) -> None:
        chosen = every_helper() if apps == "all" else {}
        self.masq.configure(*told(apps=chosen, forwards=forwards_of(written, triggers), **settings))


class HelpedCachedWay(HelpedWay, CachedWay):
    """A masquerade with a flow cache that may have every helper."""


class Cached:
    """A masquerade with a flow cache, led alone; to a `World` it is the plain way."""

    def __init__(self) -> None:
        self.plain = HelpedCachedWay()
        self.ways: list[Way] = [self.plain]

    def take(self, step: Step) -> object:
        """Take a step; asserts that the masquerade and its cache are whole after it."""
        comes_of_it = self.plain.take(step)
        hold_together(self.plain)
        holds_what_it_may(self.plain.masq.sessions, self.plain.cache)
        return comes_of_it


class FastAndPlain(TwoWays):
    """The fast path beside the plain way, with every helper."""

    def __init__(self) -> None:
        super().__init__(HelpedWay(fast=True), HelpedWay(fast=False))
        self.ways: list[Way] = [self.fast, self.plain]


class Program(World):
    """Draws the steps of a program from its bytes."""

    def __init__(self, steering: Steering, ways: Any) -> None:
        super().__init__(0, ways)
        self._random: Steering = steering
        self._next: dict[tuple[Endpoint, Endpoint], int] = {}

    def step(self) -> Step:
        (draw,) = self._random.choices(list(EVERY_KIND), list(EVERY_KIND.values()))
        return step_of(self._pick(self.times), draw(self))

    def leap(self) -> Step:
        return step_of(self._pick((241, 301, 7441)), self.sweep())

    # -- connections and dialogues ---------------------------------------------------

    def speak(self) -> Drawn:
        """Draw a packet of an entry that fits: its next bytes, as its state has them."""
        ms = self._any_entry()
        if ms is None or ms.protocol not in (TCP, UDP):
            return self.begin()
        outward = self._chance(0.5)
        mapped, outside = self._ends(ms, ms.maddr, ms.mport)
        inside, _ = self._ends(ms, ms.saddr, ms.sport)
        packet = self._said(ms, inside, mapped, outside, outward)
        if not outward:
            return "into", packet, False
        return ("own", packet, False) if ms.saddr == ms.maddr else ("out", packet, ms.maddr, False)

    def begin(self) -> Drawn:
        """Draw the first packet of a session with a server where a helper listens."""
        inside, port = self._inside(), self._pick(HELPED)
        outside = self._pick(OUTSIDERS), port
        if port in (SIP, TFTP, UDP_PUPPET):
            return "out", udp(inside, outside, self._phrase(port)), self._maddr(), False
        seq = self._pick(FIRST_SEQS)
        self._next[inside, outside] = seq + 1
        return "out", tcp(inside, outside, SYN, seq=seq), self._maddr(), False

    def call(self) -> Drawn:
        """Draw a packet of a PPTP call."""
        call_id = self._pick((7, 9, 8, 61000, 61001))
        if self._chance(0.5):
            return (
                "out",
                call_data(self._pick(HOSTS), self._pick(OUTSIDERS), call_id),
                self._maddr(),
                False,
            )
        return "into", call_data(self._pick(OUTSIDERS), self._pick(MADDRS), call_id), False

    def _said(
        self, ms: IpMasq, inside: Endpoint, mapped: Endpoint, outside: Endpoint, outward: bool
    ) -> bytes:
        here, there = (inside, outside) if outward else (outside, mapped)
        helped = ms.sport if ms.sport in HELPED else ms.dport
        payload = self._phrase(helped)
        if ms.protocol == UDP:
            return udp(here, there, payload)
        flags = self._pick(FLAGS)
        if flags & SYN:
            payload = b""
            self._next[here, there] = self._pick(FIRST_SEQS)
        back = (outside, mapped) if outward else (inside, outside)
        seq, ack = self._next.get((here, there), 1001), self._next.get(back, 1001)
        if self._chance(0.9):
            self._next[here, there] = (seq + len(payload) + (flags & (SYN | FIN) > 0)) % 2**32
        seq, ack, blocks = seq % 2**32, ack % 2**32, self._blocks(ack)
        return tcp(here, there, flags, payload, seq=seq, ack=ack, tcp_options=blocks)

    def _blocks(self, ack: int) -> bytes:
        """Draw a block of SACK, beyond what is acknowledged or before it; mostly none."""
        if self._chance(0.85):
            return b""
        begin = ack + self._pick((10, 30, 0, -20))
        edges = [edge % 2**32 for edge in (begin, begin + self._pick((5, 40, 0)))]
        return struct.pack("!BBBB2I", 1, 1, 5, 10, *edges)

    def _phrase(self, port: int) -> bytes:
        """Draw what is said on a port: phrases, cut or not, and what a fuzzer makes of them."""
        known = PHRASES.get(port, ORDERS)
        said = b"".join(self._pick(known) for _ in range(self._pick((1, 1, 1, 2, 0))))
        how = self._pick(("whole",) * 5 + ("cut", "rest", "overwritten", "raw"))
        at = self._random.randrange(len(said) + 1) if how != "whole" else 0
        if how == "cut":
            return said[:at]
        if how == "rest":
            return said[at:]
        if how == "raw":
            return self._random.taken(at % 32)
        if how == "overwritten":
            new = self._random.taken(1 + at % 3)
            return said[:at] + new + said[at + len(new) :]
        return said

    # -- whatever bytes ----------------------------------------------------------------

    def raw(self) -> Drawn:
        """Draw a packet of any bytes, behind a header that leads it somewhere or not."""
        packet = self._random.taken(self._pick((20, 28, 40, 48)))
        return self._some_way(packet)

    def overwritten(self) -> Drawn:
        """Draw a packet that was there before, with some of its bytes overwritten."""
        packet = bytearray(self._pick(self._seen))
        for _ in range(self._pick((1, 2, 4))):
            if packet:
                packet[self._random.randrange(min(len(packet), 64))] = self._random.randrange(256)
        made = bytes(packet)
        if len(made) >= 20 and made[0] & 0x0F >= 5 and self._chance(0.8):
            made = with_header(made)
        return self._some_way(made)

    def _some_way(self, packet: bytes) -> Drawn:
        return self._pick_drawn(
            ("out", packet, self._maddr(), False),
            ("out", packet, self._maddr(), True),
            ("into", packet, False),
            ("into", packet, True),
            ("own", packet, False),
            ("hairpin", packet, self._maddr(), False),
            ("hairpin_source", packet, False),
            ("hairpin_own_error", packet),
        )


EVERY_KIND = KINDS | {
    Program.speak: 60,
    Program.begin: 8,
    Program.call: 3,
    Program.raw: 3,
    Program.overwritten: 5,
}
"""How often each kind of step is drawn, beside the others."""


def steps_of(program: bytes) -> list[Step]:
    """Return the steps that a program has; for whoever looks at a finding."""
    steps: list[Step] = []
    with suppress(Exception):
        run(program, steps)
    return steps


def run(program: bytes, steps: list[Step] | None = None) -> None:
    """Lead masquerades along a program. Raises AssertionError, or whatever it was, on a finding.

    The steps are noted in `steps`.
    """
    steering = Steering(program[1:])
    with nothing_left_to_chance():
        ways: Any = Cached() if program[:1] > b"\x7f" else FastAndPlain()
        walked = Program(steering, ways)
        addresses = "addresses", tuple(map(number, MADDRS)), ()
        _take(step_of(0, addresses), walked, ways, steps)
        _take(step_of(0, walked.configure()), walked, ways, steps)
        for _ in range(MOST_STEPS):
            if steering.is_over:
                break
            _take(walked.step(), walked, ways, steps)
        for way in ways.ways:
            laws.at_the_end(way)


def _take(step: Step, walked: Program, ways: Any, steps: list[Step] | None) -> None:
    if steps is not None:
        steps.append(step)
    comes_of_it = ways.take(step)
    laws.of_a_packet(step, comes_of_it)
    walked.saw(step, comes_of_it)
