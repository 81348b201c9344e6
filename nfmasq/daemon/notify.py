"""Telling systemd that nfmasq serves, and that it goes on serving (sd_notify(3)).

A message is a datagram to the socket that NOTIFY_SOCKET names. Where systemd has a watchdog for the
unit, it restarts nfmasq when no message has come for WATCHDOG_USEC; one is sent only when the loop
that takes packets has turned since the last.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable


class ServiceManager:
    """Has messages for whoever started nfmasq; nobody gets them where nobody wants them.

    `turns` returns how often the packet loop has turned, as it does when nothing comes, too.
    """

    def __init__(self, turns: Callable[[], int]) -> None:
        self._turns = turns
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._seconds = _watchdog_seconds()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def ready(self) -> None:
        """Say that packets get verdicts from now on."""
        self._say("READY=1")
        if self._address and self._seconds:
            self._thread.start()

    def stop(self) -> None:
        """Say that nfmasq ends."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._say("STOPPING=1")

    def _watch(self) -> None:
        before = -1
        while not self._ended.wait(self._seconds / 4):
            turns = self._turns()
            if turns != before:
                self._say("WATCHDOG=1")
            before = turns

    def _say(self, message: str) -> None:
        if not self._address:
            return
        # A name that begins with @ is in no file system (unix(7)).
        address = self._address.replace("@", "\0", 1) if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.setblocking(False)
                manager.sendto(message.encode(), address)
        except OSError:
            pass  # the packets matter more than who is told


def _watchdog_seconds() -> float:
    """Return after how many seconds of silence nfmasq is restarted; 0 where nobody waits for it."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdecimal() else 0.0
