"""`nfmasq doctor` on a gateway: what it says before and after each thing goes wrong.

No packet passes here, so superpackets make no difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfmasq.config import Configuration
from nfmasq.daemon.control import ControlServer
from nfmasq.engine import Masquerade

RULES = Path(__file__).parents[2] / "iptables" / "nfmasq-rules"

HOLD_QUEUE = """
import sys
from netfilterqueue import NetfilterQueue
queue = NetfilterQueue()
queue.bind(int(sys.argv[1]), print)
print("bound", flush=True)
sys.stdin.read()
"""


class Gateway:
    """A network namespace with the interfaces lan and wan, and no traffic."""

    def __init__(self, control: Path) -> None:
        self.name = f"nfmasq-doctor-{os.getpid()}"
        self.control = control

    def run(self, *command: str) -> None:
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def rules(self, *options: str) -> None:
        self.run(str(RULES), "up", "--inside", "lan", "--outside", "wan", *options)

    def doctor(self, *options: str) -> tuple[int, list[str]]:
        """Run doctor; returns its exit status, and each finding that is a warning or a problem."""
        command = [sys.executable, "-m", "nfmasq", "doctor", "--json", *options]
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, *command, "--control", self.control],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stderr == ""
        findings = json.loads(done.stdout)
        return done.returncode, [
            f"{finding['level']}: {finding['what']}"
            for finding in findings
            if finding["level"] in ("warning", "problem")
        ]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    if os.geteuid() != 0:
        reason = "needs root, for network namespaces"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    gateway = Gateway(tmp_path / "nfmasq.sock")
    subprocess.run(["ip", "netns", "add", gateway.name], check=True)
    try:
        gateway.run("ip", "link", "add", "lan", "type", "veth", "peer", "name", "wan")
        gateway.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        yield gateway
    finally:
        subprocess.run(["ip", "netns", "del", gateway.name], check=True)


@pytest.fixture
def held_queue(gateway: Gateway) -> Iterator[None]:
    """Bind queue 0 by a program, as a running nfmasq does."""
    command = ["ip", "netns", "exec", gateway.name, sys.executable, "-c", HOLD_QUEUE, "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"bound\n"
        yield
        program.terminate()


@pytest.fixture
def running(gateway: Gateway, held_queue: None) -> Iterator[None]:
    """Serve a control socket that answers with the default configuration."""
    masquerade = Masquerade(lock=threading.RLock())
    server = ControlServer(gateway.control, masquerade, Configuration().as_table, list, list)
    server.start()
    yield
    server.close()


def test_a_machine_that_is_set_up_has_no_problem(gateway: Gateway) -> None:
    gateway.rules()

    assert gateway.doctor() == (0, [])


@pytest.mark.usefixtures("running")
def test_a_machine_on_which_nfmasq_runs_has_no_problem(gateway: Gateway) -> None:
    gateway.rules()

    assert gateway.doctor() == (0, [])


@pytest.mark.usefixtures("running")
def test_nfmasq_without_rules(gateway: Gateway) -> None:
    assert gateway.doctor() == (
        1,
        ["problem: the rules are not loaded: no packet reaches nfmasq"],
    )


@pytest.mark.usefixtures("running")
def test_rules_for_another_queue_and_other_ports(gateway: Gateway) -> None:
    gateway.rules("--queue", "5", "--ports", "62000-62999")

    assert gateway.doctor() == (
        1,
        [
            "problem: queue: the rules have 5, nfmasq has 0",
            "problem: ports: the rules have 62000-62999, nfmasq has 61000-65095",
        ],
    )


@pytest.mark.usefixtures("held_queue")
def test_another_program_has_the_queue(gateway: Gateway) -> None:
    status, [finding] = gateway.doctor()

    assert status == 1
    assert finding.startswith("problem: queue 0 is bound by another program")


def test_no_forwarding(gateway: Gateway) -> None:
    gateway.run("sysctl", "-qw", "net.ipv4.ip_forward=0")

    assert gateway.doctor() == (1, ["problem: net.ipv4.ip_forward is not 1"])


def test_local_ports_that_meet_the_masquerade_ports(gateway: Gateway) -> None:
    gateway.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=32768 65000")
    status, [finding] = gateway.doctor()
    assert status == 1
    assert "meet this machine's own, 32768-65000" in finding

    gateway.run("sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=61000-65095")
    assert gateway.doctor() == (0, [])


@pytest.mark.parametrize("iptables", ["iptables-nft", "iptables-legacy"])
def test_a_masquerade_of_the_kernel_beside_ours(gateway: Gateway, iptables: str) -> None:
    gateway.rules()
    rule = ["POSTROUTING", "-o", "wan", "-j", "MASQUERADE"]
    gateway.run(iptables, "-t", "nat", "-A", *rule)

    assert gateway.doctor() == (
        1,
        [f"problem: another rule translates, too: -t nat -A {' '.join(rule)}"],
    )


@pytest.mark.parametrize("iptables", ["iptables-nft", "iptables-legacy"])
def test_our_rules_are_seen_in_either_iptables(gateway: Gateway, iptables: str) -> None:
    gateway.rules("--iptables", iptables, "--queue", "5")

    assert gateway.doctor() == (1, ["problem: queue: the rules have 5, nfmasq has 0"])


@pytest.mark.parametrize("iptables", ["iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize(
    ("change", "consequence"),
    [
        ("-t security -F NFMASQ-FORWARD", "inside addresses go out"),
        ("-t security -D FORWARD -j NFMASQ-FORWARD", "inside addresses go out"),
        ("-t security -F NFMASQ-OUTPUT", "inside addresses go out in what this machine itself"),
        ("-t raw -F NFMASQ-OUTPUT", "errors about rewritten packets do not come in"),
        ("-t raw -F NFMASQ-PREROUTING", "answers do not come in"),
    ],
)
def test_rules_that_are_no_longer_all_there(
    gateway: Gateway, iptables: str, change: str, consequence: str
) -> None:
    gateway.rules("--iptables", iptables)
    assert gateway.doctor() == (0, [])

    gateway.run(iptables, *change.split())

    status, problems = gateway.doctor()
    assert status == 1
    assert any(problem.startswith(f"problem: {consequence}") for problem in problems)


@pytest.mark.parametrize("iptables", ["iptables-nft", "iptables-legacy"])
def test_rules_with_every_option(gateway: Gateway, tmp_path: Path, iptables: str) -> None:
    gateway.rules(
        *("--iptables", iptables, "--queue", "7", "--ports", "600-1023,61000-65095"),
        *("--forward", "tcp:8080", "--forward", "udp:5000-5009"),
        *("--other-protocols", "--clamp-mss", "--masquerade-address", "198.51.100.2"),
    )
    file = tmp_path / "nfmasq.toml"
    file.write_text(
        """
        queue = 7
        ports = "600-1023,61000-65095"
        other-protocols = "by-address"
        forward = ["tcp:8080=10.77.0.2:80", "udp:5000-5009=10.77.0.2:5000-5009"]
        """
    )
    assert gateway.doctor("--config", str(file)) == (0, [])

    gateway.run(iptables, "-t", "raw", "-F", "NFMASQ-OTHER")

    status, [finding] = gateway.doctor("--config", str(file))
    assert status == 1
    assert finding.startswith("problem: answers in other protocols do not come in: missing is ")


def test_an_inside_network_with_the_numbers_of_the_outside_one(gateway: Gateway) -> None:
    gateway.rules()
    gateway.run("ip", "address", "add", "10.77.0.1/24", "dev", "lan")
    gateway.run("ip", "address", "add", "10.78.0.2/24", "dev", "wan")
    assert gateway.doctor() == (0, [])

    gateway.run("ip", "address", "add", "10.77.0.2/16", "dev", "wan")
    overlap = "10.77.0.0/24 on lan (inside) and 10.77.0.0/16 on wan (outside) overlap"
    assert gateway.doctor() == (0, [f"warning: {overlap}"])
