"""A network of 300 hosts, with more connections open than there are ports, by the defaults.

Each host has 20 connections open, and says something on each from time to time. Together the hosts
open and close 50 connections a second. Nobody is refused, and no connection breaks.

It lasts for some seconds; with NFMASQ_TEST_MINUTES in the environment, for so many minutes.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from contextlib import ExitStack
from subprocess import PIPE

import pytest

from nfmasq.lab import Lab
from tests.traffic import crowd
from tests.traffic.observed import entries, figure

SECONDS = 60 * float(os.environ.get("NFMASQ_TEST_MINUTES", "0.2"))
HOSTS, OPEN, PER_SECOND = 300, 20, 50
PORTS = 4096


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    """Return the default: the packets are small."""
    return ()


def test_nobody_is_refused_and_no_connection_breaks(lab: Lab, stack: ExitStack) -> None:
    inside, server = lab.inside[0], lab.outside[0]
    # One machine has the addresses of all the hosts.
    inside.ip("address add 10.78.0.0/16 dev lo")
    lab.gateway.ip(f"route add 10.78.0.0/16 via {inside.address}")
    python = [sys.executable, crowd.__file__]
    serving = server.popen([*python, "serve", server.address], stdout=PIPE)
    assert serving.stdout
    assert serving.stdout.readline() == "ready\n"
    numbers = map(str, (HOSTS, OPEN, PER_SECOND, SECONDS))
    with lab.masquerading() as daemon:
        visiting = [*python, "visit", server.address, *numbers]
        visitors = stack.enter_context(inside.popen(visiting, stdin=PIPE, stdout=PIPE))
        assert visitors.stdout
        assert json.loads(visitors.stdout.readline()) == {
            "open": HOSTS * OPEN,
            "opened": int(PER_SECOND * SECONDS),
            "failures": {},
        }
        assert figure(daemon, "nfmasq_errors_total", reason="no_port") == 0
        held = entries(daemon, protocol="tcp")
        taken = {entry["mport"] for entry in held}
        free = figure(daemon, "nfmasq_ports_free", protocol="tcp")
        assert free == PORTS - len(taken)
        assert Counter(e["state"] for e in held)["ESTABLISHED"] == HOSTS * OPEN
        visitors.communicate()
    serving.kill()
    serving.wait()
