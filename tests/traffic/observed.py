"""What a test looks at and waits for in a running nfmasq: its figures and its entries."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nfmasq.daemon.control import request
from nfmasq.lab import Daemon


def figure(daemon: Daemon, name: str, **labels: str) -> float:
    """Return the sum of the figures that have this name and these labels."""
    figures = list(request(daemon.control, "stats"))
    assert name in {metric for metric, _, _ in figures}
    values = [v for metric, has, v in figures if metric == name and labels.items() <= has.items()]
    return float(sum(values))


def entries(daemon: Daemon, **criteria: object) -> list[dict[str, Any]]:
    """Return the entries that meet the criteria, as `nfmasq list --json` prints them."""
    return list(request(daemon.control, "list", **criteria))


def stand_still(daemon: Daemon) -> None:
    """Stop the daemon, until SIGCONT, and wait until all its threads have stopped."""
    daemon.send_signal(signal.SIGSTOP)
    threads = list(Path("/proc", str(daemon.pid), "task").glob("*/status"))
    assert eventually(lambda: all("\nState:\tT" in thread.read_text() for thread in threads))


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Say whether the condition comes true in time; the default is enough for a busy machine."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
