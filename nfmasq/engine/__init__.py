"""The masquerade itself, pure: packets and a time in, packets out."""

from nfmasq.engine.counters import Counters, Traffic
from nfmasq.engine.masquerade import Masquerade
from nfmasq.engine.table.entry import Flags, IpMasq
from nfmasq.engine.table.mapping import BEHAVIOURS
from nfmasq.engine.table.ports import PORT_SELECTIONS
from nfmasq.engine.table.timeouts import PROFILES, Timeouts
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
    "Timeouts",
    "Traffic",
]
