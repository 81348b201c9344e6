"""How long an entry lives without a packet, by its state, and the profiles to choose from.

The profile `linux-2.2` has the values of the design document. The profile `rfc` keeps its states,
and lengthens timeouts as the RFCs ask:

    2 hours 4 minutes  an established TCP connection (RFC 5382 REQ-5); a connection is established
                       until both sides have sent a FIN (RFC 7857 section 2)
    4 minutes          a TCP connection that opens or closes (RFC 5382 REQ-5), or was reset
                       (RFC 7857 section 2.2)
    5 minutes          UDP (RFC 4787 REQ-5)
    30 seconds         DNS over UDP: a question and its answer need a port no longer (RFC 4787
                       REQ-5a allows it for well-known ports)
    60 seconds         an ICMP query (RFC 5508 REQ-2)

These RFCs do not speak of other protocols. 10 minutes are what Linux gives a protocol that it does
not know.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TypeAlias

TimeoutTable: TypeAlias = "list[float]"
"""Seconds by state, in the order of `states.STATES`. Entries refer to the list; it may change."""


LONGEST = 365 * 24 * 3600
"""The most seconds that a timeout may have; it has more than 0."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds without a packet after which an entry expires; a field for each state, in order."""

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
    udp_dns: float = 30

    def table(self) -> TimeoutTable:
        """Return the timeouts as a list; a state is the index of its timeout."""
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
        udp_dns=300,
    ),
}
"""The profiles of `--timeouts`, by name."""
