"""The entry: one session of an inside machine with an outside machine, and its flags."""

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
    """What an entry knows of the server inside that it leads to (`forward/server.py`)."""

    def entered(self, state: int) -> None:
        """Count a session that is in a state from now on."""

    def left(self, state: int) -> None:
        """Count a session no more that was in a state."""

    def is_given_up(self, state: int) -> bool:
        """Say whether a first segment, for a session in a state, begins another session."""


class Flags(enum.IntFlag):
    """Flags of an entry. Entries hold them as a plain int, which is faster to test."""

    HASHED = 0x01  # it is in both tables
    NO_DADDR = 0x02  # the destination address is not known yet
    NO_DPORT = 0x04  # the destination port is not known yet
    NO_SPORT = 0x08  # the source port is not known yet
    DLOOSE = 0x10  # any destination matches, and the newest is remembered
    NO_REPLY = 0x20  # nothing has come back yet
    MPORT = 0x40  # its mport was asked for, not allocated
    USER = 0x80  # made on behalf of a person or program, not of a packet
    OUTSIDE = 0x100  # made by a packet from the outside


HASHED = Flags.HASHED.value
NO_DADDR = Flags.NO_DADDR.value
NO_DPORT = Flags.NO_DPORT.value
NO_SPORT = Flags.NO_SPORT.value
DLOOSE = Flags.DLOOSE.value
NO_REPLY = Flags.NO_REPLY.value
MPORT = Flags.MPORT.value
USER = Flags.USER.value
OUTSIDE = Flags.OUTSIDE.value

MASQ_DADDR_PASS = NO_DADDR | DLOOSE
MASQ_DPORT_PASS = NO_DPORT | DLOOSE
OPEN_ENDED = NO_DADDR | NO_DPORT | NO_SPORT | DLOOSE
"""Any of these: the five values of the session are not all fixed."""


class IpMasq:
    """An entry, `struct ip_masq` of the design document.

    Addresses and ports are ints in host order; for ICMP queries the identifier stands in the
    place of the inside port (`sport`, and `mport` outside), and `dport` is 0.
    """

    __slots__ = (
        "app",  # the helper bound to it, or None
        "app_data",  # the helper's view of it, with its own data (`helper/app.py`), or None
        "bytes_in",
        "bytes_out",
        "control",  # the entry that controls this one, or None
        "daddr",
        "dport",
        "flags",
        "in_seq",  # shift of sequence numbers from the outside, or None
        "m_back",
        "m_link",  # neighbours in the m-table's chain
        "maddr",
        "mport",
        "n_control",  # how many entries this one controls
        "out_seq",  # shift of sequence numbers from the inside, or None
        "packets_in",
        "packets_out",
        "protocol",
        "refcnt",
        "rewrite",  # what its packets need, once the fast path has computed it (`fastpath.py`)
        "s_back",
        "s_link",  # neighbours in the s-table's chain
        "saddr",
        "server",  # that counts it, where the outside made it through a forwarded port; or None
        "slot",  # where the timing wheel will look at it next, or None
        "sport",
        "state",
        "timeout",  # seconds
        "timeout_table",
        "timer",  # when it expires, in the clock of the packets; None while it is in use
    )

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
        self.slot: Slot[IpMasq] | None = None
        self.server: Server | None = None
        self.out_seq: IpMasqSeq | None = None
        self.in_seq: IpMasqSeq | None = None
        self.app: Helper | None = None
        self.app_data: Any = None
        self.control: IpMasq | None = None
        self.n_control = 0
        self.timeout_table = timeout_table
        self.state = state
        self.timeout = timeout_table[state]
        self.packets_out = 0
        self.packets_in = 0
        self.bytes_out = 0
        self.bytes_in = 0

    @property
    def state_name(self) -> str:
        """Name the state, as in `states.STATES`."""
        return STATES[self.state]
