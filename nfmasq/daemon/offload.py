"""What a host leaves to its network card: cutting superpackets into packets, and checksums.

A queue that asks for superpackets gets every packet as it is at that moment, and with it the
kernel's word on what has been left for later (`nfnetlink.skb_info`). A packet that is given back
rewritten counts as finished, though. Hence:

* A single packet gets its checksum from the engine, while it is rewritten.
* A superpacket gets the checksums of its parts from the kernel, when it is cut. Over TCP that takes
  nothing; over UDP the kernel goes by the sum of the pseudo header, which so has to be there.
* From the outside it passes connection tracking first. Where that verifies checksums
  (`conntrack.py`), a superpacket over TCP needs its checksum as a single packet does. Over UDP its
  one field cannot serve both, so it is better cut at once.
* So is one that NFQUEUE has no room for, and one whose checksum is not said to be missing: what
  then stands in the field is its first packet's affair.
* In other protocols (a tunnel, SCTP) what is left to the card may be a checksum in another place,
  or of another kind, which only the kernel knows. Such a packet, superpacket or not, is queued
  again as the kernel finishes it.
"""

from __future__ import annotations

from nfmasq.daemon.nfnetlink import CHECKSUM_MISSING, MOST_COPIED
from nfmasq.engine.wire.checksum import without_checksum
from nfmasq.engine.wire.protocols import TCP, UDP


def must_be_cut(superpacket: bytes, info: int, verified: bool) -> bool:
    """Whether a superpacket can be rewritten only as single packets.

    `info` is as from `skb_info`; `verified` whether connection tracking will verify the checksum.
    """
    if len(superpacket) >= MOST_COPIED or not info & CHECKSUM_MISSING:
        return True
    return superpacket[9] != TCP and (verified or superpacket[9] != UDP)


def ready_to_be_cut(superpacket: bytes) -> bytes:
    """A rewritten superpacket as the kernel needs it."""
    return without_checksum(superpacket) if superpacket[9] == UDP else superpacket
