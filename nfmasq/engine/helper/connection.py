"""Which segments of a TCP connection with a helper are believed, and shown to it (RFC 5961).

Anybody can send a reset or a SYN in the name of one side of a connection. The receiver judges it by
its numbers, and goes on where the numbers are wrong. If the masquerade believed it all the same,
the helper would end the sessions that it expects, or begin anew in the middle of a connection.

Theory of operation. Two numbers are kept of each side, both as the side itself counts its bytes:

    acknowledged   the other side has acknowledged all bytes before this number
    sent           all bytes before this number have come by here, without a gap

A reset is believed if its number lies from `acknowledged` to `sent`: the number that the receiver
expects is one of these. The receiver's window is not asked for. A receiver may accept a number
beyond `sent` that is in its window, but then bytes were lost before they came here. A receiver that
goes by RFC 5961 answers with a challenge ACK, and a reset with the right number follows. Of another
receiver the entry stays until its timeout, or until the ports are used again. A reset that answers
a SYN comes from a side that has sent nothing yet. It has to acknowledge what the other side has
sent.

A SYN of a side whose last SYN was acknowledged begins no connection here: it may be forged, or
late, or the host may have started anew. It is passed on as it is and remembered, for its receiver
to judge. A receiver that has the old connection answers with a challenge ACK, which is nothing
special here. If the receiver accepts the SYN, it answers with a SYN of its own that acknowledges
just this SYN. With this answer the connection begins anew. There is one exception: where both SYNs
have the numbers that the connection began with, they have only come late. Even when both sides have
closed, bytes may still be missing.

Anybody inside can send a SYN in the name of a neighbour, and then what the neighbour never said. So
no helper sees a payload before each side has acknowledged what the other has sent: a number that
somebody who only forges the source has not seen. For the side of a SYN this is the SYN. Where the
beginning of a connection was not seen, it is the newest segment.
"""

from __future__ import annotations

from nfmasq.engine.wire.protocols import FIN, RST, SYN
from nfmasq.engine.wire.segment import Segment
from nfmasq.engine.wire.sequence import after

LARGEST_WINDOW = 2**30
"""Bytes; no side may send more than this unacknowledged (RFC 7323 section 2.3)."""


class Side:
    """One side of a connection; see above. `is_open` says that its SYN was acknowledged.

    `first` is the number of its SYN. It is None after a reset, and where no SYN came by; then the
    connection is taken to be open. `is_confirmed` says that the other side has acknowledged what
    this side has sent, since the connection began here.
    """

    __slots__ = ("_has_sent", "acknowledged", "first", "is_confirmed", "is_open", "sent")

    def __init__(self) -> None:
        self.first: int | None = None
        self.acknowledged = 0
        self.sent: int | None = None
        self.is_open = self.is_confirmed = self._has_sent = False

    def has(self, number: int) -> bool:
        """Say whether a number lies from `acknowledged` to `sent`."""
        if self.sent is None:
            return False
        return (number - self.acknowledged) % 2**32 <= (self.sent - self.acknowledged) % 2**32

    def sends(self, segment: Segment) -> None:
        """Note a segment of this side."""
        seq, self._has_sent = segment.seq, True
        if segment.flags & SYN:
            self.first = self.acknowledged = seq
            self.sent = (seq + 1) % 2**32
            self.is_open = self.is_confirmed = False
            return
        end = (seq + segment.length + (segment.flags & FIN > 0)) % 2**32
        if self.sent is None or not (self.is_confirmed or self.first is not None):
            self.acknowledged, self.sent, self.is_open = seq, end, True
        elif after(end, self.sent) and not after(seq, self.sent):
            self.sent = end

    def is_told(self, ack: int) -> None:
        """Note what the other side acknowledges."""
        if self.is_open and self._has_sent and self.has(ack):
            self.is_confirmed = True
        if ack == self.acknowledged and self.is_open:
            return
        if self.sent is None:
            self.acknowledged = self.sent = ack
            self.is_open = True
        elif not self.is_open:
            if ack != self.acknowledged and self.has(ack):
                self.acknowledged, self.is_open = ack, True
                self.is_confirmed = True
        elif 0 < (ack - self.acknowledged) % 2**32 <= LARGEST_WINDOW:
            self.acknowledged = ack
            if after(ack, self.sent):
                self.sent = ack


class Connection:
    """What is known of a connection's two sides: `out` is the inside, `into` the outside.

    `offered` is the number of a SYN that may begin the connection anew, or None.
    """

    __slots__ = ("into", "offered", "out")

    def __init__(self) -> None:
        self.out = Side()
        self.into = Side()
        self.offered: int | None = None

    def passes(self, segment: Segment, told: int | None, outbound: bool) -> None:
        """Note a segment that passes; `told` is its ACK number as its receiver counts, or None."""
        sender, receiver = self._sides(outbound)
        sender.sends(segment)
        if told is not None:
            receiver.is_told(told)
        if segment.flags & RST:
            sender.first = receiver.first = None

    def may_be_shown(self, segment: Segment, outbound: bool) -> bool:
        """Say whether a helper may see a segment's payload; the segment may confirm a side.

        Before both sides are confirmed no number is shifted, so the ACK number is as it came.
        """
        if not self.is_confirmed and segment.ack is not None:
            self._sides(outbound)[1].is_told(segment.ack)
        return self.is_confirmed

    @property
    def is_confirmed(self) -> bool:
        """Whether each side has acknowledged what the other has sent."""
        return self.out.is_confirmed and self.into.is_confirmed

    def is_open(self, outbound: bool) -> bool:
        """Say whether the SYN of a side was acknowledged."""
        return self._sides(outbound)[0].is_open

    def answers_offered(self, segment: Segment) -> bool:
        """Say whether a segment acknowledges just the SYN that was offered."""
        return self.offered is not None and segment.ack == (self.offered + 1) % 2**32

    def begins_anew(self, answer: Segment, outbound: bool) -> bool:
        """Say whether an answer to the SYN that was offered begins another connection.

        It does not where both have the numbers that the connection began with: they come late.
        """
        sender, receiver = self._sides(outbound)
        return (receiver.first, sender.first) != (self.offered, answer.seq)

    def believes_reset(self, segment: Segment, outbound: bool) -> bool:
        """Say whether a reset has a number that its receiver may expect.

        Where nothing is known of both sides, it has.
        """
        sender, receiver = self._sides(outbound)
        if sender.sent is not None:
            return sender.has(segment.seq)
        return receiver.sent is None or (segment.ack is not None and receiver.has(segment.ack))

    def _sides(self, outbound: bool) -> tuple[Side, Side]:
        return (self.out, self.into) if outbound else (self.into, self.out)
