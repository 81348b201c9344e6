"""The kernel drops packets before the handler sees them: they are counted, as the kernel counts."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from nfmasq.daemon.queue_table import queue_row
from nfmasq.lab import Daemon, Lab
from tests.traffic.observed import eventually, stand_still


def test_a_queue_that_is_full(lab: Lab, masquerade: Callable[..., Daemon]) -> None:
    """The handler stands still: eight packets wait for it, and the kernel drops the rest."""
    daemon = masquerade("--queue-length", "8")
    client = lab.inside[0].socket(socket.AF_INET, socket.SOCK_DGRAM)

    stand_still(daemon)
    for _ in range(20):
        client.sendto(b"hello?", (lab.outside[0].address, 7))
    wait_for_queue(lab, {"waiting": 8, "queue_dropped": 12, "user_dropped": 0})
    daemon.send_signal(signal.SIGCONT)

    scraped = lab.gateway.run(["curl", "-sSf", f"http://{daemon.metrics}/metrics"]).stdout
    dropped = {
        sample.labels["where"]: sample.value
        for family in text_string_to_metric_families(scraped)
        for sample in family.samples
        if sample.name == "nfmasq_queue_dropped_total"
    }
    assert dropped == {"queue": 12, "user": 0}


def wait_for_queue(lab: Lab, expected: dict[str, int]) -> None:
    def counted() -> dict[str, int]:
        row = lab.gateway.call(queue_row, 0)
        return {name: getattr(row, name) for name in expected}

    eventually(lambda: counted() == expected)
    assert counted() == expected
