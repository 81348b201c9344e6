"""`nfmasq doctor` on a gateway: what it says before and after each thing goes wrong.

No packet passes here, so superpackets make no difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nfmasq.config import Configuration
from nfmasq.daemon.control import ControlServer
from nfmasq.engine import Masquerade
from tests.programs import program

RULES = Path(__file__).parents[2] / "iptables" / "nfmasq-rules"

HOLD_QUEUE = """
import sys
from netfilterqueue import NetfilterQueue
queue = NetfilterQueue()
queue.bind(int(sys.argv[1]), print)
print("bound", flush=True)
sys.stdin.read()
"""


# Both interfaces carry packets, to other ends in the same namespace that nobody listens at.
LINKS = """
link add lan type veth peer name lan-end
link add wan type veth peer name wan-end
link set lan-end up
link set wan-end up
address add 10.77.0.1/24 dev lan
address add 198.51.100.2/24 dev wan
link set lan up
link set wan up
route add default via 198.51.100.1
"""


class Gateway:
    """A network namespace with the interfaces lan and wan, and no traffic."""

    def __init__(self, control: Path) -> None:
        self.name = f"nfmasq-doctor-{os.getpid()}"
        self.control = control
        self.status = 0

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

    def doctor(self, *options: str, prefix: Sequence[str] = ()) -> tuple[int, list[str]]:
        """Run doctor; returns its exit status, and each finding that is a warning or a problem."""
        findings = self.findings(*options, prefix=prefix)
        return self.status, [f"{finding['level']}: {finding['what']}" for finding in findings]

    def findings(self, *options: str, prefix: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Run doctor, by a command before it; returns each warning and each problem."""
        command = [*prefix, sys.executable, "-m", "nfmasq", "doctor", "--json", *options]
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, *command, "--control", self.control],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stderr == ""
        self.status = done.returncode
        findings = json.loads(done.stdout)
        return [finding for finding in findings if finding["level"] in ("warning", "problem")]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    if os.geteuid() != 0:
        reason = "needs root, for network namespaces"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    gateway = Gateway(tmp_path / "nfmasq.sock")
    subprocess.run(["ip", "netns", "add", gateway.name], check=True)
    try:
        for line in LINKS.strip().splitlines():
            gateway.run("ip", *line.split())
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
    assert gateway.doctor() == (0, [])

    gateway.run("ip", "address", "add", "10.77.0.2/16", "dev", "wan")
    overlap = "10.77.0.0/24 on lan (inside) and 10.77.0.0/16 on wan (outside) overlap"
    assert gateway.doctor() == (0, [f"warning: {overlap}"])


NFT_TRANSLATIONS = """
table ip theirs {
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        oifname "wan" masquerade
        oifname "wg0" masquerade
        ip saddr 172.17.0.0/16 masquerade
    }
    chain prerouting {
        type nat hook prerouting priority dstnat; policy accept;
        iifname "wan" tcp dport { 8080, 9000-9010 } dnat to 172.17.0.2
        iifname "wan" udp dport 61000-61009 redirect to :53
        iifname "lan" tcp dport 8080 redirect to :3128
    }
}
"""


def test_translations_of_nft_beside_ours(gateway: Gateway, tmp_path: Path) -> None:
    nft = program("nft", "nftables")
    rules, file = tmp_path / "theirs.nft", tmp_path / "nfmasq.toml"
    rules.write_text(NFT_TRANSLATIONS)
    file.write_text('forward = ["tcp:8080=10.77.0.2:80"]')
    gateway.rules("--forward", "tcp:8080")
    gateway.run(nft, "-f", str(rules))

    findings = gateway.findings("--config", str(file))

    assert [(each["level"], each["what"].partition(":")[0]) for each in findings] == [
        ("problem", "another rule translates, too"),
        ("problem", "nfmasq forwards port 8080, which another rule leads elsewhere"),
        (
            "warning",
            "another rule leads masquerade port 61000 and 9 more elsewhere, which fails while a "
            "session has it",
        ),
    ]
    for command in findings[0]["commands"] + findings[1]["commands"]:
        gateway.run("sh", "-c", command)
    assert [each["level"] for each in gateway.findings("--config", str(file))] == ["warning"]


def test_docker_beside_ours(gateway: Gateway) -> None:
    gateway.rules()
    for rule in (
        "POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
        "PREROUTING ! -i docker0 -p tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80",
    ):
        gateway.run("iptables", "-t", "nat", "-A", *rule.split())

    assert gateway.doctor() == (0, [])


SERVE = """
import socket, sys
with socket.create_server(("", 61005)), socket.create_server(("", 8080)):
    print("listening", flush=True)
    sys.stdin.read()
"""


def test_programs_that_serve_ports_of_nfmasq(gateway: Gateway, tmp_path: Path) -> None:
    file = tmp_path / "nfmasq.toml"
    file.write_text('forward = ["tcp:8080=10.77.0.2:80"]')
    gateway.rules("--forward", "tcp:8080")
    command = ["ip", "netns", "exec", gateway.name, sys.executable, "-c", SERVE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"
        status, findings = gateway.doctor("--config", str(file))
        server.terminate()

    assert status == 0
    process = f"(process {server.pid})"
    assert [finding.partition(process)[2] for finding in findings] == [
        " serves TCP port 8080, but what comes from the outside there goes inside",
        " serves TCP port 61005, a masquerade port, which a session may take from it",
    ]


def test_as_an_ordinary_user_it_answers(gateway: Gateway) -> None:
    gateway.rules()
    user = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]

    status, findings = gateway.doctor(prefix=user)

    assert (status, findings) == (0, ["warning: no CAP_NET_ADMIN: nfmasq run would fail"])
