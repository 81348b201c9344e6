"""Packets that the kernel drops before the handler sees them are counted, as the kernel counts."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from nfmasq.daemon.metrics import QueueStatus, queue_status
from nfmasq.lab import Daemon, Lab


def test_a_queue_that_is_full(lab: Lab, masquerade: Callable[..., Daemon]) -> None:
    """The handler stands still: eight packets wait for it, and the kernel drops the rest."""
    daemon = masquerade("--queue-length", "8")
    client = lab.inside[0].socket(socket.AF_INET, socket.SOCK_DGRAM)

    daemon.send_signal(signal.SIGSTOP)
    for _ in range(20):
        client.sendto(b"hello?", (lab.outside[0].address, 7))
    wait_for_queue(lab, QueueStatus(length=8, queue_dropped=12, user_dropped=0))
    daemon.send_signal(signal.SIGCONT)

    scraped = lab.gateway.run(["curl", "-sSf", f"http://{daemon.metrics}/metrics"]).stdout
    dropped = {
        sample.labels["where"]: sample.value
        for family in text_string_to_metric_families(scraped)
        for sample in family.samples
        if sample.name == "nfmasq_queue_dropped_total"
    }
    assert dropped == {"queue": 12, "user": 0}


def wait_for_queue(lab: Lab, expected: QueueStatus) -> None:
    # /proc/net is that of the process; the thread that `call` starts is in the gateway's namespace.
    table = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")
    deadline = time.monotonic() + 5
    while (status := lab.gateway.call(queue_status, 0, table)) != expected:
        assert time.monotonic() < deadline, status
        time.sleep(0.05)
