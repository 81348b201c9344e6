"""The kernel's forwarding, without which nothing of the inside gets any further."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from nfmasq.config.configuration import ON
from nfmasq.errors import NfmasqError

log = logging.getLogger(__name__)

SWITCH = Path("/proc/sys/net/ipv4/ip_forward")


def check(wanted: str, switch: Path = SWITCH) -> None:
    """Raise NfmasqError where forwarding is to be switched on, and cannot be."""
    if wanted == ON and not _is_on(switch) and not os.access(switch, os.W_OK):
        raise NfmasqError("forwarding cannot be switched on here: net.ipv4.ip_forward is read-only")


def settle(wanted: str, switch: Path = SWITCH) -> None:
    """Switch forwarding on where that is wanted, or else say that it is off."""
    if _is_on(switch):
        return
    if wanted == ON:
        switch.write_text("1")
        log.info("net.ipv4.ip_forward was 0, and is 1 now")
    else:
        log.warning(
            "this machine forwards nothing, net.ipv4.ip_forward is 0: sysctl -w "
            "net.ipv4.ip_forward=1, or nfmasq run --forwarding on"
        )


def _is_on(switch: Path) -> bool:
    return switch.read_text().strip() == "1"
