"""The masquerade itself: packets and a time go in, packets come out.

It is pure: it opens nothing, starts nothing and reads no clock. Below it are four packages, its
wings: `wire` knows the bytes of packets, `table` holds the entries, `forward` leads what comes from
the outside to inside hosts, and `helper` rewrites payloads.
"""

from nfmasq.engine.counters import Counters, Traffic
from nfmasq.engine.masquerade import Masquerade
from nfmasq.engine.settings import Settings
from nfmasq.engine.table.entry import Flags, IpMasq
from nfmasq.engine.table.mapping import BEHAVIOURS
from nfmasq.engine.table.ports import PORT_SELECTIONS
from nfmasq.engine.table.timeouts import PROFILES, Timeouts
from nfmasq.engine.watch import Watcher
from nfmasq.engine.wire.by_address import OTHER_PROTOCOLS
from nfmasq.engine.wire.protocols import ICMP, PROTOCOLS, TCP, UDP

__all__ = [
    "BEHAVIOURS",
    "ICMP",
    "OTHER_PROTOCOLS",
    "PORT_SELECTIONS",
    "PROFILES",
    "PROTOCOLS",
    "TCP",
    "UDP",
    "Counters",
    "Flags",
    "IpMasq",
    "Masquerade",
    "Settings",
    "Timeouts",
    "Traffic",
    "Watcher",
]
