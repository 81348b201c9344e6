"""The entry: a row of the table. It stands for one session of an inside and an outside machine.

An entry has three endpoints (an address and a port each). They are named after a packet that goes
out: s is its source, d its destination, and m takes the place of the source.

    saddr, sport   the inside endpoint
    maddr, mport   the masquerade endpoint, which stands for the inside endpoint outside
    daddr, dport   the outside endpoint

So a packet from the inside comes from s, and leaves from m to d. A packet from the outside comes
from d to m, and goes on to s. The names are the same when the outside began the session. Entries
are found by s in the s-table, and by m in the m-table (`tables.py`).
"""

from __future__ import annotations

import enum
from typing import Any, Protocol

from nfmasq.engine.table.precomputed import Rewrite
from nfmasq.engine.table.states import NONE, STATES
from nfmasq.engine.table.timeouts import TimeoutTable
from nfmasq.engine.table.timers import Slot
from nfmasq.engine.wire.sequence import IpMasqSeq


class Helper(Protocol):
    """What an entry knows of the helper that is bound to it (`helper/app.py`): its name."""

    name: str


class Server(Protocol):
    """What an entry knows of the server inside that serves its session (`forward/server.py`)."""

    def entered(self, state: int) -> None:
        """Count a session that is in a state from now on."""

    def left(self, state: int) -> None:
        """Take a session that was in a state out of the count."""

    @property
    def takes_new(self) -> bool:
        """Whether the server may be given another session."""


class WaitingLine(Protocol):
    """What an entry knows of the line in which it stands (`line.py`)."""

    def leave(self, ms: IpMasq) -> None:
        """Take an entry of this line out."""


class Flags(enum.IntFlag):
    """Flags of an entry. Entries hold them as a plain int, which is faster to test.

    In the design document their names begin with IP_MASQ_F_: IP_MASQ_F_HASHED, IP_MASQ_F_NO_DADDR,
    IP_MASQ_F_NO_DPORT, IP_MASQ_F_NO_SPORT, IP_MASQ_F_DLOOSE, IP_MASQ_F_NO_REPLY, IP_MASQ_F_MPORT,
    IP_MASQ_F_USER. It does not know of OUTSIDE, OWN, CACHED, HALF_OPEN, UNCONFIRMED and
    OUTSIDE_WAITS.
    """

    HASHED = 0x01  # the entry is in both tables, the s-table and the m-table
    NO_DADDR = 0x02  # daddr is not known yet: any matches, and the first packet fills it in
    NO_DPORT = 0x04  # dport is not known yet: any matches, and the first packet fills it in
    NO_SPORT = 0x08  # sport is not known yet: the first packet from the inside fills it in
    DLOOSE = 0x10  # any outside endpoint matches; daddr and dport are the newest packet's
    NO_REPLY = 0x20  # made by or for the inside, and no packet has come from the outside yet
    MPORT = 0x40  # the maker of the entry asked for this mport; it was not chosen for the entry
    USER = 0x80  # made because a person or a program wants it (a forward), not only for a packet
    OUTSIDE = 0x100  # a packet from the outside made the entry
    OWN = 0x200  # a flow of the gateway itself: saddr is maddr
    CACHED_OUT = 0x400  # a flow cache carries the packets to the outside
    CACHED_IN = 0x800  # a flow cache carries the packets to the inside
    HALF_OPEN = 0x1000  # the inside began, over TCP, and has not acknowledged an answer yet
    UNCONFIRMED = 0x2000  # made by the outside, which has not shown yet that it gets the answers
    OUTSIDE_WAITS = 0x4000  # the outside has closed first, over TCP, and waits for late segments


HASHED = Flags.HASHED.value
NO_DADDR = Flags.NO_DADDR.value
NO_DPORT = Flags.NO_DPORT.value
NO_SPORT = Flags.NO_SPORT.value
DLOOSE = Flags.DLOOSE.value
NO_REPLY = Flags.NO_REPLY.value
MPORT = Flags.MPORT.value
USER = Flags.USER.value
OUTSIDE = Flags.OUTSIDE.value
OWN = Flags.OWN.value
CACHED_OUT = Flags.CACHED_OUT.value
CACHED_IN = Flags.CACHED_IN.value
CACHED = CACHED_OUT | CACHED_IN
HALF_OPEN = Flags.HALF_OPEN.value
UNCONFIRMED = Flags.UNCONFIRMED.value
OUTSIDE_WAITS = Flags.OUTSIDE_WAITS.value

UNKNOWN_SCALE = 8
"""The shift of a TCP window where no SYN came by: 16 MB at most. More is hardly ever on its way.
Somebody who guesses a number hits such a window once in 256 times."""
UNKNOWN_SCALES = UNKNOWN_SCALE << 4 | UNKNOWN_SCALE

MASQ_DADDR_PASS = NO_DADDR | DLOOSE
"""With any of these flags every outside address matches."""
MASQ_DPORT_PASS = NO_DPORT | DLOOSE
"""With any of these flags every outside port matches."""
OPEN_ENDED = NO_DADDR | NO_DPORT | NO_SPORT | DLOOSE
"""With any of these flags not all of the session's five values are fixed."""
UNSETTLED = NO_REPLY | HALF_OPEN
"""With any of these flags nobody has shown that there is somebody on both sides."""


class IpMasq:
    """An entry of the table: a session, its endpoints, its state and its timer.

    This is `struct ip_masq` of the design document. Addresses and ports are ints in host order. For
    an ICMP query the identifiers stand in the place of ports: `sport` is the identifier inside,
    `mport` the identifier outside, and `dport` is 0.

    An entry may control others: a session whose helper expects other sessions controls their
    entries. It does not expire before they do, and they end when it is removed.
    """

    __slots__ = (
        "app",  # the helper that is bound to the entry; or None
        "app_data",  # the helper's view of the session, and its data (`helper/app.py`); or None
        "awaited",  # what acknowledges the outside's SYN (HALF_OPEN); None: no SYN came
        "bytes_in",  # bytes of the packets in `packets_in`, IP headers included
        "bytes_out",  # bytes of the packets in `packets_out`, IP headers included
        "control",  # the entry that controls this entry; or None
        "daddr",  # the outside address
        "dport",  # the outside port
        "flags",  # see `Flags`
        "h_newer",  # the entry of the inside host that was made after this entry (`roll.py`)
        "h_older",  # the entry of the inside host that was made before this entry
        "in_seq",  # how TCP sequence numbers from the outside are shifted; None: not at all
        "l_back",  # the entry before this entry in its line (`line.py`), or the line; or None
        "l_link",  # the entry after this entry in its line, or the line; or None
        "line",  # the line in which the entry waits to make room; or None
        "m_back",  # the entry before this entry in its chain of the m-table; or None
        "m_link",  # the entry after this entry in its chain of the m-table; or None
        "maddr",  # the masquerade address
        "mport",  # the masquerade port
        "n_control",  # how many entries this entry controls
        "newer",  # the entry that was made after this entry, or what stands there (`roll.py`)
        "numbers_in",  # of the newest segment from the outside: seq << 32 | ack; None: unknown
        "numbers_out",  # of the newest segment from the inside: seq << 32 | ack; None: unknown
        "offered",  # a SYN on a live connection: whether it went out, its number (`numbers.py`)
        "older",  # the entry that was made before this entry, or what stands there
        "out_seq",  # how TCP sequence numbers from the inside are shifted; None: not at all
        "packets_in",  # packets of the session from the outside that were rewritten
        "packets_out",  # packets of the session from the inside that were rewritten
        "protocol",  # the number of the protocol
        "refcnt",  # how many refer to the entry: the two tables, and whoever uses it
        "rewrite",  # what the fast path writes into packets (`fastpath.py`); None: not computed
        "s_back",  # the entry before this entry in its chain of the s-table; or None
        "s_link",  # the entry after this entry in its chain of the s-table; or None
        "saddr",  # the inside address
        "scales",  # shifts of TCP's windows: the inside's << 4 | the outside's
        "server",  # the server that counts the session, where it is by a forwarded port; or None
        "slot",  # where the timing wheel will look at the entry next (`timers.py`); or None
        "sport",  # the inside port
        "state",  # an index of `states.STATES`
        "t_back",  # the entry before this entry in its slot (`timers.py`), or the slot; or None
        "t_link",  # the entry after this entry in its slot, or the slot; or None
        "timeout",  # seconds without a packet after which the entry expires, in its state
        "timeout_table",  # seconds by state; all entries share the list
        "timer",  # when the entry expires, in seconds of the packets' clock; None while in use
        "window_in",  # the outside's window, not scaled; None: it has acknowledged nothing yet
        "window_out",  # the inside's window, not scaled; None: it has acknowledged nothing yet
    )

    # Not set before the entry stands in a slot, in a line, on the roll: nobody reads them before.
    t_link: Any
    t_back: Any
    l_link: Any
    l_back: Any
    newer: Any
    older: Any
    h_newer: Any
    h_older: Any

    def __init__(
        self,
        protocol: int,
        maddr: int,
        mport: int,
        saddr: int,
        sport: int,
        daddr: int,
        dport: int,
        flags: int,
        timeout_table: TimeoutTable,
        state: int = NONE,
    ) -> None:
        self.protocol = protocol
        self.maddr = maddr
        self.mport = mport
        self.saddr = saddr
        self.sport = sport
        self.daddr = daddr
        self.dport = dport
        self.flags = flags
        self.refcnt = 0
        self.m_link: IpMasq | None = None
        self.m_back: IpMasq | None = None
        self.s_link: IpMasq | None = None
        self.s_back: IpMasq | None = None
        self.rewrite: Rewrite | None = None
        self.timer: float | None = None
        self.slot: Slot | None = None
        self.line: WaitingLine | None = None
        self.server: Server | None = None
        self.out_seq: IpMasqSeq | None = None
        self.in_seq: IpMasqSeq | None = None
        self.app: Helper | None = None
        self.app_data: Any = None
        self.control: IpMasq | None = None
        self.n_control = 0
        self.awaited: int | None = None
        self.timeout_table = timeout_table
        self.state = state
        self.timeout = timeout_table[state]
        self.numbers_out: int | None = None
        self.numbers_in: int | None = None
        self.window_out: int | None = None
        self.window_in: int | None = None
        self.scales = UNKNOWN_SCALES
        self.offered: tuple[bool, int] | None = None
        self.packets_out = 0
        self.packets_in = 0
        self.bytes_out = 0
        self.bytes_in = 0

    @property
    def state_name(self) -> str:
        """Name the state, as in `states.STATES`."""
        return STATES[self.state]
