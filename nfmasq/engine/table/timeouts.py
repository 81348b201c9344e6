"""How long an entry lives without a packet, by its state, and the profiles to choose from.

`linux-2.2` has the values of the design document. `rfc` keeps its states and lengthens what
the RFCs ask for: 2 hours and 4 minutes for an established connection (RFC 5382 REQ-5), which
one is until both sides have sent a FIN (RFC 7857 section 2), 4 minutes while one opens or
closes (RFC 5382 REQ-5) and after a reset (RFC 7857 section 2.2), 5 minutes for UDP (RFC 4787
REQ-5), 60 seconds for an ICMP query (RFC 5508 REQ-2). Of other protocols none of them speaks; 10
minutes are what Linux gives a protocol that it does not know.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TypeAlias

TimeoutTable: TypeAlias = "list[float]"
"""Seconds by state, in the order of `states.STATES`; entries refer to it, and it may change."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds without a packet after which an entry expires; the fields stand as the states do."""

    tcp_none: float = 1800
    tcp_established: float = 7440
    tcp_syn_sent: float = 240
    tcp_syn_recv: float = 240
    tcp_fin_wait: float = 7440
    tcp_time_wait: float = 240
    tcp_close: float = 240
    tcp_close_wait: float = 7440
    tcp_last_ack: float = 240
    tcp_listen: float = 240
    udp: float = 300
    icmp: float = 60
    other: float = 600

    def table(self) -> TimeoutTable:
        """The timeouts as a row that a state indexes."""
        return list(astuple(self))


PROFILES = {
    "rfc": Timeouts(),
    "linux-2.2": Timeouts(
        tcp_none=1800,
        tcp_established=900,
        tcp_syn_sent=120,
        tcp_syn_recv=60,
        tcp_fin_wait=120,
        tcp_time_wait=120,
        tcp_close=10,
        tcp_close_wait=60,
        tcp_last_ack=30,
        tcp_listen=120,
        udp=300,
        icmp=60,
        other=600,
    ),
}
"""The profiles of `--timeouts`, by name."""
