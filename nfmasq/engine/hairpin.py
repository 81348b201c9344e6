"""Hairpinning: an inside machine reaches another by an outside address (RFC 4787, REQ-9).

Theory of operation. Inside endpoint A sends to (maddr, mport) of inside endpoint B. Two sessions
meet in this flow: A has a session with B's masquerade endpoint, and B has a session with A's
masquerade endpoint. `mine` is always the session of the sender A, `theirs` is the session of the
receiver B:

      A sends         from A                   to B's maddr:mport
      on the gateway  from A                   to B                   the inside form
      B receives      from A's maddr:mport     to B

The rewrite takes two steps. The kernel does not route a packet that comes from an address of its
own, so the source stays A until the kernel is about to send the packet. Connection tracking and the
firewall stand between the two steps, and see both directions as between A and B. For the second
step, `Hairpins` remembers by the inside form which two sessions a flow belongs to.

An ICMP error goes the other way, and quotes what B received. After the first step the error is
addressed to A and quotes the inside form. After the second step it comes from B's maddr and quotes
what A sent. An error of the gateway itself quotes the inside form from the beginning.

Before the first step gives the source back to A, the packet has gone out by `mine` and come in by
`theirs`, like two packets with an outside server between them. So limits, states, timers, filtering
and helpers work as on the common ways (`masquerade.py`).
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
"""Protocol, source and destination address, source and destination port, in the inside form; ints
in host order."""

Pair = tuple[IpMasq, IpMasq]
"""`mine` and `theirs`; both are the same entry where an endpoint sends to itself."""


class Hairpins(Watcher):
    """Remembers by flow which two sessions make a hairpin, as long as both have entries.

    Two sessions of A may meet B's endpoint in the same flow, where B has several masquerade
    endpoints and A's mapping depends on the destination. Then the flow leads to the sessions of the
    newest packet.
    """

    def __init__(self) -> None:
        self._pairs: dict[Flow, Pair] = {}
        self._flows: dict[IpMasq, set[Flow]] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def sessions(self) -> set[IpMasq]:
        """Return the entries of all sessions that a flow is remembered for."""
        return {*self._flows}.union(*self._pairs.values())

    def get(self, header: Header) -> Pair | None:
        """Return the two sessions of a packet in the inside form; None where it has none."""
        return self._pairs.get(
            (header.protocol, header.saddr, header.daddr, header.sport, header.dport)
        )

    def remember(self, mine: IpMasq, theirs: IpMasq) -> None:
        """Remember the flow of two sessions, so that `get` finds it."""
        flow = (mine.protocol, mine.saddr, theirs.saddr, mine.sport, theirs.sport)
        pair = (mine, theirs)
        if self._pairs.get(flow) == pair:
            return
        self._forget(flow)
        self._pairs[flow] = pair
        for ms in pair:
            self._flows.setdefault(ms, set()).add(flow)

    def ended(self, ms: IpMasq, reason: str) -> None:
        """Forget the flows of an entry that has ended."""
        for flow in tuple(self._flows.get(ms, ())):
            self._forget(flow)

    def _forget(self, flow: Flow) -> None:
        for ms in set(self._pairs.pop(flow, ())):
            flows = self._flows[ms]
            flows.remove(flow)
            if not flows:
                del self._flows[ms]


def to_inside_form(tables: Tables, hairpins: Hairpins, header: Header, arrived: bytes) -> bytes:
    """Take the first step: return A's packet as it arrives at B, but with A as its source.

    `header` is the header of the packet as A sent it, `arrived` is the packet as it arrives at B.
    Raises Refused: unknown, where one of the two sessions is gone already.
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
    """Take the second step: return a packet in the inside form, or an error, as it is to leave.

    Raises Refused: unknown, where the flow is not known; malformed, and the other reasons of
    `read_header`.
    """
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
    """Take the first step of an ICMP error about a packet that B received.

    Returns the same object where the error is about another packet. Raises Refused: malformed.
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
    """Take the second step of an error of the gateway itself; the source stays the gateway.

    Returns the same object where the packet is about something else, or unreadable.
    """
    try:
        header = read_header(packet)
        quoted, theirs = _quoted_flow(hairpins, packet, header)
    except Refused:
        return packet
    quote = quote_as_it_came(theirs, packet, header, quoted)
    return error_with(packet, header, quote, SADDR, header.saddr, header.saddr)


def _quoted_flow(hairpins: Hairpins, packet: bytes, header: Header) -> tuple[Header, IpMasq]:
    """Return what an error to A quotes, in the inside form, and B's session.

    Raises Refused: malformed, unknown.
    """
    quoted = read_quote(packet, header) if header.kind in ICMP_ERRORS else None
    pair = hairpins.get(quoted) if quoted is not None else None
    if quoted is None or pair is None or quoted.saddr != header.daddr:
        raise Refused("unknown")
    return quoted, pair[1]


def _sender_of_received(tables: Tables, hairpins: Hairpins, quoted: Header) -> IpMasq:
    """Return A's session for the header of a packet as B received it. Raises Refused: unknown."""
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
    """Return the entry that a look-up found, with the reference to it given back.

    No reference is needed: the caller holds the lock until all is done. Raises Refused: unknown,
    where the look-up found nothing.
    """
    if ms is None:
        raise Refused("unknown")
    tables.ip_masq_put_unlocked(ms)
    return ms
