"""Tests with real traffic: a lab for each module, and a masquerade in it for each test.

    def test_ports_run_out(lab, masquerade):
        daemon = masquerade("--filtering", "endpoint-independent", ports="61000-61003")
        lab.inside[0].run(["curl", ...])

Every test that uses the lab runs several times: the fixture `data_path` has the options that each
nfmasq of the lab gets, so that its packets take one of `DATA_PATHS`. A module with a lab of its own
hands the options on, `Lab(..., options=data_path)`. A module whose tests have nothing to do with
packets runs once, by a fixture `data_path` of its own; `taking` makes a fixture of other paths.

In parallel (`pytest -n 3 --dist loadfile`), a module and its lab stay in one worker.

The tests need root and a kernel that can queue packets. Without these they fail where CI=true, and
are skipped elsewhere.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from socket import socket
from typing import Any

import pytest

from nfmasq.lab import Daemon, Lab
from tests.traffic.servers import Visitor, tcp_listener, udp_echo

# Each rule names something of the kernel that the masquerade cannot do without. The rules are tried
# in a nameless namespace that is gone with the shell.
PROBE = """
set -e
iptables -t raw -A PREROUTING -m socket -j NFQUEUE --queue-num 0
iptables -t mangle -A FORWARD -j NFQUEUE --queue-num 0
"""


@pytest.fixture(scope="session", autouse=True)
def _kernel() -> None:
    probe = subprocess.run(["unshare", "--net", "sh", "-c", PROBE], capture_output=True, text=True)
    if probe.returncode == 0:
        return
    missing = f"takes root and a kernel with NFQUEUE: {' '.join(probe.stderr.split())}"
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="session", autouse=True)
def _xtables_lock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give each worker a lock file: iptables-legacy locks a file that all namespaces share."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path_factory.getbasetemp() / "xtables.lock"))
        yield


DATA_PATHS = {
    "queue": ("--flow-cache=off",),
    "no-gso": ("--flow-cache=off", "--no-gso"),
    "routed": ("--flow-cache=routed", "--flow-cache-after=1"),
    "direct": ("--flow-cache=direct", "--flow-cache-after=1"),
}
"""Options of nfmasq by the way that packets go: all by the queue, with superpackets or without, or
by the kernel as soon as their flow can be cached."""


def taking(*names: str) -> Any:
    """Make a fixture `data_path`: the tests of a module run once for each of these DATA_PATHS."""

    @pytest.fixture(scope="module", params=names)
    def data_path(request: pytest.FixtureRequest) -> tuple[str, ...]:
        return DATA_PATHS[request.param]

    return data_path


data_path = taking("no-gso", "routed", "direct")


@pytest.fixture(scope="module")
def lab(data_path: tuple[str, ...]) -> Iterator[Lab]:
    """Build a lab with two hosts on either side of a gateway, on which nothing runs yet."""
    with Lab(inside=2, outside=2, options=data_path) as lab:
        yield lab


@pytest.fixture
def masquerade(lab: Lab) -> Iterator[Callable[..., Daemon]]:
    """Yield a function that masquerades until the test is over, with options of `nfmasq run`."""
    with ExitStack() as stack:

        def start(*options: str, **keywords: Any) -> Daemon:
            return stack.enter_context(lab.masquerading(*options, **keywords))

        yield start


@pytest.fixture
def start(lab: Lab) -> Iterator[Callable[..., Daemon]]:
    """Yield a function that starts nfmasq, without rules, until the test is over."""
    with ExitStack() as stack:

        def started(*options: str) -> Daemon:
            daemon = lab.nfmasq(*options)
            stack.callback(daemon.stop)
            return daemon

        yield started


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Yield a stack that closes the sockets that a test puts on it."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def listener(lab: Lab) -> Iterator[socket]:
    """Listen on a TCP socket of the first outside host."""
    with tcp_listener(lab.outside[0]) as listener:
        yield listener


@pytest.fixture
def visitors(lab: Lab) -> Iterator[list[Visitor]]:
    """Run a UDP echo server on the first outside host; yields the list of its visitors."""
    with udp_echo(lab.outside[0]) as visitors:
        yield visitors
