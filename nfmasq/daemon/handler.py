"""What becomes of each queued packet: its way through the engine, and its verdict.

This is the packet path. Everything here happens once a packet, so the handler is one closure, one
straight line, over names bound beforehand. Whatever goes wrong costs the packet at hand and no
other packet, and a packet in doubt is dropped: no inside address leaves the gateway by mistake.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic
from typing import Protocol

from netfilterqueue import Packet

from nfmasq.daemon.log import RateLimit
from nfmasq.daemon.netfilter import FORWARD, HAIRPIN_MARK, OUTPUT, PREROUTING
from nfmasq.daemon.nfnetlink import CHECKSUM_MISSING, MOST_COPIED, SUPERPACKET, skb_info
from nfmasq.daemon.offload import must_be_cut, ready_to_be_cut
from nfmasq.daemon.oversize import Oversize
from nfmasq.daemon.verdicts import Verdicts
from nfmasq.engine import Masquerade
from nfmasq.engine.wire.checksum import UnknownChecksum
from nfmasq.engine.wire.protocols import protocol_name

log = logging.getLogger(__name__)
log.addFilter(RateLimit(limit=5, period=60))

SAMPLE = 256
"""One packet in `SAMPLE` packets is timed; a power of two."""


Handler = Callable[[Packet, bytes, Verdicts], None]
"""Gives a packet its verdict; the bytes are the kernel's message that brought the packet."""


class Addresses(Protocol):
    """Gives packets their masquerade addresses (`daemon/addresses.py`).

    An interface is its index; a packet is a whole IPv4 packet; an address is in host order.
    """

    @property
    def known(self) -> Mapping[int, int]:
        """The address by outgoing interface, of the interfaces with one address for all packets.

        Always the same dictionary, whose contents may change.
        """

    def pick(self, interface: int, packet: bytes) -> int | None:
        """Return the address, or None, for a packet whose interface is not in `known`."""

    def pick_for_hairpin(self, packet: bytes) -> int:
        """Return the address for a packet from the inside to an address of the gateway."""


def packet_handler(
    engine: Masquerade,
    addresses: Addresses,
    observe: Callable[[float], None],
    oversize: Oversize | None = None,
    verifies: Callable[[], bool] = lambda: False,
    send_own: Callable[[], None] | None = None,
) -> Handler:
    """Make the handler of a queue's packets: each packet gets its verdict, whatever happens.

    `observe` gets the seconds that one packet in `SAMPLE` packets took. Without `oversize`, packets
    that the kernel hands over cut are lost. `verifies` tells whether connection tracking verifies
    checksums (`daemon/conntrack.py`). `send_own` empties the engine's outbox, and never fails.
    """
    masquerade = engine.ip_fw_masquerade
    demasquerade = engine.ip_fw_demasquerade
    own = engine.ip_fw_own
    hairpin = engine.ip_fw_hairpin
    hairpin_source = engine.ip_fw_hairpin_source
    hairpin_own_error = engine.ip_fw_hairpin_own_error
    counters = engine.sessions.counters
    drop = engine.sessions.drop
    known = addresses.known.get
    pick = addresses.pick
    pick_for_hairpin = addresses.pick_for_hairpin
    outbox = engine.outbox
    send_own = send_own or outbox.clear
    lasting, lasts = engine.sessions.cached.lasting, engine.sessions.cached.lasts

    def handle(packet: Packet, message: bytes, verdicts: Verdicts) -> None:
        payload = b""
        try:
            now = monotonic()
            payload = packet.get_payload()
            hook, number = packet.hook, packet.id
            marked = packet.mark & HAIRPIN_MARK
            info = skb_info(message, len(payload))
            unsummed = info == CHECKSUM_MISSING
            if info & SUPERPACKET:
                unsummed = hook == PREROUTING and verifies()
                if marked and hook == FORWARD:
                    info |= CHECKSUM_MISSING  # it was missing until PREROUTING rewrote the packet
                if must_be_cut(payload, info, unsummed):
                    verdicts.cut(number)
                    return
            elif len(payload) == MOST_COPIED and hook == OUTPUT:
                verdicts.accept(number)  # `Oversize` sends it, rewritten
                return
            elif oversize and len(payload) == MOST_COPIED:
                payload = oversize.whole(payload)

            sent: bytes | None
            if marked:
                sent = marked_packet(hook, payload, now, unsummed)
            elif hook == FORWARD:
                interface = packet.outdev
                maddr = known(interface) or pick(interface, payload)
                if maddr is None:
                    sent = None
                    drop(payload, "no_address")
                    counters.outbound[protocol_name(payload)].dropped += 1
                else:
                    sent = masquerade(payload, maddr, now, unsummed)
            elif hook == PREROUTING:
                sent = demasquerade(payload, now, unsummed)
            elif hook == OUTPUT:
                sent = own(payload, now, unsummed)
            else:
                raise wrong_hook(hook)

            # The kernel numbers the packets, so the sample needs no counter here.
            if not number % SAMPLE:
                observe(monotonic() - now)

            if sent is payload:
                verdicts.accept(number)
            elif sent is None:
                verdicts.drop(number)
            elif info & SUPERPACKET and hook == PREROUTING and is_for_gateway(sent, payload):
                verdicts.cut(number)  # nobody would fill its checksums in on the way to a program
            elif info & SUPERPACKET:
                verdicts.replace(number, ready_to_be_cut(sent))
            elif len(sent) <= MOST_COPIED:
                verdicts.replace(number, sent)
            else:
                if oversize:
                    oversize.send(sent, hook, packet.outdev)
                verdicts.drop(number)
        except UnknownChecksum:
            verdicts.cut(packet.id)
        except Exception as error:
            verdicts.drop(packet.id)
            with suppress(MemoryError):
                tell(packet.hook, payload, error)
        if lasting:
            lasts(packet.outdev)
        if outbox:
            send_own()

    def is_for_gateway(sent: bytes, payload: bytes) -> bool:
        """Say whether a packet from the outside went to another port of the gateway itself."""
        return sent[16:20] == payload[16:20]

    def marked_packet(hook: int, payload: bytes, now: float, unsummed: bool) -> bytes | None:
        if hook == FORWARD:
            return hairpin_source(payload, now, unsummed)
        if hook == OUTPUT:
            return hairpin_own_error(payload, now)
        if hook != PREROUTING:
            raise wrong_hook(hook)
        sent = hairpin(payload, pick_for_hairpin(payload), now, unsummed)
        if sent is not None and sent is not payload and len(sent) > MOST_COPIED:
            sent = hairpin_source(sent, now)  # `Oversize` sends it, so it does not pass FORWARD
        return sent

    def wrong_hook(hook: int) -> RuntimeError:
        return RuntimeError(f"a packet came from netfilter hook {hook}: check the rules")

    def tell(hook: int, payload: bytes, error: Exception) -> None:
        """Count, and log, a packet that is lost because something failed."""
        direction = counters.inbound if hook == PREROUTING else counters.outbound
        direction[protocol_name(payload)].dropped += 1
        drop(payload, "exception")
        log.error(
            "a packet was lost to a fault of nfmasq: %r",
            error,
            exc_info=log.isEnabledFor(logging.DEBUG),
        )

    return handle
