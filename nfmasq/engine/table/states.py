"""The states of an entry, and the TCP state table.

A masquerade sees both halves of a TCP connection and belongs to neither half. So its states are a
summary, kept for two purposes: to choose the timeout, and to know what is over and may make room.
The event of a packet is the first of its flags in the order RST, SYN, FIN, ACK; a packet with none
of these flags leads to CLOSE. A segment that does not fit the numbers of its connection is no event
(`numbers.py`). The state table below is written as in the design document. It has a
row for each direction and event, and a column for each state before the packet; the cell is the
state after the packet. UDP, ICMP and the other protocols have one state each. DNS over UDP has a
state of its own.

Three cells are not as in the document. An ACK from the inside leads from CLOSE and from SYN_RECV to
ESTABLISHED. A reset leads to CLOSE where its number is one that its receiver may accept
(`numbers.py`). But its receiver may want the very number that it expects next (RFC 5961). Where the
inside goes on all the same, its next ACK makes the connection ESTABLISHED again (RFC 7857 section
2). A packet from the outside does not do this: it may come long after the inside has closed.

In the document no ACK leads on from SYN_RECV: the entry waits for a SYN from the inside. It waits
in vain where the inside has sent its SYN before. So it is with a port that a helper expects a
session on, when the inside opens a connection from this port: the SYN from the inside leaves the
entry in LISTEN, and its answer leads to SYN_RECV. So it is when a SYN comes for a connection that
the inside has half closed, late or forged. An ACK from the inside says that the inside knows of the
connection. Otherwise the connection would have no more than the timeout of SYN_RECV, which RFC 5382
(REQ-5) gives to connections that open.

In the document the SYN of the outside leads from SYN_SENT to ESTABLISHED. But a server answers
anybody, and whoever forges the source of a SYN has its session answered, too. So the answer leads
to SYN_RECV, and an ACK from the inside to ESTABLISHED. Over a session that the inside has begun it
must be the ACK of the outside's SYN, with its number (`Sessions.ip_masq_may_enter`).
"""

from __future__ import annotations

from nfmasq.engine.wire.protocols import ACK, FIN, RST, SYN, UDP

STATES = (
    "NONE",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "UDP",
    "ICMP",
    "OTHER",
    "DNS",
)
"""Names of the states; a state is the index of its name."""

NONE = STATES.index("NONE")
ESTABLISHED = STATES.index("ESTABLISHED")
SYN_SENT = STATES.index("SYN_SENT")
TIME_WAIT = STATES.index("TIME_WAIT")
CLOSE = STATES.index("CLOSE")
FIN_WAIT = STATES.index("FIN_WAIT")
CLOSE_WAIT = STATES.index("CLOSE_WAIT")
LISTEN = STATES.index("LISTEN")
STATE_UDP = STATES.index("UDP")
STATE_ICMP = STATES.index("ICMP")
STATE_OTHER = STATES.index("OTHER")
STATE_DNS = STATES.index("DNS")

OPENING = frozenset({NONE, SYN_SENT, STATES.index("SYN_RECV")})
OVER = frozenset({CLOSE, STATES.index("TIME_WAIT"), STATES.index("LAST_ACK")})

EXCHANGES = frozenset({STATE_DNS, STATE_ICMP})
"""The states of sessions that consist of questions and answers. Such a session is over, until the
next question, when each question has been answered."""

STATE_OF_SERVICE = {(UDP, 53): STATE_DNS}
"""The first state of sessions with a service, by protocol and outside port, where it differs from
the first state of the protocol."""

_TABLE = """
            NO  ES  SS  SR  FW  TW  CL  CW  LA  LI
    in syn  SR  ES  SR  SR  SR  SR  SR  SR  SR  SR
    in fin  CL  CW  SS  TW  TW  TW  CL  CW  LA  LI
    in ack  CL  ES  SS  SR  FW  TW  CL  CW  CL  LI
    in rst  CL  CL  CL  SR  CL  CL  CL  CL  LA  LI
    out syn SS  ES  SS  ES  SS  SS  SS  SS  SS  LI
    out fin TW  FW  SS  TW  FW  TW  CL  TW  LA  LI
    out ack ES  ES  SS  ES  FW  TW  ES  CW  LA  ES
    out rst CL  CL  SS  CL  CL  TW  CL  CL  CL  CL
"""


def _event(flags: int) -> str | None:
    """Return the event of TCP flags (the header's 14th byte); None where no flag makes an event."""
    for name, bit in (("rst", RST), ("syn", SYN), ("fin", FIN), ("ack", ACK)):
        if flags & bit:
            return name
    return None


def _rows(direction: str) -> tuple[tuple[int, ...], ...]:
    """Make a row for each value of the low five TCP flag bits: the next state by the last state."""
    header, *lines = _TABLE.strip().splitlines()
    columns = header.split()
    rows = {
        tuple(cells[:2]): tuple(columns.index(cell) for cell in cells[2:])
        for cells in map(str.split, lines)
    }
    closing = (CLOSE,) * len(columns)
    return tuple(rows.get((direction, _event(flags) or ""), closing) for flags in range(32))


_OUT = _rows("out")
_IN = _rows("in")


AFTER_ACK_OUT, AFTER_ACK_IN = _OUT[ACK], _IN[ACK]
"""The state after a plain ACK from the inside or the outside, by the state before."""


def state_after_out(state: int, flags: int) -> int:
    """Return the TCP state after a packet from the inside; `flags` are the header's 14th byte."""
    return _OUT[flags & 0x1F][state]


def state_after_in(state: int, flags: int) -> int:
    """Return the TCP state after a packet from the outside; `flags` are the header's 14th byte."""
    return _IN[flags & 0x1F][state]
