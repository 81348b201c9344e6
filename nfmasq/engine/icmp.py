"""ICMP: queries by their identifier, errors by the packet they quote (RFC 5508).

A query and its reply are a session whose port is the identifier. An error belongs to the session of
the packet it quotes, which travelled the other way. An error from the outside quotes a packet that
left with maddr and mport as its source. An error from the inside quotes a packet that came in with
saddr and sport as its destination. The quoted packet is rewritten to what the error's receiver
knows, together with its checksums, and the error's own checksum is computed anew.

An error makes no entry, refreshes none and ends none. So an error gets its entry with the bare
look-up and gives it back with the bare put, which leave the timer alone. All of this happens under
one lock, so that no sweep comes between. An error goes to the sender of the packet that it quotes,
and to nobody else.
"""

from __future__ import annotations

from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.table.keys import session_key
from nfmasq.engine.table.tables import Tables
from nfmasq.engine.wire.address import is_private
from nfmasq.engine.wire.checksum import checksum, difference, ones_sum
from nfmasq.engine.wire.gre import GRE
from nfmasq.engine.wire.header import Header, Refused, read_quoted_header
from nfmasq.engine.wire.protocols import ICMP, TCP
from nfmasq.engine.wire.rewrite import (
    DADDR,
    IP_CHECKSUM,
    SADDR,
    adjust_at,
    write_destination,
    write_source,
)
from nfmasq.engine.wire.sequence import unfix_quoted

_ERROR_HEADER = 8


def masquerade_error(tables: Tables, packet: bytes, header: Header) -> bytes:
    """Return an error from the inside, rewritten to come from the masquerade address.

    The error is about a packet that came in. Raises Refused: malformed; unknown, where the quoted
    packet has no entry, or the error is not addressed to the quoted packet's sender.
    """
    quoted = _quoted(tables, packet, header)
    ms = _session_it_came_by(tables, quoted)
    if ms is None or quoted is None:
        raise Refused("unknown")
    if quoted.saddr != header.daddr:
        tables.ip_masq_put_unlocked(ms)
        raise Refused("unknown")
    quote = quote_as_it_came(ms, packet, header, quoted)
    tables.ip_masq_put_unlocked(ms)
    return error_with(packet, header, quote, SADDR, header.saddr, ms.maddr)


def demasquerade_error(tables: Tables, packet: bytes, header: Header) -> bytes:
    """Return an error from the outside, rewritten to go to the inside machine.

    The error is about a packet that went out. Returns the same object where the quoted packet has
    no entry, or the error is not addressed to the quoted packet's sender. Raises Refused:
    malformed.
    """
    quoted = _quoted(tables, packet, header)
    ms = _session_it_left_by(tables, quoted)
    if ms is None or quoted is None:
        return packet
    if quoted.saddr != header.daddr:
        tables.ip_masq_put_unlocked(ms)
        return packet
    quote = quote_as_it_left(ms, packet, header, quoted)
    tables.ip_masq_put_unlocked(ms)
    return error_with(packet, header, quote, DADDR, header.daddr, ms.saddr)


def mend_own_error(tables: Tables, packet: bytes, header: Header) -> bytes:
    """Mend an error of the gateway itself, which is about a packet that is rewritten already.

    Where the packet came in and could not go on to the inside, the error leaves for the outside,
    and has to quote the packet as it came. Where the packet was going out, the error is addressed
    to the gateway's own masquerade address, and is rewritten to go to the inside machine. Any other
    error is returned as the same object. Raises Refused: malformed; unknown, where an error that
    would be returned as it is quotes an inside address.
    """
    quoted = _quoted(tables, packet, header)
    ms = _session_it_came_by(tables, quoted)
    if ms is not None and quoted is not None:
        quote = quote_as_it_came(ms, packet, header, quoted)
        tables.ip_masq_put_unlocked(ms)
        return error_with(packet, header, quote, SADDR, header.saddr, header.saddr)
    mended = demasquerade_error(tables, packet, header)
    if mended is packet and _quotes_inside(packet, header):
        raise Refused("unknown")
    return mended


def read_quote(packet: bytes, header: Header) -> Header | None:
    """Read the header of the packet that an error quotes; None where it can belong to no session.

    Raises Refused: malformed.
    """
    if ones_sum(packet[header.transport :]):
        raise Refused("malformed")
    return read_quoted_header(packet[header.transport + _ERROR_HEADER :])


def _quoted(tables: Tables, packet: bytes, header: Header) -> Header | None:
    """Read the header of the packet that an error quotes, without a call that no helper knows of.

    A packet of a call that no helper knows of went by address. None and Refused are as `read_quote`
    has them.
    """
    quoted = read_quote(packet, header)
    if quoted is None or not quoted.is_of_call:
        return quoted
    answer = session_key(quoted.daddr, quoted.saddr, quoted.dport, quoted.sport)
    is_known = answer in tables.out_index[GRE] or answer in tables.in_index[GRE]
    return quoted if is_known else quoted.without_call()


def _session_it_came_by(tables: Tables, quoted: Header | None) -> IpMasq | None:
    """Find the entry of a quoted packet that came in, rewritten; None where there is none.

    A reference to the entry is counted.
    """
    if quoted is None:
        return None
    # A query's session has no outside port; its identifier stands in both places of the header.
    outside_port = 0 if quoted.protocol == ICMP else quoted.sport
    return tables.ip_masq_out_get_unlocked(
        quoted.protocol, quoted.daddr, quoted.dport, quoted.saddr, outside_port
    )


def _session_it_left_by(tables: Tables, quoted: Header | None) -> IpMasq | None:
    """Find the entry of a quoted packet that went out, rewritten; None where there is none.

    A reference to the entry is counted.
    """
    if quoted is None:
        return None
    outside_port = 0 if quoted.protocol == ICMP else quoted.dport
    return tables.ip_masq_in_get_unlocked(
        quoted.protocol, quoted.daddr, outside_port, quoted.saddr, quoted.sport
    )


def _quotes_inside(packet: bytes, header: Header) -> bool:
    """Say whether an error of the gateway would tell others of a packet to an inside address.

    An inside address is a private address that is not the gateway's own.
    """
    if header.saddr == header.daddr:
        return False  # it tells itself, about a connection of its own
    at = header.transport + _ERROR_HEADER + DADDR
    address = int.from_bytes(packet[at : at + 4], "big")
    return is_private(address) and address != header.saddr


def quote_as_it_came(ms: IpMasq, packet: bytes, header: Header, quoted: Header) -> bytearray:
    """Return the quoted packet, which went to the inside endpoint, as it came to the mport."""
    quote = bytearray(packet[header.transport + _ERROR_HEADER :])
    write_destination(quote, quoted, ms.maddr, ms.mport)
    if quoted.protocol == TCP:
        unfix_quoted(quote, quoted, ms.in_seq, ms.out_seq)
    return quote


def quote_as_it_left(ms: IpMasq, packet: bytes, header: Header, quoted: Header) -> bytearray:
    """Return the quoted packet, which came from the mport, as it left the inside endpoint."""
    quote = bytearray(packet[header.transport + _ERROR_HEADER :])
    write_source(quote, quoted, ms.saddr, ms.sport)
    if quoted.protocol == TCP:
        unfix_quoted(quote, quoted, ms.out_seq, ms.in_seq)
    return quote


def error_with(
    packet: bytes, header: Header, quote: bytearray, address_at: int, old: int, new: int
) -> bytes:
    """Return the error with a new quote and one of its addresses replaced.

    `address_at` is where the address stands in the IP header, in bytes; `old` and `new` are
    addresses in host order.
    """
    outer = bytearray(packet[: header.transport])
    outer[address_at : address_at + 4] = new.to_bytes(4, "big")
    adjust_at(outer, IP_CHECKSUM, difference(old, new))
    message = bytearray(packet[header.transport : header.transport + _ERROR_HEADER]) + quote
    message[2:4] = bytes(2)
    message[2:4] = checksum(message).to_bytes(2, "big")
    return bytes(outer + message)
