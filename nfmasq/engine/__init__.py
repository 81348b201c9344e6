"""The masquerade itself, pure: packets and a time in, packets out.

It opens nothing, starts nothing and asks no clock. The wings: `wire` knows the bytes of packets,
`table` the entries, `forward` what leads from the outside in, `helper` what rewrites payloads.
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
