"""Which packets from the inside make a session: whichever has none, if nothing is against it.

Nearly always nothing is. The fast path (`fastpath.py`) asks `open_flow` for the entry of a flow's
first packet over TCP or UDP, and takes that packet as it does those that follow. Where anything
might be in the way `open_flow` makes none, and changes nothing. Then the packet goes the plain way
(`masquerade.py`) and comes to `_new_from_inside`, which knows all that a packet can be refused for,
and tells and counts it. `tests/test_opening.py` holds the two against each other.
"""

from __future__ import annotations

from collections import deque
from struct import Struct
from typing import Any

from nfmasq.engine.admission import AdmittingSessions
from nfmasq.engine.resets import Resets
from nfmasq.engine.table.entry import NO_REPLY, IpMasq
from nfmasq.engine.table.limits import TokenBucket
from nfmasq.engine.table.precomputed import Rewrite
from nfmasq.engine.table.states import NONE, STATE_UDP, state_after_out
from nfmasq.engine.wire.header import Header, Refused
from nfmasq.engine.wire.messages import PROHIBITED, may_be_told, unreachable
from nfmasq.engine.wire.protocols import ACK, RST, SYN, TCP, UDP

ERRORS_PER_SECOND = 100
"""Inside hosts are told of that many refused packets at most."""

MOST_TO_SEND = 65_536
"""Packets that wait in `outbox`; when there are more, the oldest are forgotten."""

_OPENED = {TCP: state_after_out(NONE, SYN), UDP: STATE_UDP}
"""The state that a flow's first packet leads to."""

_session_of = Struct("!IIHH").unpack


class OpeningSessions(AdmittingSessions):
    """All sessions of one masquerade, most of which the inside makes.

    `outbox` collects the packets that the masquerade itself has to say.
    """

    def __init__(self, **settings: Any) -> None:
        self.outbox: deque[bytes] = deque(maxlen=MOST_TO_SEND)
        self._resets: Resets | None = None
        self._errors_to_inside = TokenBucket(ERRORS_PER_SECOND, ERRORS_PER_SECOND)
        super().__init__(**settings)

    def configure(self, *, reset_on_address_change: bool = True, **settings: Any) -> None:
        """Take on settings: those of `Sessions.configure`, and whether there is a
        `reset_on_address_change` (`resets.py`).
        """
        with self.lock:
            super().configure(**settings)
            ended = self._resets or Resets()
            self._resets = ended if reset_on_address_change else None

    def open_flow(
        self, protocol: int, key: bytes, flags: int, maddr: int, now: float
    ) -> IpMasq | None:
        """The entry, its timer running, of a packet that has none; None where it cannot be had just
        for the asking, and nothing has changed.

        The packet is well-formed, of TCP or UDP; `key` is that of its session (see
        `tables.session_key`), and `flags` are those of TCP.
        """
        if protocol == TCP and flags & (SYN | ACK | RST) != SYN:
            return None
        saddr, daddr, sport, dport = _session_of(key)
        with self.lock:
            self.now = now
            if (
                self.tables.may_have_mapping(protocol, saddr, sport)
                or self._entries >= self.max_entries
                or (protocol, dport) in self.apps
                or self.forwards.triggers
                or not (sport and dport)
                or (self._resets and self._resets.remembers(key))
                or not self.hosts.may_open(saddr, now)
            ):
                return None
            mport = self._select_port(self.ports, protocol, maddr, sport)
            if mport is None:
                return None
            ms = self._make(
                protocol, maddr, mport, saddr, sport, daddr, dport, NO_REPLY, _OPENED[protocol]
            )
            ms.rewrite = Rewrite(ms)
            self.wheel.set(ms, now, ms.timeout)
            return ms

    def _new_from_inside(
        self, packet: bytes, header: Header, maddr: int, dport: int
    ) -> IpMasq | None:
        """A new session; None, counted, where it cannot be had."""
        if self._resets and self._resets.is_ended(header, self.now):
            self._send_of_our_own(self._resets.reset_for(packet, header))
            raise Refused("address_changed")
        if self.forwards and header.is_second_segment:
            # A server's, to a SYN whose session made room: it must not take the inside's instead.
            raise Refused("unknown")
        if not self.hosts.may_make_entry(header.saddr, self.now):
            self.counters.errors["host_rate"] += 1
            return None
        ms = self.ip_masq_new(
            header.protocol,
            maddr,
            0,
            header.saddr,
            header.sport,
            header.daddr,
            dport,
            NO_REPLY,
        )
        if ms is not None:
            self.forwards.fire(ms, self.now)
        return ms

    def _tell_prohibited(self, packet: bytes, header: Header) -> None:
        """Tell an inside host that its session cannot be had (RFC 5508 REQ-8), not too often."""
        if may_be_told(header) and self._errors_to_inside.take(self.now):
            self._send_of_our_own(unreachable(packet, PROHIBITED, 0))

    def _send_of_our_own(self, packet: bytes | None) -> None:
        if packet is not None:
            self.outbox.append(packet)
