"""What a test looks at and waits for in a running nfmasq: its figures and its entries."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from nfmasq.daemon.control import request
from nfmasq.lab import Daemon


def figure(daemon: Daemon, name: str, **labels: str) -> float:
    """The sum of the figures of that name that have these labels."""
    figures = list(request(daemon.control, "stats"))
    assert name in {metric for metric, _, _ in figures}
    values = [v for metric, has, v in figures if metric == name and labels.items() <= has.items()]
    return float(sum(values))


def entries(daemon: Daemon, **criteria: object) -> list[dict[str, Any]]:
    """The entries that meet the criteria, as `nfmasq list --json` has them."""
    return list(request(daemon.control, "list", **criteria))


def eventually(condition: Callable[[], bool], seconds: float = 5) -> bool:
    """Whether the condition comes true in that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
