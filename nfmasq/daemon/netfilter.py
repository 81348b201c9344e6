"""What nfmasq and the rules that lead packets to it agree on: netfilter's hooks, and a mark.

A packet in the queue says at which hook the rules caught it, and which mark they gave it.
"""

from __future__ import annotations

# Plain integers, not an enumeration: the handler compares them several times for each packet.
PREROUTING, FORWARD, OUTPUT = 0, 2, 3
"""Netfilter's hooks (linux/netfilter.h), by the names that the rules have for them.

Packets from the outside are queued at PREROUTING, packets from the inside at FORWARD, and the
gateway's own ICMP errors at OUTPUT.
"""

HAIRPIN_MARK = 0x20000000
"""The bit of the mark that the rules set on what may be a hairpin (engine/hairpin.py): packets from
the inside to an address of the gateway, and the gateway's own errors to the inside."""
