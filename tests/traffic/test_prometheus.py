"""A real Prometheus scrapes a running nfmasq, and answers what the dashboard asks.

Prometheus runs on the gateway with the shipped configuration, only with shorter intervals.
Datagrams go back and forth between an inside and an outside host: in many sessions that are over at
once, and in one that lasts, which a flow cache carries where there is one. And a packet that cannot
be masqueraded is sent.
"""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nfmasq.lab import Lab
from tests.programs import program
from tests.traffic.conftest import taking

data_path = taking("queue", "routed")

CONTRIB = Path(__file__).parents[2] / "contrib"
DASHBOARD = json.loads((CONTRIB / "grafana" / "nfmasq.json").read_text())
SESSIONS = 200  # of one round trip each, by the handler; its time is sampled, one packet in 256
ROUND_TRIPS = 400  # of the session that lasts
GRE = socket.IPPROTO_GRE

VARIABLES = {
    "$job": "nfmasq",
    "$instance": ".*",
    "$__rate_interval": "5m",
    "$__range": "5m",
}


def dashboard_queries() -> list[str]:
    expressions = {target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
    for name, value in VARIABLES.items():
        expressions = {expression.replace(name, value) for expression in expressions}
    return sorted(expressions)


class Sample(NamedTuple):
    labels: dict[str, str]
    value: float


class Prometheus:
    """A Prometheus on the gateway, which is asked from within the gateway's namespace.

    It is asked for the values of now or, once `moment` is set, for the values of that moment: a
    later scrape, however late or in vain, makes no difference.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.moment: float | None = None

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        answer = json.loads(fetch(self._lab, f"127.0.0.1:9090/api/v1/{path}?{query}"))
        assert answer["status"] == "success"
        return answer["data"]

    def query(self, expression: str) -> list[Sample]:
        then = {} if self.moment is None else {"time": str(self.moment)}
        result = self.get("query", query=expression, **then)["result"]
        return [Sample(series["metric"], float(series["value"][1])) for series in result]


def fetch(lab: Lab, location: str) -> str:
    def get() -> str:
        with urllib.request.urlopen(f"http://{location}", timeout=30) as answer:
            return str(answer.read().decode())

    return lab.gateway.call(get)


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except OSError:  # it does not listen yet, or is not ready: an HTTPError is an OSError
            pass
        time.sleep(0.1)
    pytest.fail(f"not within 60 s: {what}")


def exchange_datagrams(lab: Lab) -> None:
    """Send datagrams from inside to outside, each answered; then one packet of GRE."""
    inside, outside = lab.inside[0], lab.outside[0]
    server = outside.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((outside.address, 7))
    for session in range(SESSIONS + 1):
        with inside.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.bind((inside.address, 20000 + session))
            client.connect((outside.address, 7))
            for _ in range(ROUND_TRIPS if session == SESSIONS else 1):
                client.send(b"there")
                _, source = server.recvfrom(100)
                server.sendto(b"and back", source)
                assert client.recv(100) == b"and back"
    inside.socket(socket.AF_INET, socket.SOCK_RAW, GRE).sendto(bytes(20), (outside.address, 0))


@pytest.fixture(scope="module")
def prometheus(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Run Prometheus; it has seen nfmasq before, during and after the datagrams."""
    folder = tmp_path_factory.mktemp("prometheus")
    with lab.masquerading() as daemon, running_prometheus(lab, folder, daemon.metrics) as server:
        eventually(lambda: server.query('count_over_time(up{job="nfmasq"}[1m]) > 1'), "two scrapes")
        exchange_datagrams(lab)
        # The packet came last, so the scrape that counts it has counted all others.
        gre = 'nfmasq_packets_total{protocol="other", verdict="drop"} > 0'
        eventually(lambda: server.query(gre), "the packet of GRE")
        ((_, server.moment),) = server.query(f"timestamp({gre})")
        yield server


@contextmanager
def running_prometheus(lab: Lab, folder: Path, target: str) -> Iterator[Prometheus]:
    shipped = (CONTRIB / "prometheus" / "prometheus.yml").read_text()
    faster = shipped.replace("15s", "500ms").replace("127.0.0.1:9469", target)
    (folder / "prometheus.yml").write_text(faster)
    alerts = CONTRIB / "prometheus" / "nfmasq.rules.yml"
    (folder / alerts.name).write_text(alerts.read_text())
    with (folder / "log").open("w") as log:
        process = lab.gateway.popen(
            [
                program("prometheus", "prometheus"),
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                "--web.listen-address=127.0.0.1:9090",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        eventually(lambda: fetch(lab, "127.0.0.1:9090/-/ready"), "Prometheus is ready")
        yield Prometheus(lab)
    finally:
        process.terminate()
        process.wait(60)


def test_prometheus_knows_each_packet(prometheus: Prometheus) -> None:
    packets = {
        (labels["direction"], labels["protocol"], labels["verdict"]): value
        for labels, value in prometheus.query("nfmasq_packets_total > 0")
    }
    for labels, value in prometheus.query("nfmasq_cached_packets_total"):
        packets[labels["direction"], "udp", "accept"] += value
    assert packets == {
        ("out", "udp", "accept"): SESSIONS + ROUND_TRIPS,
        ("in", "udp", "accept"): SESSIONS + ROUND_TRIPS,
        ("out", "other", "drop"): 1,
    }


def test_prometheus_knows_each_byte(prometheus: Prometheus) -> None:
    octets = {
        sample.labels["direction"]: sample.value
        for sample in prometheus.query("nfmasq_bytes_total")
    }
    headers = 20 + 8
    assert octets == {
        "out": (SESSIONS + ROUND_TRIPS) * (headers + len(b"there")),
        "in": (SESSIONS + ROUND_TRIPS) * (headers + len(b"and back")),
    }


def test_packets_are_cached_where_there_is_a_flow_cache(prometheus: Prometheus) -> None:
    ((_, is_off),) = prometheus.query('nfmasq_flow_cache{mode="off"}')
    for _, cached in prometheus.query("nfmasq_cached_packets_total"):
        assert (cached == 0) if is_off else (ROUND_TRIPS / 2 < cached < ROUND_TRIPS)
    ((_, dropped),) = prometheus.query("nfmasq_cached_packets_dropped_total")
    assert dropped == 0


def test_each_entry_holds_a_port(prometheus: Prometheus) -> None:
    ((_, entries),) = prometheus.query('nfmasq_entries{protocol="udp"}')
    ((_, created),) = prometheus.query('nfmasq_entries_created_total{protocol="udp"}')
    ((_, free),) = prometheus.query('nfmasq_ports_free{protocol="udp"}')
    assert (entries, created, free) == (SESSIONS + 1, SESSIONS + 1, 4095 - SESSIONS)


def test_handler_and_sweep_were_timed(prometheus: Prometheus) -> None:
    ((_, handled),) = prometheus.query("nfmasq_handler_seconds_count")
    ((_, swept),) = prometheus.query("nfmasq_sweep_seconds_count")
    assert 1 <= handled <= 2 * (SESSIONS + ROUND_TRIPS)
    assert swept >= 1


@pytest.mark.parametrize("expression", dashboard_queries())
def test_each_query_of_the_dashboard_has_an_answer(prometheus: Prometheus, expression: str) -> None:
    samples = prometheus.query(expression)
    assert samples
    assert not any(math.isnan(sample.value) for sample in samples)


@pytest.mark.parametrize("label", ["job", "instance"])
def test_the_dashboard_finds_our_gateway(prometheus: Prometheus, label: str) -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    query = re.fullmatch(r"label_values\((.+), (\w+)\)", variables[label]["query"]["query"])
    assert query
    assert query[2] == label
    selector = query[1].replace("$job", "nfmasq")
    assert len(prometheus.get(f"label/{label}/values", **{"match[]": selector})) == 1


def test_the_alerts_are_evaluated_and_silent(prometheus: Prometheus) -> None:
    (group,) = prometheus.get("rules")["groups"]
    assert {alert["health"] for alert in group["rules"]} == {"ok"}
    assert "firing" not in {alert["state"] for alert in group["rules"]}
