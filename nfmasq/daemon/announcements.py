"""What the kernel announces over netlink: that something has changed, and not what.

Of rules it announces what is changed through nftables, and so by iptables-nft; of iptables-legacy
it says nothing.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable

from pyroute2.netlink import rtnl

_NETLINK_NETFILTER = 12  # linux/netlink.h

RULES = _NETLINK_NETFILTER, 1 << 6
"""Changes of rules: NFNLGRP_NFTABLES of linux/netfilter/nfnetlink.h, as a mask."""

_TICK_SECONDS = 0.1

INTERFACES = socket.NETLINK_ROUTE, rtnl.RTMGRP_LINK | 1 << 3
"""Changes of interfaces, and of what tc has at them: RTMGRP_TC of linux/rtnetlink.h."""


class Announcements:
    """Waits for changes of a kind, RULES or INTERFACES, from construction to `close`.

    Raises OSError where the kernel announces none to this process.
    """

    def __init__(self, kind: tuple[int, int]) -> None:
        family, groups = kind
        self._announced = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family)
        try:
            self._announced.bind((0, groups))
            self._announced.setblocking(False)
            self._ended = os.eventfd(0)
        except OSError:
            self._announced.close()
            raise

    def wait(
        self,
        pause: float,
        longest: float | None = None,
        look: Callable[[], bool] | None = None,
    ) -> bool:
        """Wait for `pause` seconds, and then for a change, but no longer than `longest` seconds.

        Changes within the pause are among those waited for. Without `longest` it waits for as long
        as it takes. `look` is called ten times a second, and says whether there is a change that
        the kernel does not announce. Returns False at once after `end`.
        """
        if self._readable(pause, self._ended):
            return False
        deadline = None if longest is None else time.monotonic() + longest
        if self._ended in self._changed(deadline, look):
            return False
        self._forget()
        return True

    def end(self) -> None:
        """Have `wait` return False from now on; to be called from another thread."""
        os.eventfd_write(self._ended, 1)

    def close(self) -> None:
        """Stop listening; to be called when nobody waits."""
        self._announced.close()
        os.close(self._ended)

    def _changed(self, deadline: float | None, look: Callable[[], bool] | None) -> list[int]:
        files = self._ended, self._announced.fileno()
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if look is None:
                return self._readable(left, *files)
            tick = _TICK_SECONDS if left is None else min(left, _TICK_SECONDS)
            if (readable := self._readable(tick, *files)) or look() or left == 0:
                return readable

    @staticmethod
    def _readable(seconds: float | None, *files: int) -> list[int]:
        readable, _, _ = select.select(files, (), (), seconds)
        return readable

    def _forget(self) -> None:
        while True:
            try:
                self._announced.recv(1)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # announcements were lost, which are changes too
                    raise
