"""The thread that ends entries whose time has come, in steps so small that no packet waits long.

Theory of operation. The thread that handles packets and this thread share the interpreter's lock
and the engine's lock. A step of `STEP` entries takes some thirty microseconds; between two steps
this thread sleeps `PAUSE`. A sleep of zero would not do: the packet thread needs some tens of
microseconds to wake, and this thread would have taken the interpreter back by then.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic, sleep

from nfmasq.daemon.log import RateLimit
from nfmasq.engine import Masquerade

log = logging.getLogger(__name__)
log.addFilter(RateLimit(limit=5, period=60))

STEP = 4
"""The most entries that one step ends."""

PAUSE = 0.000_05
"""Seconds between two steps where more is due."""

REST = 0.25
"""Seconds until the next look where nothing is due: an entry may outlive its time by this much."""


class Sweeper:
    """Sweeps `engine` from `start` to `stop`; `observe` gets the seconds that each step took.

    `send_own` empties the engine's outbox, and never fails.
    """

    def __init__(
        self,
        engine: Masquerade,
        observe: Callable[[float], None],
        send_own: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._observe = observe
        self._send_own = send_own or engine.outbox.clear
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Sweep from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the step at hand, and end the thread."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(REST):
            while self._step() and not self._stopping.is_set():
                sleep(PAUSE)

    def _step(self) -> bool:
        """Do one step; returns whether more is due. A failure leaves the rest for the next look."""
        now = monotonic()
        try:
            more = self._engine.sweep(now, STEP)
            self._observe(monotonic() - now)
        except Exception as error:
            log.error("sweeping failed: %r", error, exc_info=log.isEnabledFor(logging.DEBUG))
            return False
        finally:
            self._send_own()
        return more
