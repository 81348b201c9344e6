"""What a host leaves to its network card: cutting superpackets into packets, and checksums.

A queue that asks for superpackets gets every packet as it is at this moment, and with the packet
what the kernel says has been left for later (`nfnetlink.skb_info`). But a packet that is given back
rewritten counts as finished. Hence:

* A single packet gets its checksum from the engine, while it is rewritten.
* A superpacket gets the checksums of its parts from the kernel, when it is cut. Over TCP the kernel
  needs nothing for this; over UDP it needs the sum of the pseudo header in the checksum field.
* A superpacket from the outside passes connection tracking before it is cut. Where connection
  tracking verifies checksums (`conntrack.py`), a superpacket over TCP needs its checksum as a
  single packet does. Over UDP the field cannot hold both the checksum and the sum of the pseudo
  header, so the superpacket is better cut at once.
* A superpacket that NFQUEUE has no room for is cut at once, too. So is a superpacket whose checksum
  the kernel does not call missing: what stands in its checksum field is for its first packet only.
* In other protocols (a tunnel, SCTP) what is left to the card may be a checksum in another place,
  or of another kind, which only the kernel knows. A packet of these protocols, superpacket or not,
  is queued again, finished by the kernel.
"""

from __future__ import annotations

from nfmasq.daemon.nfnetlink import CHECKSUM_MISSING, MOST_COPIED
from nfmasq.engine.wire.checksum import without_checksum
from nfmasq.engine.wire.protocols import TCP, UDP


def must_be_cut(superpacket: bytes, info: int, verified: bool) -> bool:
    """Say whether a superpacket (IPv4, with its header) can be rewritten only as single packets.

    `info` is what `skb_info` returns; `verified` says whether connection tracking will verify the
    checksum.
    """
    if len(superpacket) >= MOST_COPIED or not info & CHECKSUM_MISSING:
        return True
    return superpacket[9] != TCP and (verified or superpacket[9] != UDP)


def ready_to_be_cut(superpacket: bytes) -> bytes:
    """Return a rewritten superpacket (TCP or UDP) as the kernel needs it to cut it."""
    return without_checksum(superpacket) if superpacket[9] == UDP else superpacket
