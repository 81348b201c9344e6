"""The masquerade itself, pure: packets and a time in, packets out."""

from nfmasq.engine.by_address import OTHER_PROTOCOLS
from nfmasq.engine.counters import ICMP, PROTOCOLS, TCP, UDP, Counters, Traffic
from nfmasq.engine.entry import Flags, IpMasq
from nfmasq.engine.mapping import BEHAVIOURS
from nfmasq.engine.masquerade import Masquerade
from nfmasq.engine.ports import PORT_SELECTIONS
from nfmasq.engine.timeouts import PROFILES, Timeouts

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
