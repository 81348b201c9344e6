"""Which segments of a TCP connection fit its numbers, and so change its entry (RFC 5961).

Anybody can send a reset, a FIN or a SYN in the name of one end of a connection. The other end
judges it by its numbers, and goes on where they are wrong. If the entry believed it all the same,
it would get the timeout of a connection that is over, while both ends go on.

Theory of operation. Of each end the entry has the numbers and the window of the newest segment
(`numbers_out` and `window_out` of the inside, `numbers_in` and `window_in` of the outside). The
fast path puts them there without a look, and a flow cache notes them for the packets that it
carries. So an end's ACK number is the number that the end expects next, and with its window it says
which numbers the end accepts:

    expected = ACK number of the receiving end         expected + window, scaled
       |<------------- a number in here fits ------------->|

    a reset      fits if its number does; a reset that answers a SYN, if it acknowledges the SYN,
                 or if its number follows the SYN that its sender has answered with
    a FIN        fits if its own number does, behind its segment's bytes, and it has an ACK
    a SYN        fits where no connection is alive, to begin one; an answer to a SYN, if it
                 acknowledges the SYN
    no flag      never fits, since every receiver drops it (RFC 9293 section 3.10.7.4)

A SYN on a live connection is passed on, and remembered as offered. A receiver that still has the
connection answers with an ACK, which is nothing special. A receiver that accepts the SYN answers
with a SYN that acknowledges just this SYN: with this answer the connection begins anew. Where
nothing is known of what an end expects, every segment to this end fits: the connection began before
the masquerade saw it.

Since numbers are noted without a look, somebody who forges segments of both ends, from inside and
from outside, can have numbers of his own noted until the next real segments pass. Whoever sees the
packets of an end knows its numbers, and can end its connection without our help.

Numbers are as the end counts that sends the bytes; a helper that shifts them shifts them back.
"""

from __future__ import annotations

from typing import NamedTuple

from nfmasq.engine.table.entry import UNKNOWN_SCALES, IpMasq
from nfmasq.engine.table.states import (
    CLOSE_WAIT,
    ESTABLISHED,
    FIN_WAIT,
    OVER,
    state_after_in,
    state_after_out,
)
from nfmasq.engine.wire.protocols import ACK, FIN, RST, SYN
from nfmasq.engine.wire.segment import Segment

EVENTS = SYN | FIN | RST | ACK
"""The flags that may change a state. With ACK alone of them a segment always fits."""

_ALIVE = frozenset({ESTABLISHED, FIN_WAIT, CLOSE_WAIT})

_LOW = 0xFFFFFFFF
_MOST_IN_A_SYN = 0xFFFF
"""Bytes that a SYN may carry (RFC 7413), which a reset that answers it acknowledges, too."""


def state_after(ms: IpMasq, segment: Segment, outbound: bool) -> int | None:
    """Return the state that a segment leads an entry to; None where the segment does not fit."""
    after = (state_after_out if outbound else state_after_in)(ms.state, segment.flags)
    is_syn = segment.flags & (SYN | RST) == SYN
    if ms.app is not None and segment.flags & (SYN | RST):
        return after  # it was judged before (`helper/connection.py`)
    if is_syn and answers_offered(ms, segment, outbound):
        return ESTABLISHED
    return after if (after == ms.state and not is_syn) or fits(ms, segment, outbound) else None


class End(NamedTuple):
    """What an entry knows of one end: the number of its newest segment, and what it accepts.

    It accepts numbers from `expected` on, `window` bytes of them; None: it has acknowledged nothing
    yet.
    """

    seq: int
    expected: int | None
    window: int


def _end(ms: IpMasq, inside: bool) -> End | None:
    """Return what is known of an end; None where nothing is."""
    if inside:
        numbers, window, scale = ms.numbers_out, ms.window_out, ms.scales >> 4
    else:
        numbers, window, scale = ms.numbers_in, ms.window_in, ms.scales & 0x0F
    if numbers is None:
        return None
    if window is None:
        return End(numbers >> 32, None, 0)
    return End(numbers >> 32, numbers & _LOW, window << scale)


def fits(ms: IpMasq, segment: Segment, outbound: bool) -> bool:
    """Say whether a segment has numbers that its receiver may accept."""
    flags, receiver = segment.flags, _end(ms, not outbound)
    if receiver is None or flags & EVENTS == ACK:
        return True
    if flags & RST:
        return answers_offered(ms, segment, outbound) or _resets(ms, segment, receiver, outbound)
    if flags & SYN:
        is_possible = segment.ack is None or _may_be_told(receiver, segment.ack)
        return is_possible and ms.state not in _ALIVE
    if receiver.expected is None:
        return True
    return segment.ack is not None and _accepts(receiver, segment.seq + segment.length)


def _resets(ms: IpMasq, segment: Segment, receiver: End, outbound: bool) -> bool:
    """Say whether a receiver accepts the number of a reset."""
    if receiver.expected is not None:
        return _accepts(receiver, segment.seq)
    sender = _end(ms, outbound)
    if sender is not None and ms.state in _ALIVE:
        return (segment.seq - sender.seq) & _LOW <= 1
    return segment.ack is not None and _may_be_told(receiver, segment.ack)


def _accepts(end: End, number: int) -> bool:
    """Say whether a number is from the one that an end expects to the end of its window."""
    return end.expected is not None and (number - end.expected) & _LOW <= end.window


def _may_be_told(end: End, ack: int) -> bool:
    """Say whether an ACK number may be for an end; where it has sent its SYN alone, for the SYN."""
    return end.expected is not None or 0 < (ack - end.seq) & _LOW <= 1 + _MOST_IN_A_SYN


def answers_offered(ms: IpMasq, segment: Segment, outbound: bool) -> bool:
    """Say whether a segment acknowledges just the SYN that the other end has offered."""
    if ms.offered is None or segment.ack is None:
        return False
    return ms.offered == (not outbound, (segment.ack - 1) & _LOW)


def confirms(ms: IpMasq, ack: int) -> bool:
    """Say whether the outside acknowledges what the inside has sent, a SYN at least.

    It acknowledges the inside's newest segment as far as its begin, and a SYN wholly. Nobody can
    who has not seen what the inside sends.
    """
    return ms.numbers_out is not None and (ack - (ms.numbers_out >> 32)) & _LOW <= 1


def note(ms: IpMasq, segment: Segment, outbound: bool) -> None:
    """Note what a segment that fits tells of its sender, beside what the fast path notes."""
    flags = segment.flags
    if flags & RST or (segment.ack is None and not flags & SYN):
        return
    if flags & SYN:
        _begin(ms, segment, outbound)
    numbers = segment.seq << 32 | (segment.ack or 0)
    window = segment.window if segment.ack is not None else None
    if outbound:
        ms.numbers_out, ms.window_out = numbers, window
    else:
        ms.numbers_in, ms.window_in = numbers, window


def _begin(ms: IpMasq, segment: Segment, outbound: bool) -> None:
    """Note that a connection begins, with the scale of one end's window.

    The windows are scaled where both SYNs say so (RFC 7323 section 2.2).
    """
    if ms.state in OVER:
        ms.numbers_out = ms.numbers_in = ms.window_out = ms.window_in = None
        ms.scales = UNKNOWN_SCALES
    ms.offered = None
    if segment.scale is None and segment.ack is not None:
        ms.scales = 0
    elif outbound:
        ms.scales = (segment.scale or 0) << 4 | ms.scales & 0x0F
    else:
        ms.scales = ms.scales & 0xF0 | (segment.scale or 0)
