"""Changes of the tables of iptables-legacy, which the kernel does not announce.

How many rules a table has, and how many bytes they take, the kernel tells at a system call
(IPT_SO_GET_INFO of linux/netfilter_ipv4/ip_tables.h). To ask for a table that nobody uses would
make the table; so only those are asked for that the kernel names.
"""

from __future__ import annotations

import ctypes
import socket
from pathlib import Path

# The thread's, since threads of one process can be in network namespaces of their own.
_NAMES = Path("/proc/thread-self/net/ip_tables_names")
_GET_INFO = 64
_INFO_BYTES = 84  # the name, hooks of the table and where their rules begin, entries, bytes


class LegacyTables:
    """Notices changes of the tables, from construction to `close`.

    Where this process may not see the tables, there is nothing to notice.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._getsockopt = ctypes.CDLL(None).getsockopt
        self._seen = self._read()

    @property
    def are_used(self) -> bool:
        """Whether there were any tables at the last look."""
        return bool(self._seen)

    def have_changed(self) -> bool:
        """Say whether anything is another way than at the last look, and remember how it is.

        What has as many rules as before, and as many bytes, passes for unchanged.
        """
        before, self._seen = self._seen, self._read()
        return self._seen != before

    def close(self) -> None:
        """Look no longer."""
        self._socket.close()

    def _read(self) -> dict[str, bytes]:
        try:
            names = _NAMES.read_text("ascii").split()
        except OSError:
            return {}
        return {name: self._info(name) for name in names}

    def _info(self, name: str) -> bytes:
        """Return what the kernel tells of a table; the name alone where it tells nothing."""
        info = ctypes.create_string_buffer(name.encode(), _INFO_BYTES)
        length = ctypes.c_uint32(_INFO_BYTES)
        self._getsockopt(
            self._socket.fileno(), socket.IPPROTO_IP, _GET_INFO, info, ctypes.byref(length)
        )
        return info.raw
