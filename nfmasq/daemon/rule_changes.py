"""What the kernel announces about rules: that they have changed, and not how.

It announces what is changed through nftables, and so by iptables-nft; of iptables-legacy it says
nothing.
"""

from __future__ import annotations

import errno
import os
import select
import socket

_NETLINK_NETFILTER = 12  # linux/netlink.h
_NFTABLES = 1 << 6  # as a mask: NFNLGRP_NFTABLES of linux/netfilter/nfnetlink.h, which is 7


class RuleChanges:
    """Waits for changes of rules, from construction to `close`.

    Raises OSError where the kernel announces none to this process.
    """

    def __init__(self) -> None:
        self._announced = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        try:
            self._announced.bind((0, _NFTABLES))
            self._announced.setblocking(False)
            self._ended = os.eventfd(0)
        except OSError:
            self._announced.close()
            raise

    def wait(self, pause: float, longest: float) -> bool:
        """Wait for `pause` seconds, and then for a change, but no longer than `longest` seconds.

        Changes within the pause are among those waited for. Returns False at once after `end`.
        """
        if self._readable(pause, self._ended):
            return False
        if self._ended in self._readable(longest, self._ended, self._announced.fileno()):
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

    @staticmethod
    def _readable(seconds: float, *files: int) -> list[int]:
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
