"""Where the machine has too little for nfmasq: descriptors, threads, memory, a reader of its log.

A start without means is one line and changes nothing. While nfmasq runs, none of them stops
packets.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from socket import SOCK_DGRAM, socket

import pytest

from nfmasq.lab import Daemon, Lab
from tests.traffic.clients import connected, echoed
from tests.traffic.observed import eventually, figure
from tests.traffic.servers import ECHO_PORT, udp_echo

Masquerade = Callable[..., Daemon]


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    """What is tried here has nothing to do with the way that packets take."""
    return ()


@pytest.fixture(scope="module", autouse=True)
def _server(lab: Lab) -> Iterator[None]:
    with udp_echo(lab.outside[0]):
        yield


@pytest.fixture
def client(lab: Lab, stack: ExitStack) -> socket:
    return stack.enter_context(connected(lab.inside[0], SOCK_DGRAM, lab.outside[0], ECHO_PORT))


def command(folder: Path, *options: str) -> list[str]:
    own = ["--config", os.devnull, "--control", str(folder / "control"), "--metrics", "off"]
    return [sys.executable, "-m", "nfmasq", "run", *own, *options]


def state(lab: Lab) -> tuple[str, str]:
    """Return the gateway's rules and its forwarding."""
    rules = lab.gateway.run(["iptables-save"]).stdout.splitlines()
    return "\n".join(line for line in rules if line[0] != "#"), lab.gateway.sysctl(
        "net.ipv4.ip_forward"
    )


LIMITS = [
    *(("NOFILE", files) for files in (8, 16, 33, 60, 100)),
    *(("AS", 1_000_000 * megabytes) for megabytes in (60, 90, 120, 150)),
]


@pytest.mark.parametrize(("name", "limit"), LIMITS)
def test_a_start_without_means_is_one_line_and_changes_nothing(
    lab: Lab, tmp_path: Path, name: str, limit: int
) -> None:
    before = state(lab)
    kind = getattr(resource, f"RLIMIT_{name}")

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(tmp_path, "--inside", "lan", "--outside", "wan"),
            cwd=Path(__file__).parents[2],
            preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)),
            capture_output=True,
            text=True,
            timeout=60,
        )

    done = lab.gateway.call(run)

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("nfmasq: ")
    assert "ulimit" in line
    assert state(lab) == before
    assert not (tmp_path / "control").exists()


def full_pipe(stack: ExitStack) -> int:
    """Make a pipe that is full, whose reader is stuck; returns the end to write into."""
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    stack.callback(os.close, writing)
    fcntl.fcntl(writing, fcntl.F_SETFL, os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    fcntl.fcntl(writing, fcntl.F_SETFL, 0)
    return writing


def test_a_stuck_reader_of_the_log_stops_neither_packets_nor_the_end(
    lab: Lab, client: socket, stack: ExitStack, tmp_path: Path
) -> None:
    lab.rules("up")
    stack.callback(lab.rules, "down")
    daemon = lab.gateway.popen(
        command(tmp_path, "--log-level", "debug"),
        cwd=Path(__file__).parents[2],
        stderr=full_pipe(stack),
    )
    stack.callback(daemon.wait, 30)
    stack.callback(daemon.kill)
    assert eventually(lambda: echoed(client))
    # A packet from a hook that no rule of ours has is a line of the packet thread.
    stray = ["INPUT", "-i", "lan", "-p", "icmp", "-j", "NFQUEUE", "--queue-num", "0"]
    lab.gateway.run(["iptables", "-A", *stray])
    stack.callback(lab.gateway.run, ["iptables", "-D", *stray])
    lab.inside[0].run(["ping", "-c", "3", "-i", "0.2", "-W", "1", "10.77.0.1"], check=False)
    assert all(echoed(client) for _ in range(5))

    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(20) == 0
    assert not (tmp_path / "control").exists()


SLOW_CLIENTS = """
import socket, sys, time
clients = []
for _ in range(1013):
    client = socket.socket()
    client.connect(("127.0.0.1", int(sys.argv[1])))
    client.send(b"GET /met")
    clients.append(client)
    if len(clients) == 100:
        print("connected", flush=True)
while True:
    time.sleep(0.1)
    for client in clients:
        try:
            client.send(b"r")
        except OSError:
            pass
"""


def test_slow_clients_of_the_metrics_stop_nothing(
    lab: Lab, masquerade: Masquerade, client: socket, stack: ExitStack
) -> None:
    daemon = masquerade()
    port = daemon.metrics.rpartition(":")[2]
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    slow = lab.gateway.popen(
        [*nobody, sys.executable, "-c", SLOW_CLIENTS, port], stdout=subprocess.PIPE
    )
    stack.callback(slow.wait, 30)
    stack.callback(slow.kill)
    assert slow.stdout is not None
    assert slow.stdout.readline() == "connected\n"

    def scraped() -> bool:
        with urllib.request.urlopen(f"http://{daemon.metrics}/metrics", timeout=20) as answer:
            return b"nfmasq_build_info" in answer.read()

    for _ in range(3):
        assert echoed(client)
        assert lab.gateway.call(scraped)
        assert figure(daemon, "nfmasq_entries") >= 1
    assert len(os.listdir(f"/proc/{daemon.pid}/fd")) < 150
    assert int(daemon_status(daemon, "Threads")) < 60


def daemon_status(daemon: Daemon, name: str) -> str:
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    return next(line.split(":")[1] for line in lines if line.startswith(f"{name}:"))
