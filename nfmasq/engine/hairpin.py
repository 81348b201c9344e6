"""Hairpinning: an inside machine reaches another by its outside address (RFC 4787, REQ-9).

Two sessions meet in such a flow. Inside endpoint A sends to (maddr, mport) of inside endpoint B; so
A has a session with B's outside endpoint, and B one with A's. `mine` is always that of the
sender A, `theirs` that of the receiver B:

      A sends         from A                   to B's maddr:mport
      on the gateway  from A                   to B                   the inside form
      B receives      from A's maddr:mport     to B

It takes two steps: the kernel forwards no packet that comes from an address of its own, so the
source stays A's until the kernel is about to send it. And what stands between the two steps,
connection tracking and the firewall, sees either direction as between A and B. `Hairpins` remembers
by the inside form which sessions a flow is of, for the second step.

An ICMP error goes the other way, and quotes what B received. After the first step it is addressed
to A and quotes the inside form, after the second it comes from B's maddr and quotes what A sent. An
error of the gateway itself quotes the inside form to begin with.

Before the first step gives the source back to A, the packet has gone out by `mine` and come in by
`theirs` as two packets would that a server outside stands between; so limits, states, timers and
filtering, and helpers too, are just those of the common ways (`masquerade.py`).
"""

from __future__ import annotations

from nfmasq.engine.icmp import error_with, quote_as_it_came, quote_as_it_left, read_quote
from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.table.tables import Tables
from nfmasq.engine.watch import Watcher
from nfmasq.engine.wire.header import ICMP_ERRORS, Header, Refused, read_header
from nfmasq.engine.wire.protocols import ICMP, WITH_PORTS
from nfmasq.engine.wire.rewrite import DADDR, SADDR, rewrite_source

Flow = tuple[int, int, int, int, int]
"""Protocol, source and destination address, source and destination port, in the inside form."""

Pair = tuple[IpMasq, IpMasq]
"""`mine` and `theirs`; they are one entry where an endpoint sends to itself."""


class Hairpins(Watcher):
    """The sessions by the flow that they make together, as long as both are there.

    Two sessions of A may meet B's endpoint in the same flow, where B has several outside endpoints
    and A's mapping depends on the destination. The newest packet's sessions stand here then.
    """

    def __init__(self) -> None:
        self._pairs: dict[Flow, Pair] = {}
        self._flows: dict[IpMasq, set[Flow]] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def sessions(self) -> set[IpMasq]:
        """All sessions that a flow is remembered for."""
        return {*self._flows}.union(*self._pairs.values())

    def get(self, header: Header) -> Pair | None:
        """The sessions of a packet in the inside form."""
        return self._pairs.get(
            (header.protocol, header.saddr, header.daddr, header.sport, header.dport)
        )

    def remember(self, mine: IpMasq, theirs: IpMasq) -> None:
        """Have the flow of two sessions found."""
        flow = (mine.protocol, mine.saddr, theirs.saddr, mine.sport, theirs.sport)
        pair = (mine, theirs)
        if self._pairs.get(flow) == pair:
            return
        self._forget(flow)
        self._pairs[flow] = pair
        for ms in pair:
            self._flows.setdefault(ms, set()).add(flow)

    def ended(self, ms: IpMasq, reason: str) -> None:
        """Forget the flows of a session that has ended."""
        for flow in tuple(self._flows.get(ms, ())):
            self._forget(flow)

    def _forget(self, flow: Flow) -> None:
        for ms in set(self._pairs.pop(flow, ())):
            flows = self._flows[ms]
            flows.remove(flow)
            if not flows:
                del self._flows[ms]


def to_inside_form(tables: Tables, hairpins: Hairpins, header: Header, arrived: bytes) -> bytes:
    """The first step: A's packet, which had that header, as it arrives at B, but from A.

    Refused: unknown, where a session is gone already.
    """
    after = read_header(arrived)
    protocol, daddr, dport = header.protocol, header.daddr, header.dport
    mine = _looked_at(
        tables,
        tables.ip_masq_out_get_unlocked(protocol, header.saddr, header.sport, daddr, dport),
    )
    theirs = _looked_at(
        tables,
        tables.ip_masq_in_get_unlocked(protocol, after.saddr, after.sport, daddr, dport),
    )
    hairpins.remember(mine, theirs)
    return bytes(rewrite_source(arrived, after, header.saddr, header.sport))


def from_inside_form(hairpins: Hairpins, packet: bytes) -> bytes:
    """The second step of any packet. Refused: malformed, unknown, as `read_header` does."""
    header = read_header(packet)
    if header.protocol == ICMP:
        quoted, theirs = _quoted_flow(hairpins, packet, header)
        quote = quote_as_it_came(theirs, packet, header, quoted)
        return error_with(packet, header, quote, SADDR, header.saddr, theirs.maddr)
    pair = hairpins.get(header)
    if pair is None:
        raise Refused("unknown")
    mine, _ = pair
    return bytes(rewrite_source(packet, header, mine.maddr, mine.mport))


def error_to_inside_form(
    tables: Tables, hairpins: Hairpins, packet: bytes, header: Header
) -> bytes:
    """The first step of an error about what B received; the same object where it is about else.

    Refused: malformed.
    """
    quoted = read_quote(packet, header)
    if quoted is None or quoted.saddr != header.daddr:
        return packet
    try:
        mine = _sender_of_received(tables, hairpins, quoted)
    except Refused:
        return packet
    quote = quote_as_it_left(mine, packet, header, quoted)
    return error_with(packet, header, quote, DADDR, header.daddr, mine.saddr)


def own_error_from_inside_form(hairpins: Hairpins, packet: bytes) -> bytes:
    """The second step of an error of the gateway itself, whose source stays the gateway.

    The same object where it is about something else, or unreadable.
    """
    try:
        header = read_header(packet)
        quoted, theirs = _quoted_flow(hairpins, packet, header)
    except Refused:
        return packet
    quote = quote_as_it_came(theirs, packet, header, quoted)
    return error_with(packet, header, quote, SADDR, header.saddr, header.saddr)


def _quoted_flow(hairpins: Hairpins, packet: bytes, header: Header) -> tuple[Header, IpMasq]:
    """What an error to A quotes, in the inside form, and B's session."""
    quoted = read_quote(packet, header) if header.kind in ICMP_ERRORS else None
    pair = hairpins.get(quoted) if quoted is not None else None
    if quoted is None or pair is None or quoted.saddr != header.daddr:
        raise Refused("unknown")
    return quoted, pair[1]


def _sender_of_received(tables: Tables, hairpins: Hairpins, quoted: Header) -> IpMasq:
    """A's session, of a packet as B received it. Refused: unknown."""
    if quoted.protocol not in WITH_PORTS:
        raise Refused("unknown")
    protocol, maddr, mport = quoted.protocol, quoted.saddr, quoted.sport
    theirs = _looked_at(
        tables,
        tables.ip_masq_out_get_unlocked(protocol, quoted.daddr, quoted.dport, maddr, mport),
    )
    mine = _looked_at(
        tables,
        tables.ip_masq_in_get_unlocked(protocol, theirs.maddr, theirs.mport, maddr, mport),
    )
    inside_form = quoted._replace(saddr=mine.saddr, sport=mine.sport)
    if hairpins.get(inside_form) != (mine, theirs):
        raise Refused("unknown")
    return mine


def _looked_at(tables: Tables, ms: IpMasq | None) -> IpMasq:
    """What a look-up found, its reference given back: the lock is held until all is done.

    Refused: unknown, where it found nothing.
    """
    if ms is None:
        raise Refused("unknown")
    tables.ip_masq_put_unlocked(ms)
    return ms
