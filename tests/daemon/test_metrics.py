"""The metrics: every name that dashboards rely on, read at the scrape and not before.

Prometheus's own parser reads what is served, and its `promtool` judges it.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from nfmasq import __version__
from nfmasq.daemon.metrics import Metrics, MetricsServer, serve
from nfmasq.daemon.queue_table import QueueRow, queue_row
from nfmasq.engine import TCP, Masquerade, Settings
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.endings import ENDINGS
from nfmasq.errors import NfmasqError
from nfmasq.flowcache.programs import Counts
from tests.programs import program

CONTRIB = Path(__file__).parents[2] / "contrib"
QUEUE = 3

# As the kernel writes it: queue 3 has 17 packets waiting, dropped 5 itself and 2 at the socket.
QUEUE_TABLE = """\
    0   4242     0 2 65531     0     0        9  1
    3  31337    17 2 65531     5     2   123456  1
65535 4294967295 99999 2 65531 4294967295     0 4294967295  1
"""

Key = tuple[str, frozenset[tuple[str, str]]]
Samples = dict[Key, float]


def key(name: str, /, **labels: str) -> Key:
    return name, frozenset(labels.items())


def parse(text: str) -> Samples:
    return {
        key(sample.name, **sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(metrics: Metrics) -> Samples:
    return parse(generate_latest(metrics.registry).decode())


def get(samples: Samples, name: str, /, **labels: str) -> float:
    return samples[key(name, **labels)]


@pytest.fixture
def kernel_table(tmp_path: Path) -> Path:
    table = tmp_path / "nfnetlink_queue"
    table.write_text(QUEUE_TABLE)
    return table


@pytest.fixture
def engine() -> Masquerade:
    return Masquerade()


@pytest.fixture
def metrics(engine: Masquerade, kernel_table: Path) -> Metrics:
    return Metrics(engine, QUEUE, lambda: 4, kernel_table, rules_present=lambda: True)


@pytest.fixture
def server(metrics: Metrics) -> Iterator[MetricsServer]:
    server = serve(metrics.registry, "127.0.0.1", 0)
    yield server
    server.close()


def promtool(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [program("promtool", "prometheus"), *arguments]
    return subprocess.run(
        command, input=text, text=True, capture_output=True, timeout=60, check=False
    )


class TestNames:
    """The names and labels that stay, since users' dashboards and alerts depend on them."""

    @pytest.mark.parametrize("direction", ["out", "in"])
    @pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp", "other"])
    @pytest.mark.parametrize("verdict", ["accept", "drop"])
    def test_packets(self, metrics: Metrics, direction: str, protocol: str, verdict: str) -> None:
        labels = {"direction": direction, "protocol": protocol, "verdict": verdict}
        assert get(scrape(metrics), "nfmasq_packets_total", **labels) == 0

    @pytest.mark.parametrize(
        ("name", "label", "values"),
        [
            ("nfmasq_bytes_total", "direction", {"out", "in"}),
            ("nfmasq_entries", "protocol", {"tcp", "udp", "icmp", "other"}),
            ("nfmasq_entries_created_total", "protocol", {"tcp", "udp", "icmp", "other"}),
            ("nfmasq_entries_expired_total", "protocol", {"tcp", "udp", "icmp", "other"}),
            ("nfmasq_ports_free", "protocol", {"tcp", "udp", "icmp"}),
            ("nfmasq_queue_dropped_total", "where", {"queue", "user"}),
            ("nfmasq_crowding_dropped_total", "where", {"line", "kernel"}),
            ("nfmasq_flow_cache", "mode", {"off", "routed", "direct"}),
            ("nfmasq_cached_packets_total", "direction", {"out", "in"}),
            ("nfmasq_cached_bytes_total", "direction", {"out", "in"}),
            ("nfmasq_tcp_unbelieved_total", "direction", {"out", "in"}),
        ],
    )
    def test_one_label(self, metrics: Metrics, name: str, label: str, values: set[str]) -> None:
        found = {labels for sample, labels in scrape(metrics) if sample == name}
        assert found == {frozenset({(label, value)}) for value in values}

    @pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp", "other"])
    @pytest.mark.parametrize("reason", ENDINGS)
    def test_each_ending_is_there_before_the_first(
        self, metrics: Metrics, protocol: str, reason: str
    ) -> None:
        labels = {"protocol": protocol, "reason": reason}
        samples = scrape(metrics)
        assert get(samples, "nfmasq_entries_ended_total", **labels) == 0
        names = [name for name, _ in samples]
        assert names.count("nfmasq_entries_ended_total") == 4 * len(ENDINGS)

    def test_log_lines_lost(self, metrics: Metrics) -> None:
        assert get(scrape(metrics), "nfmasq_log_lines_lost_total") == 0

    @pytest.mark.parametrize("reason", ["malformed", "no_port", "no_room"])
    def test_each_error_is_there_before_the_first(self, metrics: Metrics, reason: str) -> None:
        assert get(scrape(metrics), "nfmasq_errors_total", reason=reason) == 0

    @pytest.mark.parametrize("name", ["nfmasq_handler_seconds", "nfmasq_sweep_seconds"])
    def test_histograms(self, metrics: Metrics, name: str) -> None:
        samples = scrape(metrics)
        assert get(samples, f"{name}_count") == 0
        assert get(samples, f"{name}_sum") == 0
        assert get(samples, f"{name}_bucket", le="+Inf") == 0

    @pytest.mark.parametrize("name", ["nfmasq_handler_seconds", "nfmasq_sweep_seconds"])
    def test_bounds_are_round_numbers(self, metrics: Metrics, name: str) -> None:
        bounds = {dict(labels)["le"] for s, labels in scrape(metrics) if s == f"{name}_bucket"}
        assert {"1e-05", "0.0001", "0.02"} <= bounds
        assert max(map(len, bounds)) <= len("0.00015")

    @pytest.mark.parametrize(
        "name",
        [
            "nfmasq_cached_flows",
            "nfmasq_cached_flows_entered_total",
            "nfmasq_cached_flows_refused_total",
            "nfmasq_cached_packets_dropped_total",
        ],
    )
    def test_the_flow_cache(self, metrics: Metrics, name: str) -> None:
        assert get(scrape(metrics), name) == 0

    def test_build_info(self, metrics: Metrics) -> None:
        ((name, labels),) = [key for key in scrape(metrics) if key[0].startswith("nfmasq_build")]
        assert name == "nfmasq_build_info"
        assert dict(labels)["version"] == __version__
        assert set(dict(labels)) == {"version", "python"}

    @pytest.mark.parametrize(("present", "shown"), [(True, [1]), (False, [0]), (None, [])])
    def test_rules_that_nobody_looks_at_have_no_figure(
        self, engine: Masquerade, present: bool | None, shown: list[float]
    ) -> None:
        samples = scrape(Metrics(engine, QUEUE, lambda: 0, rules_present=lambda: present))
        assert [v for (name, _), v in samples.items() if name == "nfmasq_rules_present"] == shown
        lost = [v for (name, _), v in samples.items() if name == "nfmasq_rules_lost_total"]
        assert lost == [0 for _ in shown]

    def test_process(self, metrics: Metrics) -> None:
        assert get(scrape(metrics), "process_resident_memory_bytes") > 1_000_000


class TestReadAtTheScrape:
    def test_what_was_counted_since_the_last_scrape_is_in_the_next(
        self, engine: Masquerade, metrics: Metrics
    ) -> None:
        before = scrape(metrics)
        engine.sessions.counters.outbound["udp"].accepted += 3
        engine.sessions.counters.errors["no_port"] += 2
        engine.sessions.counters.created["tcp"] += 5
        engine.sessions.counters.ended["icmp"]["expired"] += 7
        engine.sessions.counters.ended["tcp"]["evicted"] += 9
        metrics.handler_seconds.observe(30e-6)
        metrics.sweep_seconds.observe(2e-3)
        after = scrape(metrics)

        changed = {
            (name, labels): after[name, labels] - before[name, labels]
            for name, labels in before
            if name.startswith("nfmasq_") and not name.endswith(("_bucket", "_sum"))
            if after[name, labels] != before[name, labels]
        }
        packets = {"direction": "out", "protocol": "udp", "verdict": "accept"}
        assert changed == {
            key("nfmasq_packets_total", **packets): 3,
            key("nfmasq_errors_total", reason="no_port"): 2,
            key("nfmasq_entries_created_total", protocol="tcp"): 5,
            key("nfmasq_entries_expired_total", protocol="icmp"): 7,
            key("nfmasq_entries_ended_total", protocol="icmp", reason="expired"): 7,
            key("nfmasq_entries_ended_total", protocol="tcp", reason="evicted"): 9,
            key("nfmasq_handler_seconds_count"): 1,
            key("nfmasq_sweep_seconds_count"): 1,
        }

    @given(
        st.dictionaries(
            st.tuples(
                st.sampled_from(["out", "in"]), st.sampled_from(["tcp", "udp", "icmp", "other"])
            ),
            st.tuples(*[st.integers(0, 2**53)] * 3),
        )
    )
    def test_traffic_is_shown_as_counted(
        self, counts: dict[tuple[str, str], tuple[int, int, int]]
    ) -> None:
        engine = Masquerade()
        directions = {
            "out": engine.sessions.counters.outbound,
            "in": engine.sessions.counters.inbound,
        }
        for (direction, protocol), (accepted, dropped, octets) in counts.items():
            traffic = directions[direction][protocol]
            traffic.accepted, traffic.dropped, traffic.bytes = accepted, dropped, octets

        samples = scrape(Metrics(engine, QUEUE, lambda: 0))

        for direction, rows in directions.items():
            for protocol, row in rows.items():
                labels = {"direction": direction, "protocol": protocol}
                packets = "nfmasq_packets_total"
                assert get(samples, packets, **labels, verdict="accept") == row.accepted
                assert get(samples, packets, **labels, verdict="drop") == row.dropped
            octets = sum(row.bytes for row in rows.values())
            assert get(samples, "nfmasq_bytes_total", direction=direction) == float(octets)

    def test_table_and_ports_are_the_engine_s_own(
        self, engine: Masquerade, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        in_the_table = {"tcp": 60, "udp": 170, "icmp": 10, "other": 3}
        monkeypatch.setattr(engine.sessions, "entry_counts", lambda: in_the_table)
        monkeypatch.setattr(engine.sessions, "ports_free", {6: 61, 17: 171, 1: 11}.__getitem__)
        samples = scrape(metrics)
        for protocol, entries in ("tcp", 60), ("udp", 170), ("icmp", 10):
            assert get(samples, "nfmasq_entries", protocol=protocol) == entries
            assert get(samples, "nfmasq_ports_free", protocol=protocol) == entries + 1

    def test_figures_are_those_of_the_scrape(self, engine: Masquerade, metrics: Metrics) -> None:
        engine.sessions.counters.inbound["icmp"].dropped += 9
        figures = json.loads(json.dumps(metrics.figures()))
        plain = {
            key(name, **labels): value
            for name, labels, value in figures
            if name.startswith("nfmasq_")
        }
        scraped = scrape(metrics)
        assert plain == {k: value for k, value in scraped.items() if k[0].startswith("nfmasq_")}
        labels = {"direction": "in", "protocol": "icmp", "verdict": "drop"}
        assert get(plain, "nfmasq_packets_total", **labels) == 9

    @pytest.mark.parametrize("mode", ["off", "routed", "direct"])
    def test_the_flow_cache_s_mode(self, engine: Masquerade, mode: str) -> None:
        samples = scrape(Metrics(engine, QUEUE, lambda: 0, flow_cache_mode=lambda: mode))
        for each in ("off", "routed", "direct"):
            assert get(samples, "nfmasq_flow_cache", mode=each) == (each == mode)

    def test_what_the_flow_cache_has_done(self, engine: Masquerade) -> None:
        """Its bytes are among all bytes, and its packets are counted by themselves."""
        counts = Counts(packets_out=2, packets_in=3, bytes_out=500, bytes_in=700, dropped=11)
        engine.sessions.counters.outbound["udp"].bytes = 40
        samples = scrape(Metrics(engine, QUEUE, lambda: 0, in_kernel=lambda: counts))
        assert get(samples, "nfmasq_cached_packets_total", direction="out") == 2
        assert get(samples, "nfmasq_cached_packets_total", direction="in") == 3
        assert get(samples, "nfmasq_cached_bytes_total", direction="out") == 500
        assert get(samples, "nfmasq_cached_bytes_total", direction="in") == 700
        assert get(samples, "nfmasq_bytes_total", direction="out") == 540
        assert get(samples, "nfmasq_bytes_total", direction="in") == 700
        assert get(samples, "nfmasq_cached_packets_dropped_total") == 11

    def test_nothing_goes_to_the_global_registry(self, engine: Masquerade) -> None:
        Metrics(engine, 0, lambda: 0)
        Metrics(engine, 1, lambda: 0)  # a second one would be a duplicate there


class TestKernelQueue:
    def test_our_queue_among_others(self, kernel_table: Path) -> None:
        most = 4294967295
        assert queue_row(3, kernel_table) == QueueRow(
            3, port=31337, waiting=17, queue_dropped=5, user_dropped=2, newest=123456
        )
        assert queue_row(0, kernel_table) == QueueRow(0, 4242, 0, 0, 0, 9)
        assert queue_row(65535, kernel_table) == QueueRow(65535, most, 99999, most, 0, most)

    def test_not_bound(self, kernel_table: Path) -> None:
        assert queue_row(1, kernel_table) is None

    def test_no_such_table(self, tmp_path: Path) -> None:
        assert queue_row(0, tmp_path / "none") is None

    def test_scraped(self, metrics: Metrics) -> None:
        samples = scrape(metrics)
        assert get(samples, "nfmasq_queue_length") == 17
        assert get(samples, "nfmasq_queue_dropped_total", where="queue") == 5
        assert get(samples, "nfmasq_queue_dropped_total", where="user") == 2
        assert get(samples, "nfmasq_socket_overflows_total") == 4

    def test_what_is_not_known_is_absent_and_not_zero(
        self, metrics: Metrics, kernel_table: Path
    ) -> None:
        kernel_table.write_text("")
        names = {name for name, _ in scrape(metrics)}
        assert not names & {"nfmasq_queue_length", "nfmasq_queue_dropped_total"}
        assert "nfmasq_socket_overflows_total" in names


class TestServer:
    def test_metrics_over_http(
        self, engine: Masquerade, server: MetricsServer, capfd: pytest.CaptureFixture[str]
    ) -> None:
        engine.sessions.counters.errors["malformed"] = 12
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            samples = parse(answer.read().decode())
        assert get(samples, "nfmasq_errors_total", reason="malformed") == 12
        assert capfd.readouterr() == ("", "")

    def test_a_scraper_that_hangs_up_leaves_no_trace_and_the_next_is_served(
        self, server: MetricsServer, capfd: pytest.CaptureFixture[str]
    ) -> None:
        for request in b"", b"GET /metr", b"GET /metrics HTTP/1.0\r\n\r\n", b"\x16\x03\x01\r\n\r\n":
            with socket.create_connection(("127.0.0.1", server.server_port)) as scraper:
                reset_on_close = (1).to_bytes(4, "little") + bytes(4)
                scraper.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_on_close)
                scraper.sendall(request)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
            assert answer.status == 200
        assert capfd.readouterr() == ("", "")

    def test_close_gives_the_port_back(self, metrics: Metrics) -> None:
        first = serve(metrics.registry, "127.0.0.1", 0)
        first.close()
        again = serve(metrics.registry, "127.0.0.1", first.server_port)
        again.close()

    def test_ipv6(self, metrics: Metrics) -> None:
        if not Path("/proc/net/if_inet6").exists():
            pytest.skip("this machine has no IPv6")
        server = serve(metrics.registry, "::1", 0)
        with urllib.request.urlopen(f"http://[::1]:{server.server_port}/metrics") as answer:
            assert answer.status == 200
        server.close()

    def test_port_taken(self, metrics: Metrics, server: MetricsServer) -> None:
        with pytest.raises(NfmasqError) as raised:
            serve(metrics.registry, "127.0.0.1", server.server_port)
        assert str(raised.value) == (
            f"cannot serve metrics on 127.0.0.1:{server.server_port}: another program has this "
            "port; give another --metrics ADDRESS:PORT, or --metrics off"
        )

    @pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
    def test_address_not_ours(self, metrics: Metrics, address: str) -> None:
        with pytest.raises(NfmasqError, match=r"^cannot serve metrics on [^\n]+$"):
            serve(metrics.registry, address, 9469)


@pytest.fixture
def web(engine: Masquerade) -> Server:
    """Forward a port to two servers; returns the first, which has figures."""
    server = Server(0x0A000002, 80, 3)
    server.active, server.inactive, server.total = 5, 6, 70
    forwards = [Forward(TCP, range(80, 81), [server, Server(0x0A000003, 80)])]
    engine.configure(Settings(), forwards=Forwards(forwards))
    return server


class TestServers:
    """The metrics of each server of a forwarded port, by the names that `nfmasq servers` shows."""

    def of(self, metrics: Metrics, name: str, **labels: str) -> float:
        return get(scrape(metrics), name, forward="tcp:80", server="10.0.0.2:80", **labels)

    def test_state_weight_and_sessions(self, metrics: Metrics, web: Server) -> None:
        assert self.of(metrics, "nfmasq_server_up") == 1
        assert self.of(metrics, "nfmasq_server_weight") == 3
        assert self.of(metrics, "nfmasq_server_sessions", state="active") == 5
        assert self.of(metrics, "nfmasq_server_sessions", state="inactive") == 6
        assert self.of(metrics, "nfmasq_server_sessions_created_total") == 70
        web.alive, web.weight = False, 0
        assert self.of(metrics, "nfmasq_server_up") == 0
        assert self.of(metrics, "nfmasq_server_weight") == 0

    def test_servers_that_are_gone_are_no_longer_told_of(
        self, metrics: Metrics, engine: Masquerade, web: Server
    ) -> None:
        engine.configure(Settings())
        assert not [name for name, _ in scrape(metrics) if name.startswith("nfmasq_server")]

    @pytest.mark.usefixtures("web")
    def test_promtool_and_openmetrics_find_nothing_to_improve(self, metrics: Metrics) -> None:
        text = generate_latest(metrics.registry).decode()
        done = promtool("check", "metrics", text=text)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        openmetrics = generate_openmetrics(metrics.registry).decode()  # type: ignore[no-untyped-call]
        families = list(openmetrics_families(openmetrics))  # type: ignore[no-untyped-call]
        assert "nfmasq_server_sessions_created" in {family.name for family in families}


class TestPrometheusTools:
    def test_promtool_finds_nothing_to_improve(self, metrics: Metrics) -> None:
        for seconds in 5e-6, 30e-6, 2e-3, 1.0:
            metrics.handler_seconds.observe(seconds)
            metrics.sweep_seconds.observe(seconds)
        done = promtool("check", "metrics", text=generate_latest(metrics.registry).decode())
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    @pytest.mark.parametrize(
        ("verb", "what", "file"),
        [
            ("check", "config", "prometheus.yml"),
            ("check", "rules", "nfmasq.rules.yml"),
            ("test", "rules", "nfmasq.test.yml"),
        ],
    )
    def test_shipped_configuration(self, verb: str, what: str, file: str) -> None:
        done = promtool(verb, what, str(CONTRIB / "prometheus" / file))
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.usefixtures("web")
    @pytest.mark.parametrize("file", ["prometheus/nfmasq.rules.yml", "grafana/nfmasq.json"])
    def test_shipped_queries_ask_only_for_what_is_served(self, metrics: Metrics, file: str) -> None:
        served = {name for name, _ in scrape(metrics)}
        asked = set(re.findall(r"\b(?:nfmasq|process)_\w+", (CONTRIB / file).read_text()))
        assert asked
        assert asked <= served


class TestDashboard:
    def test_grafana_can_take_it(self) -> None:
        dashboard = json.loads((CONTRIB / "grafana" / "nfmasq.json").read_text())
        panels = dashboard["panels"]
        assert dashboard["schemaVersion"] == 39
        assert dashboard["templating"]["list"][0]["type"] == "datasource"
        assert len({panel["id"] for panel in panels}) == len(panels)
        for panel in panels:
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all(target["expr"] for target in panel["targets"])

    def test_what_adds_up_packets_knows_those_of_the_flow_cache(self) -> None:
        """Packets of known flows never reach the handler, which counts only what it handles."""
        dashboard = json.loads((CONTRIB / "grafana" / "nfmasq.json").read_text())
        for panel in dashboard["panels"]:
            asked = " ".join(target["expr"] for target in panel["targets"])
            told = "flow cache" in panel.get("description", "")
            if "nfmasq_packets_total" in asked:
                assert "nfmasq_cached_packets_total" in asked or told, panel["title"]

    def test_panels_do_not_overlap(self) -> None:
        dashboard = json.loads((CONTRIB / "grafana" / "nfmasq.json").read_text())
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in dashboard["panels"])
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(cells) == len(set(cells))
        assert all(x < 24 for x, _ in cells)
