"""What becomes of a run's figures: ratios that must hold, tables, the chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import flows, network, report, targets
from bench.paths import PATHS
from bench.targets import Outcome

KEYS = [quantity.key for quantity in network.QUANTITIES]
THE_SAME = {path.key: {key: [1.0, 2.0, 4.0] for key in KEYS} for path in PATHS}


def outcomes(**changed: dict[str, list[float]]) -> dict[str, Outcome]:
    """Return the outcomes, by title, of paths that are all the same but for what was changed."""
    paths = {path: found | changed.get(path, {}) for path, found in THE_SAME.items()}
    return {outcome.title: outcome for outcome in targets.outcomes(paths, {}, {})}


def missed(**changed: dict[str, list[float]]) -> list[str]:
    return [title for title, outcome in outcomes(**changed).items() if not outcome.holds]


class TestWhatMustHold:
    @pytest.mark.parametrize(
        ("path", "title", "key", "bound", "at_least"),
        [
            ("routed", "masquerade: TCP bulk, inside to outside", "tcp_up", 0.95, True),
            ("routed", "masquerade: TCP bulk, outside to inside", "tcp_down", 0.95, True),
            ("routed", "masquerade: UDP 64 B, packets per second", "udp_64", 0.85, True),
            ("routed", "masquerade: median round trip", "trip_median", 1.08, False),
            ("routed", "nfmasq: new TCP connections per second, HTTP", "http", 0.95, True),
            ("direct", "masquerade: TCP bulk, inside to outside", "tcp_up", 1.0, True),
            ("direct", "masquerade: TCP bulk, outside to inside", "tcp_down", 1.0, True),
            ("direct", "masquerade: UDP 64 B, packets per second", "udp_64", 1.0, True),
            ("direct", "masquerade: median round trip", "trip_median", 1.0, False),
            ("direct", "nfmasq: new TCP connections per second, HTTP", "http", 0.95, True),
            ("nfmasq", "floor: UDP 64 B, packets per second", "udp_64", 0.85, True),
            ("nfmasq", "floor: TCP bulk, inside to outside", "tcp_up", 4.0, True),
            ("nfmasq", "floor: TCP bulk, outside to inside", "tcp_down", 5.0, True),
            ("nfmasq", "floor: new TCP connections per second", "connections", 0.7, True),
            ("nfmasq", "floor: median round trip", "trip_median", 1.3, False),
        ],
    )
    def test_a_ratio_is_missed_beyond_its_bound_and_holds_at_it(
        self, path: str, title: str, key: str, bound: float, at_least: bool
    ) -> None:
        at_the_bound = [bound * value for value in THE_SAME[path][key]]
        beyond = [value * (0.99 if at_least else 1.01) for value in at_the_bound]

        assert f"{path} against {title}" not in missed(**{path: {key: at_the_bound}})
        assert f"{path} against {title}" in missed(**{path: {key: beyond}})

    def test_a_path_that_was_not_measured_is_held_against_nothing(self) -> None:
        only = {"routed": THE_SAME["routed"]}

        assert list(targets.outcomes(only, {}, {})) == []

    @given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
    def test_a_machine_that_changes_between_rounds_changes_no_ratio(
        self, speeds: list[float]
    ) -> None:
        def at_speed(found: dict[str, list[float]]) -> dict[str, list[float]]:
            return {
                key: [value * speed for value, speed in zip(values, speeds, strict=True)]
                for key, values in found.items()
            }

        paths = {path: at_speed(found) for path, found in THE_SAME.items()}

        for found in targets.against("masquerade", paths).values():
            assert found == pytest.approx(dict.fromkeys(KEYS, 1.0))


RESULTS: dict[str, Any] = {
    "machine": {"cores": 2, "processor": "P", "kernel": "K", "python": "3"},
    "rounds": 3,
    "rounds_of_paths": THE_SAME,
    "paths": {path.key: dict.fromkeys(KEYS, 1234.5) for path in PATHS},
    "flows": {
        "masquerade": {"1": 150.0, "10": 140.0},
        "direct": {"1": 160.0, "10": 155.0, "1000000": 130.25},
        "routed": {"1": 120.0, "10": 121.0, "1000000": 110.0},
    },
    "table": {},
    "expiry": {},
}


class TestTables:
    def test_a_figure_that_was_not_taken_is_a_dash(self) -> None:
        sheet = report.of_flows(RESULTS["flows"])

        assert [title for title, _ in sheet.headings] == [
            "data path", "1 flow", "10 flows", "1,000,000 flows",
        ]  # fmt: skip
        assert list(sheet.rows) == [
            ["masquerade", "150.0", "140.0", "-"],
            ["direct", "160.0", "155.0", "130.2"],
            ["routed", "120.0", "121.0", "110.0"],
        ]

    def test_each_path_whose_flows_are_counted_is_a_path_of_the_tables(self) -> None:
        assert set(flows.PATHS) <= {path.key for path in PATHS}


class TestChart:
    def test_it_shows_both_kernels_paths_and_the_three_of_nfmasq(self, tmp_path: Path) -> None:
        chart = pytest.importorskip("bench.chart", reason="takes matplotlib")
        chart.draw(RESULTS, tmp_path / "chart.svg")
        drawn = (tmp_path / "chart.svg").read_text()

        shown = [path.title for path in PATHS if f">{path.title}<" in drawn]
        assert shown == [
            "kernel forwarding, no NAT",
            "kernel MASQUERADE",
            "nfmasq, flow cache direct",
            "nfmasq, flow cache routed",
            "nfmasq, all by NFQUEUE",
        ]
        assert ">1,000,000<" in drawn

    def test_it_can_do_without_flows_and_with_few_paths(self, tmp_path: Path) -> None:
        chart = pytest.importorskip("bench.chart", reason="takes matplotlib")
        results = RESULTS | {"flows": {}, "paths": {"floor": RESULTS["paths"]["floor"]}}

        chart.draw(results, tmp_path / "chart.svg")

        assert (tmp_path / "chart.svg").read_text().endswith("</svg>\n")
