"""What becomes of each queued packet: which way it goes, the engine, the verdict.

This is the packet path. Everything here happens once a packet, so the handler is one closure, one
straight line, over names bound beforehand. Whatever goes wrong costs the packet at hand and no
other, and a packet in doubt is dropped: no inside address leaves the gateway by mistake.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic
from typing import Protocol

from netfilterqueue import Packet

from nfmasq.daemon.log import RateLimit
from nfmasq.daemon.oversize import COPIED
from nfmasq.engine import Masquerade
from nfmasq.engine.counters import protocol_name

log = logging.getLogger(__name__)
log.addFilter(RateLimit(limit=5, period=60))

PREROUTING, FORWARD, OUTPUT = 0, 2, 3
"""The netfilter hooks (linux/netfilter.h): from the outside, from the inside, our own errors."""

SAMPLE = 256
"""One packet in so many is timed; a power of two."""


class Addresses(Protocol):
    """Whence the masquerade address (`daemon/addresses.py`)."""

    @property
    def known(self) -> Mapping[int, int]:
        """The address by outgoing interface, of the interfaces with one answer for all packets.

        Always the same mapping, whose contents may change.
        """

    def pick(self, interface: int, packet: bytes) -> int | None:
        """The address for this packet, its interface not being in `known`; None: there is none."""


def packet_handler(
    engine: Masquerade,
    addresses: Addresses,
    observe: Callable[[float], None],
    whole: Callable[[Packet], Packet] = lambda packet: packet,
) -> Callable[[Packet], None]:
    """The callback for the packets of a queue: each gets its verdict, whatever happens.

    `observe` gets the seconds from a packet's arrival here to its verdict, of one in SAMPLE.
    `whole` makes a packet whole that may have been cut (`daemon/oversize.py`).
    """
    masquerade = engine.ip_fw_masquerade
    demasquerade = engine.ip_fw_demasquerade
    own_error = engine.ip_fw_own_error
    counters = engine.counters
    errors = counters.errors
    known = addresses.known.get
    pick = addresses.pick

    def handle(packet: Packet) -> None:
        payload = b""
        try:
            payload = packet.get_payload()
            now = monotonic()
            if len(payload) == COPIED:
                packet = whole(packet)
                payload = packet.get_payload()
            hook = packet.hook
            verdict: bytes | None
            if hook == FORWARD:
                interface = packet.outdev
                maddr = known(interface) or pick(interface, payload)
                if maddr is None:
                    verdict = None
                    errors["no_address"] += 1
                    counters.outbound[protocol_name(payload)].dropped += 1
                else:
                    verdict = masquerade(payload, maddr, now)
            elif hook == PREROUTING:
                verdict = demasquerade(payload, now)
            elif hook == OUTPUT:
                verdict = own_error(payload, now)
            else:
                raise RuntimeError(f"a packet came from netfilter hook {hook}: check the rules")

            if verdict is None:
                packet.drop()
            else:
                if verdict is not payload:
                    packet.set_payload(verdict)
                packet.accept()

            # The kernel numbers the packets, so the sample needs no counter here.
            if not packet.id % SAMPLE:
                observe(monotonic() - now)
        except Exception as error:
            give_up(packet, payload, error)

    def give_up(packet: Packet, payload: bytes, error: Exception) -> None:
        """Drop a packet on which something failed, unless it has its verdict already."""
        with suppress(RuntimeError):
            packet.drop()
        direction = counters.inbound if packet.hook == PREROUTING else counters.outbound
        direction[protocol_name(payload)].dropped += 1
        errors["exception"] += 1
        log.error(
            "a packet was lost to a fault of nfmasq: %r",
            error,
            exc_info=log.isEnabledFor(logging.DEBUG),
        )

    return handle
