"""What is measured of a data path, between an inside host and an outside host of a lab."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench import traffic
from bench.paths import run_module
from nfmasq.daemon.queue_table import queue_row
from nfmasq.errors import NfmasqError
from nfmasq.lab import Host, Lab

PORT = 7001
WARM_UP = 0.3
"""Seconds of a flood that are not counted: the queue fills, the entry is made."""

CLIENTS = 8
"""Processes that connect at once."""

Handler = subprocess.Popen[str]
Results = dict[str, float]


class Quantity(NamedTuple):
    """A quantity that is measured: its `key` in results, title, unit, and digits when written."""

    key: str
    title: str
    unit: str
    digits: int


QUANTITIES = (
    Quantity("tcp_up", "TCP up", "Gbit/s", 3),
    Quantity("tcp_down", "TCP down", "Gbit/s", 3),
    Quantity("udp_64", "UDP 64 B", "kpps", 1),
    Quantity("udp_1400", "UDP 1400 B", "kpps", 1),
    Quantity("connections", "new TCP", "1/s", 0),
    Quantity("http", "HTTP", "1/s", 0),
    Quantity("trip_median", "RTT p50", "µs", 0),
    Quantity("trip_p99", "RTT p99", "µs", 0),
    Quantity("cpu_up", "CPU up", "s/Gbit", 3),
    Quantity("cpu_down", "CPU down", "s/Gbit", 3),
    Quantity("cpu_64", "CPU 64 B", "µs/pkt", 2),
)
"""What a path's results hold; the CPU seconds are the handler's, in user space and kernel."""


def _tcp(direction: str, lab: Lab, handler: Handler | None, seconds: float) -> Results:
    inside, outside = lab.inside[0], lab.outside[0]
    options = ["--json", "--time", f"{seconds:.0f}"] + ["--reverse"] * (direction == "down")
    server = ["iperf3", "--server", "--one-off", "--port", str(PORT)]
    serving = outside.popen(server, stdout=subprocess.DEVNULL)
    with running(serving):
        outside.wait_until_bound(PORT)
        before = cpu_seconds(handler)
        client = ["iperf3", "--client", outside.address, "--port", str(PORT), *options]
        report = json.loads(inside.run(client, timeout=seconds + 30).stdout)
        spent = cpu_seconds(handler) - before
        serving.wait(timeout=5)
    received = report["end"]["sum_received"]
    results = {f"tcp_{direction}": received["bits_per_second"] / 1e9}
    if handler:
        results[f"cpu_{direction}"] = spent / (received["bytes"] * 8 / 1e9)
    return results


def _udp(size: int, lab: Lab, handler: Handler | None, seconds: float) -> Results:
    """Measure what arrives of a flood, and what each packet of the flood costs the handler."""
    inside, outside = lab.inside[0], lab.outside[0]
    before, sent = cpu_seconds(handler), _sent(lab)
    counting = start(outside, traffic.count, PORT, size, WARM_UP, seconds)
    with running(counting):
        outside.wait_until_bound(PORT, "udp")
        flood = (outside.address, PORT, size, 2 * WARM_UP + seconds)
        with running(start(inside, traffic.flood, *flood)):
            results = {f"udp_{size}": float(answer(counting)) / 1e3}
    _wait_until_drained(lab)
    if handler:
        spent = cpu_seconds(handler) - before
        results[f"cpu_{size}"] = spent * 1e6 / (_sent(lab) - sent)
    return results


def _sent(lab: Lab) -> int:
    """Return how many packets the gateway has sent to the outside so far."""
    link = json.loads(lab.gateway.ip("-json -statistics link show wan"))[0]
    packets: int = link["stats64"]["tx"]["packets"]
    return packets


def _wait_until_drained(lab: Lab) -> None:
    """Wait until a slow handler has worked off what is left of a flood."""
    deadline = time.monotonic() + 30
    while (row := lab.gateway.call(queue_row, 0)) and row.waiting:
        if time.monotonic() > deadline:
            raise NfmasqError("the handler does not get to the end of its queue")
        time.sleep(0.02)


def _connections(lab: Lab, _handler: Handler | None, seconds: float) -> Results:
    inside, outside = lab.inside[0], lab.outside[0]
    outside.sysctl("net.core.somaxconn", traffic.BACKLOG)
    with running(start(outside, traffic.backlog, PORT)):
        outside.wait_until_bound(PORT)
        clients = start(inside, traffic.connect, outside.address, PORT, CLIENTS, seconds)
        with running(clients):
            return {"connections": float(answer(clients))}


def _http(lab: Lab, _handler: Handler | None, seconds: float) -> Results:
    inside, outside = lab.inside[0], lab.outside[0]
    with running(start(outside, traffic.http, PORT)):
        outside.wait_until_bound(PORT)
        clients = start(inside, traffic.fetch, outside.address, PORT, CLIENTS, seconds)
        with running(clients):
            return {"http": float(answer(clients))}


def _round_trip(lab: Lab, _handler: Handler | None, seconds: float) -> Results:
    inside, outside = lab.inside[0], lab.outside[0]
    with running(start(outside, traffic.echo, PORT)):
        outside.wait_until_bound(PORT, "udp")
        pinging = start(inside, traffic.ping, outside.address, PORT, 64, seconds)
        with running(pinging):
            trips = [trip * 1e6 for _, trip in answer(pinging)]
    return {"trip_median": statistics.median(trips), "trip_p99": percentile(trips, 99)}


STEPS: tuple[Callable[[Lab, Handler | None, float], Results], ...] = (
    partial(_tcp, "up"),
    partial(_tcp, "down"),
    partial(_udp, 64),
    partial(_udp, 1400),
    _connections,
    _http,
    _round_trip,
)
"""Functions that measure the path in a lab for some seconds. Results have the keys of
`QUANTITIES`."""


def percentile(values: list[float], percent: int) -> float:
    """Return the value that `percent` of a hundred values do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def cpu_seconds(process: Handler | None) -> float:
    """Return the seconds of processor time that a process has used by now; 0 without a process."""
    if process is None:
        return 0.0
    # proc_pid_stat(5): the name, in parentheses, may hold anything; utime is 12 fields after it.
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(host: Host, program: Callable[..., object], *arguments: object) -> subprocess.Popen[str]:
    """Start one of the programs of `traffic.py` on a host."""
    written = [json.dumps(argument) for argument in arguments]
    return run_module(host, "bench.traffic", program.__name__, *written, stdout=subprocess.PIPE)


def answer(program: subprocess.Popen[str], timeout: float = 60) -> Any:
    """Return what a program of `traffic.py` returns. Raises NfmasqError where it failed."""
    output, _ = program.communicate(timeout=timeout)
    if program.returncode:
        raise NfmasqError("a program of bench/traffic.py failed, as told above")
    return json.loads(output)


@contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[None]:
    """End a process at the end of the block."""
    try:
        yield
    finally:
        process.terminate()
        process.wait()
