"""The settings of a masquerade: each with its default, and with the values it may have.

Defaults, ranges and choices stand here once. The command line, the configuration file and the
documentation take them from these fields (`option.py`). The settings that the daemon has beside
them stand in `nfmasq/config/` in the same form. Helpers and forwards are not values but live
objects, which remember what they have seen; they are handed over beside the settings
(`Masquerade.configure`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nfmasq.engine.option import name_field, number_field
from nfmasq.engine.table.mapping import ADDRESS_DEPENDENT, BEHAVIOURS, ENDPOINT_INDEPENDENT
from nfmasq.engine.table.ports import PORT_SELECTIONS
from nfmasq.engine.table.timeouts import PROFILES, Timeouts
from nfmasq.engine.unsolicited import DROP, UNSOLICITED
from nfmasq.engine.wire import by_address
from nfmasq.engine.wire.protocols import PROTOCOLS

DEFAULT_PORTS = range(61000, 65096)
"""Above the ports that Linux gives its own programs (net.ipv4.ip_local_port_range)."""

MOST_ENTRIES = 1 << 26

OVERLAP = "overlap"
REFUSE = "refuse"

WHEN_PORTS_RUN_OUT = (OVERLAP, REFUSE)
"""The choices of `--when-ports-run-out`: one port serves several inside endpoints, each with other
destinations; or a session without a port is refused."""


def _for_all(behaviour: str) -> dict[int, str]:
    """Return a dict that has one behaviour for all protocol numbers."""
    return dict.fromkeys(PROTOCOLS, behaviour)


@dataclass(frozen=True)
class Settings:
    """The settings of one masquerade; `Settings()` has the defaults."""

    ports: Sequence[int] = DEFAULT_PORTS
    """The masquerade ports that sessions are given, ascending, at least one."""
    mapping: Mapping[int, str] = field(
        default_factory=lambda: _for_all(ENDPOINT_INDEPENDENT), metadata={"choices": BEHAVIOURS}
    )
    """Which sessions of an inside endpoint share an mport (RFC 4787), by protocol number."""
    filtering: Mapping[int, str] = field(
        default_factory=lambda: _for_all(ADDRESS_DEPENDENT), metadata={"choices": BEHAVIOURS}
    )
    """Who outside may answer to an mport (RFC 4787), by protocol number."""
    port_selection: str = name_field("sequential", PORT_SELECTIONS)
    """How a masquerade port is chosen."""
    when_ports_run_out: str = name_field(OVERLAP, WHEN_PORTS_RUN_OUT)
    """Whether a port may serve several inside endpoints when all ports are taken."""
    other_protocols: str = name_field(by_address.DROP, by_address.OTHER_PROTOCOLS)
    """What is done with protocols other than TCP, UDP and ICMP."""
    timeouts: Timeouts = field(default=PROFILES["rfc"])
    """Seconds without a packet after which an entry expires."""
    max_entries: int = number_field(1_048_576, low=1, high=MOST_ENTRIES)
    """The most entries there may be."""
    max_entries_per_host: int = number_field(0, low=0, high=MOST_ENTRIES)
    """The most entries that an inside host may have; 0: no limit."""
    max_ports_per_host: int = number_field(0, low=0, high=65535)
    """The most masquerade ports that an inside host may hold; 0: no limit."""
    max_new_per_host: int = number_field(0, low=0, high=MOST_ENTRIES)
    """The most entries that an inside host may make in a second; 0: no limit."""
    inbound_refresh: bool = True
    """Whether a packet from the outside restarts its entry's timer, as a packet from the inside
    always does (RFC 4787 REQ-6)."""
    flow_cache_after: int = number_field(16, low=1, high=1 << 20)
    """How many packets of a flow, in one direction, come here before a flow cache carries it."""
    unsolicited: str = name_field(DROP, UNSOLICITED)
    """What becomes of a SYN from outside that nobody asked for (`unsolicited.py`)."""
    reset_on_address_change: bool = True
    """Whether inside hosts are told that the address of a TCP connection is gone (`resets.py`)."""
