"""Helpers: what a helper is, what it sees, and what it may do.

A helper reads and rewrites the payload of one protocol that speaks of addresses and ports
(`nfmasq/apps/` has some helpers, docs/apps.md says how to write a helper). It is bound to entries:
to entries that the inside makes to a port of the helper, and to entries made on a person's behalf
(`USER`: a forwarded port) that lead to an inside server on a port of the helper. The helper sees
each packet of these entries when the addresses are rewritten and the sequence numbers are not.

What the helper gets to see is a `Packet`, whose payload it may replace; lengths and checksums
follow. Over TCP the helper leaves the packet to a `Stream` for each direction, and rewrites units
of the stream. What the helper may do is in `Session`: mainly, it may expect another session, which
the outside is to open. Where the two sides agree that something lasts for a time without a packet
(a registration), the helper may keep the session for that time.

An expected session is an entry that the helper's own entry controls. It lets one outside endpoint
in. The endpoint must have the address that the helper's session is with, unless the address cannot
be known. The expected session leads to the helper's own inside host and to a port of 1024 or above.
It ends when nobody comes, when the entry that controls it ends, when the helper's own TCP
connection is over, and when it is the oldest of more than `MOST_EXPECTED` unanswered sessions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from nfmasq.engine.helper.calls import Calls
from nfmasq.engine.helper.connection import Connection
from nfmasq.engine.helper.powers import Powers
from nfmasq.engine.helper.stream import Stream, Units
from nfmasq.engine.table.endings import HELPER
from nfmasq.engine.table.entry import HASHED, NO_DADDR, NO_DPORT, NO_REPLY, OPEN_ENDED, USER, IpMasq
from nfmasq.engine.table.keys import endpoint_key, unserved_key
from nfmasq.engine.table.states import LISTEN
from nfmasq.engine.wire.address import is_private
from nfmasq.engine.wire.protocols import TCP

MOST_EXPECTED = 8
"""The most expected sessions of one session that may be unanswered at a time."""

LONGEST_KEPT = 24 * 3600
"""The most seconds for which a helper keeps a session without a packet: a port is not to be had for
a year by saying so."""

MOST_AGREEMENTS = 64
"""The most agreements of one session that are told apart."""

LEAST_PORT = 1024
"""Ports below this are for a system's own services: a helper opens none of them."""


class App(Protocol):
    """A helper: one object for all its sessions; the state of each session is in `Session.data`."""

    name: str
    """The helper's name in the configuration."""
    protocol: int
    """TCP or UDP, as a protocol number."""
    ports: tuple[int, ...]
    """The server ports that the helper is for, where the configuration names none."""

    def bind(self, session: Session) -> None:
        """Prepare for a session that begins on a port of the helper."""

    def unbind(self, session: Session) -> None:
        """Forget a session that is over; the sessions that it expected end with it."""

    def packet_out(self, session: Session, packet: Packet) -> None:
        """Look at a packet from the inside, and rewrite it if need be; it may be empty."""

    def packet_in(self, session: Session, packet: Packet) -> None:
        """Look at a packet from the outside, and rewrite it if need be; it may be empty."""


Apps: TypeAlias = "Mapping[tuple[int, int], App]"
"""Helpers by (protocol number, server port)."""


class Packet:
    """A packet as a helper sees it: the payload of TCP or UDP, as bytes.

    `seq` and `flags` are TCP's sequence number and flags, else 0.
    """

    __slots__ = ("flags", "payload", "seq")

    def __init__(self, payload: bytes, seq: int = 0, flags: int = 0) -> None:
        self.payload = payload
        self.seq = seq
        self.flags = flags


class Session:
    """The session that a helper is bound to. Addresses and ports are ints in host order.

    `data` is the helper's own. `first_seq` is the sequence number of the SYN that began the
    session. `connection` has the numbers of a TCP connection. `calls` are the calls of PPTP. `app`
    is the helper.
    """

    def __init__(self, ms: IpMasq, app: App, powers: Powers) -> None:
        self.data: Any = None
        self.first_seq: int | None = None
        self.connection = Connection()
        self.calls = Calls(ms, powers)
        self.app = app
        self._ms = ms
        self._powers = powers
        self._expected: list[IpMasq] = []
        self._agreed: dict[bytes, float] = {}  # by agreement: until when it lasts

    @property
    def saddr(self) -> int:
        """The inside host's address."""
        return self._ms.saddr

    @property
    def sport(self) -> int:
        """The inside host's port."""
        return self._ms.sport

    @property
    def maddr(self) -> int:
        """The masquerade address, by which the outside knows the inside host."""
        return self._ms.maddr

    @property
    def mport(self) -> int:
        """The masquerade port."""
        return self._ms.mport

    @property
    def daddr(self) -> int:
        """The outside host's address."""
        return self._ms.daddr

    @property
    def dport(self) -> int:
        """The outside host's port."""
        return self._ms.dport

    @property
    def inside_serves(self) -> bool:
        """Whether the server is inside, on a forwarded port, and the client outside."""
        return self._ms.flags & USER != 0

    def is_secret(self, address: int) -> bool:
        """Say whether an address must not be told outside: the host's own, or any private address.

        The masquerade address is not secret, whatever it is.
        """
        return address != self.maddr and (address == self.saddr or is_private(address))

    def keep(self, seconds: float, agreement: bytes = b"") -> None:
        """Have the session live for at least `seconds` from now on, packets or not.

        The two sides have agreed on it: `agreement` tells this agreement from others of the
        session, of which the longest counts. It is kept for `LONGEST_KEPT` seconds at most. With 0
        it is over, and without another agreement the session lives as any other.
        """
        now = self._powers.now
        self._agreed.pop(agreement, None)
        if seconds > 0:
            self._agreed[agreement] = now + min(seconds, LONGEST_KEPT)
        if len(self._agreed) > MOST_AGREEMENTS:
            del self._agreed[min(self._agreed, key=self._agreed.__getitem__)]
        self._powers.ip_masq_keep(self._ms, max(self._agreed.values(), default=now))

    # -- over TCP -----------------------------------------------------------------------

    def stream_out(self, units: Units) -> Stream:
        """Make the stream from the inside; to be called when the session is bound."""
        stream = Stream(units)
        self._ms.out_seq = stream.shift
        return stream

    def stream_in(self, units: Units) -> Stream:
        """Make the stream from the outside; to be called when the session is bound."""
        stream = Stream(units)
        self._ms.in_seq = stream.shift
        return stream

    # -- expected sessions --------------------------------------------------------------

    def expect(
        self, protocol: int, port: int, *, anyone: bool = False, mport: int = 0
    ) -> int | None:
        """Let the outside open a session with an inside host's port; return the masquerade port.

        Whoever opens the session must have the address of this session's outside host; with
        `anyone` any address is let in. `protocol` is a protocol number. The masquerade port is
        `mport` where `mport` is not 0; else the masquerade port that the inside endpoint has
        already, where the mapping has it used again; else a free port. Where an expected session
        with `port` is unanswered yet, it stays, and its masquerade port is returned.

        None where the masquerade port cannot be had, and where the port is below 1024 or above
        65535.
        """
        if not LEAST_PORT <= port <= 65535:
            return None
        expected_already = self._waiting(protocol, port)
        if expected_already is not None:
            # It is the newest now, so that the sessions announced with it do not make it go.
            self._expected.remove(expected_already)
            self._expected.append(expected_already)
            return expected_already.mport
        if len(self._expected) >= MOST_EXPECTED:
            self._powers.remove(self._expected.pop(0), HELPER)
        mport = mport or self._held_mport(protocol, port)
        flags = NO_REPLY | NO_DPORT | (NO_DADDR if anyone else 0)
        daddr = 0 if anyone else self.daddr
        expected = self._powers.ip_masq_new(
            protocol, self.maddr, mport, self.saddr, port, daddr, 0, flags
        )
        if expected is None:
            return None
        if protocol == TCP:
            self._powers.ip_masq_enter(expected, LISTEN, self._powers.now)
        self._powers.ip_masq_control(expected, self._ms)
        self._powers.ip_masq_put(expected)
        self._expected.append(expected)
        return expected.mport

    def expect_pair(self, protocol: int, port: int) -> tuple[int | None, int | None]:
        """Expect two sessions, with a port and with the next port; return their masquerade ports.

        They are an even port and the next port where two free ports in this order can be had (RTP
        and RTCP), else any two ports. None stands for a session that cannot be had.
        """
        pair = self.expected_mport(protocol, port) or self._held_mport(protocol, port)
        pair = pair or self._powers.choice.select_pair(protocol, self._ms, port)
        first = self.expect(protocol, port, mport=pair)
        if first is None:
            return None, None
        is_free = self._powers.choice.may_select(protocol, self._ms, port + 1, first + 1)
        return first, self.expect(protocol, port + 1, mport=first + 1 if is_free else 0)

    def expected_mport(self, protocol: int, port: int) -> int | None:
        """Return the masquerade port of an unanswered expected session, by inside port, or None."""
        waiting = self._waiting(protocol, port)
        return waiting.mport if waiting is not None else None

    def expected_port(self, protocol: int, mport: int) -> int | None:
        """Return the inside port of an unanswered expected session, by masquerade port, or None."""
        waiting = self._unanswered()
        return next((e.sport for e in waiting if (e.protocol, e.mport) == (protocol, mport)), None)

    def expect_nothing(self) -> None:
        """End the expected sessions that nobody has opened, all calls, and all agreements."""
        for ms in self._unanswered():
            self._powers.remove(ms, HELPER)
        self._expected.clear()
        self.calls.end_all()
        if self._agreed:
            self._agreed.clear()
            self.keep(0)

    def _waiting(self, protocol: int, port: int) -> IpMasq | None:
        """Return the unanswered expected session with an inside port, or None."""
        waiting = self._unanswered()
        wanted = protocol, port, self.maddr  # what waits on a former address is of no use
        return next((e for e in waiting if (e.protocol, e.sport, e.maddr) == wanted), None)

    def _held_mport(self, protocol: int, port: int) -> int:
        """Return the masquerade port of an expected session that has begun, by inside port; or 0.

        So a port that is announced again gets the same masquerade port, even where the mapping
        depends on the destination.
        """
        key = unserved_key(endpoint_key(protocol, self.saddr, port), self.maddr)
        held = self._powers.tables.s_table.newest_with(key, self.daddr)
        if held is None or held.control is not self._ms:
            return 0
        return held.mport

    def _unanswered(self) -> list[IpMasq]:
        """Return the expected sessions that nobody has opened, the oldest first."""
        self._expected = [
            ms for ms in self._expected if ms.flags & HASHED and ms.flags & OPEN_ENDED
        ]
        return self._expected
