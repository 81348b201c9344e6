"""traceroute from the inside sees every hop, as if no masquerade stood in between."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from nfmasq.lab import Lab


@pytest.fixture(scope="module", autouse=True)
def _masquerading(lab: Lab) -> Iterator[None]:
    with lab.masquerading():
        yield


@pytest.mark.parametrize("probes", [[], ["-U"], ["-I"], ["-T"]], ids=["any", "udp", "icmp", "tcp"])
def test_every_hop_answers(lab: Lab, probes: list[str]) -> None:
    way = ["10.77.0.1", "198.51.100.1", "203.0.113.11"]
    # With the zeros, traceroute always waits 15 seconds, not just ten times as long as the next
    # hop took.
    patience = ["-w", "15,0,0"]
    command = ["traceroute", "-n", "-q", "1", *patience, *probes, lab.outside[0].address]
    told = lab.inside[0].run(command).stdout
    hops = re.findall(r"^ *\d+ +(\S+)(?: .* ms)?", told, re.MULTILINE)
    assert hops == way
