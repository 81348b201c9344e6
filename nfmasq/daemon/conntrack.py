"""Whether connection tracking verifies the checksums of packets in this network namespace.

Connection tracking does so where something uses it (a stateful firewall, the kernel's own NAT),
unless the sysctl net.netfilter.nf_conntrack_checksum is 0. The kernel does not tell whether
something uses connection tracking. But it counts the connections that are tracked: where the count
is 0, there is no connection whose packets would be verified.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic

SYSCTLS = Path("/proc/sys/net/netfilter")

_LOOK_AGAIN_SECONDS = 1.0


class Conntrack:
    """Watches connection tracking in this network namespace, which may come and go meanwhile."""

    def __init__(self, sysctls: Path = SYSCTLS) -> None:
        self._sysctls = sysctls
        self._open: list[int] = []
        self._look_again = 0.0

    def verifies(self) -> bool:
        """Say whether, right now, a connection may be tracked and its checksums verified."""
        if not self._open and not self._found():
            return False
        try:
            return all(os.pread(file, 16, 0) != b"0\n" for file in self._open)
        except OSError:  # the kernel module is gone
            self.close()
            return False

    def _found(self) -> bool:
        """Open the sysctls; says whether they are there, as they are while the kernel module is."""
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
