"""What the benchmarks of the flow cache measure was carried by the flow cache."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from bench import flows, network, paths, traffic
from nfmasq.daemon.control import request
from nfmasq.errors import NfmasqError
from nfmasq.lab import Lab

SECONDS = 0.2


@pytest.fixture(autouse=True)
def _flow_cache() -> None:
    if not paths.has_flow_cache():
        missing = "takes a kernel and a libbpf that load the flow cache's programs"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


@pytest.fixture
def bare_lab() -> Iterator[Lab]:
    """Build a lab in which no rules are loaded; the data path brings its own."""
    with Lab(1, 1) as lab:
        yield lab


@pytest.mark.parametrize("mode", paths.CACHED)
def test_a_flood_passes_by_the_cache(bare_lab: Lab, mode: str) -> None:
    daemon = paths.cached(mode)(bare_lab)

    results = network._udp(64, bare_lab, daemon, SECONDS)

    cached = {
        labels["direction"]: packets
        for name, labels, packets in request(daemon.control, "stats")
        if name == "nfmasq_cached_packets_total"
    }
    assert cached["out"] > 0.5 * results["udp_64"] * 1e3 * SECONDS


def test_a_path_by_the_cache_does_not_go_without_the_cache(
    bare_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring_up = bare_lab.rules
    monkeypatch.setattr(bare_lab, "rules", lambda *options: bring_up(*options, "--no-flow-cache"))

    with pytest.raises(NfmasqError, match="does without its flow cache"):
        paths.cached("routed")(bare_lab)


def test_each_flow_over_which_datagrams_are_spread_is_known_in_the_kernel() -> None:
    """There are more flows than addresses: some go by a second source port."""
    with flows.Spread() as spread:
        for size in (3, traffic.ADDRESSES + 10_000):
            spread.know(size)
            found = spread.measure(SECONDS)

            assert set(found) == set(flows.PATHS)
            assert min(found.values()) > 0
        listed = ["iptables", "-t", "security", "-vnxL", "NFMASQ-FORWARD"]
        rules = spread._caching.gateway.run(listed).stdout.splitlines()

    queued = [int(rule.split()[0]) for rule in rules if "NFQUEUE" in rule]
    assert queued
    assert not any(queued)
