"""Whether connection tracking verifies the checksums of packets in this network namespace.

It does where something uses it (a stateful firewall, the kernel's own NAT), unless the sysctl
net.netfilter.nf_conntrack_checksum is 0. The kernel does not tell whether something uses it; but a
flow that is tracked is counted, so where the count is 0 there is none to whose packets it matters.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic

SYSCTLS = Path("/proc/sys/net/netfilter")

_LOOK_AGAIN_SECONDS = 1.0


class Conntrack:
    """Connection tracking in this network namespace, also where it comes or goes meanwhile."""

    def __init__(self, sysctls: Path = SYSCTLS) -> None:
        self._sysctls = sysctls
        self._open: list[int] = []
        self._look_again = 0.0

    def verifies(self) -> bool:
        """Whether a flow may be tracked and the checksums of its packets verified, right now."""
        if not self._open and not self._found():
            return False
        try:
            return all(os.pread(file, 16, 0) != b"0\n" for file in self._open)
        except OSError:  # the kernel module is gone
            self.close()
            return False

    def _found(self) -> bool:
        """Open the sysctls, which are there as long as the kernel module is."""
        now = monotonic()
        if now < self._look_again:
            return False
        self._look_again = now + _LOOK_AGAIN_SECONDS
        try:
            for name in ("nf_conntrack_count", "nf_conntrack_checksum"):
                self._open.append(os.open(self._sysctls / name, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self.close()
        return bool(self._open)

    def close(self) -> None:
        """Close the sysctls."""
        while self._open:
            os.close(self._open.pop())
