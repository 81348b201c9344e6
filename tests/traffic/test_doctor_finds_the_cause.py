"""Nothing passes: `nfmasq doctor` names the cause, and what it prints, pasted, mends it.

Each test first sees a ping from the inside fail. What doctor cannot know stands in capitals in its
commands; here it is filled in as a person would.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import AF_INET, SOCK_DGRAM

import pytest

from nfmasq.cli.doctor.finding import Finding
from nfmasq.lab import Daemon, Host, Lab
from tests.programs import program
from tests.traffic.clients import PATIENCE

KNOWN_TO_PEOPLE = {"ROUTER": "198.51.100.1", "ADDRESS/PREFIX": "198.51.100.2/24"}

RULES = Path(__file__).parents[2] / "iptables" / "nfmasq-rules"

ACCEPTING_TABLE = """
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
COMMIT
"""

# What Docker makes of an empty table, with one container that serves port 8080.
DOCKER = """
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-USER -j RETURN
COMMIT
"""

# What such a program sets up for every new network is gone with it.
NO_DOCKER = """
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
COMMIT
"""

NFT_FIREWALL = """
table inet firewall {
    chain ahead {
        type filter hook forward priority filter - 10; policy accept;
    }
    chain forward {
        type filter hook forward priority filter; policy drop;
        iifname "wg0" accept
    }
}
"""


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    """Run once: no packet is large here."""
    return ()


@pytest.fixture
def daemon(masquerade: Callable[..., Daemon]) -> Daemon:
    return masquerade()


@pytest.fixture(autouse=True)
def _as_it_was(lab: Lab) -> Iterator[None]:
    yield
    gateway = lab.gateway
    for restore in ("iptables-nft-restore", "iptables-legacy-restore"):
        gateway.run([restore], input=ACCEPTING_TABLE)
    for name in ("wan", "lan"):
        gateway.ip(f"link set {name} up")
        gateway.sysctl(f"net.ipv4.conf.{name}.rp_filter", 0)
    gateway.sysctl("net.ipv4.ip_forward", 1)
    lab.router.ip("link set wan up")
    gateway.ip("address replace 198.51.100.2/24 dev wan")
    gateway.ip("route replace default via 198.51.100.1")


class Doctor:
    """Doctor on the lab's gateway; `options` are more options of it."""

    def __init__(self, lab: Lab, daemon: Daemon) -> None:
        self._lab = lab
        self._control = daemon.control
        self.status = 0

    def look(self) -> list[Finding]:
        """Return what is a warning or a problem."""
        command = [sys.executable, "-m", "nfmasq", "doctor", "--json"]
        line = [*command, "--control", str(self._control)]
        done = self._lab.gateway.run(line, check=False, cwd=RULES.parents[1])
        assert done.stderr == ""
        self.status = done.returncode
        found = [Finding(**each) for each in json.loads(done.stdout)]
        return [each for each in found if each.level in ("warning", "problem")]

    def told(self) -> list[str]:
        return [finding.what for finding in self.look()]

    def paste(self, findings: list[Finding]) -> list[str]:
        """Have a shell run the commands of findings; returns them as they were printed."""
        lines = [line for finding in findings for line in finding.commands]
        script = "\n".join(lines)
        for unknown, known in KNOWN_TO_PEOPLE.items():
            script = script.replace(unknown, known)
        self._lab.gateway.run(["sh", "-ec", script])
        return lines


@pytest.fixture
def doctor(lab: Lab, daemon: Daemon) -> Doctor:
    assert_passes(lab)
    return Doctor(lab, daemon)


def passes(lab: Lab) -> bool:
    """Say whether a ping from the inside is answered."""
    ping = ["ping", "-q", "-c", "1", "-W", "1", lab.outside[0].address]
    return lab.inside[0].run(ping, check=False).returncode == 0


def assert_passes(lab: Lab) -> None:
    # A link may take a second to carry packets again; until then, an error may be the answer.
    deadline = time.monotonic() + PATIENCE
    while not passes(lab):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_mended(lab: Lab, doctor: Doctor) -> tuple[list[str], list[str]]:
    """See that nothing passes, and that all is well after pasting; returns causes and commands."""
    assert not passes(lab)
    findings = doctor.look()
    assert doctor.status == 1
    pasted = doctor.paste(findings)
    assert_passes(lab)
    assert (doctor.told(), doctor.status) == ([], 0)
    return [finding.what for finding in findings], pasted


@pytest.mark.parametrize(
    ("iptables", "rules", "what"),
    [
        ("iptables", ["-P FORWARD DROP"], "the policy of FORWARD"),
        ("iptables-legacy", ["-P FORWARD DROP"], "the policy of FORWARD"),
        (
            "iptables",
            ["-A FORWARD -j REJECT"],
            "-A FORWARD -j REJECT --reject-with icmp-port-unreachable",
        ),
        (
            "iptables-legacy",
            ["-N block", "-A block -j DROP", "-A FORWARD -j block"],
            "-A block -j DROP",
        ),
    ],
    ids=["policy", "policy-legacy", "reject", "chain-legacy"],
)
def test_a_firewall_that_lets_nothing_through(
    lab: Lab, doctor: Doctor, iptables: str, rules: list[str], what: str
) -> None:
    for rule in rules:
        lab.gateway.run([iptables, *rule.split()])

    causes, pasted = assert_mended(lab, doctor)

    assert causes[0].endswith(f"to the outside (wan) is dropped by {iptables} -t filter: {what}")
    assert causes[1].startswith("the answer to a connection from 10.77.0.")
    assert pasted == [
        f"{iptables} -I FORWARD -i lan -o wan -j ACCEPT",
        f"{iptables} -I FORWARD -i wan -o lan -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    ]


def test_all_is_well(doctor: Doctor) -> None:
    assert (doctor.told(), doctor.status) == ([], 0)


def test_a_rule_against_one_host(lab: Lab, doctor: Doctor) -> None:
    for host in lab.inside:
        lab.gateway.run(["iptables", "-A", "FORWARD", "-s", host.address, "-j", "DROP"])
    assert not passes(lab)

    # The hosts are not known to doctor until they are seen; which one it asks about, it says.
    [finding] = doctor.look()
    [command] = finding.commands

    address = finding.what.split()[3]
    assert address in {each.address for each in lab.inside}
    assert command == f"iptables -D FORWARD -s {address}/32 -j DROP"


def test_docker(lab: Lab, doctor: Doctor) -> None:
    lab.gateway.run(["iptables-restore"], input=DOCKER)

    _, pasted = assert_mended(lab, doctor)

    assert [line.split()[:3] for line in pasted] == [["iptables", "-I", "DOCKER-USER"]] * 2
    lab.gateway.run(["iptables-restore"], input=NO_DOCKER)


def test_two_firewalls(lab: Lab, doctor: Doctor) -> None:
    nft = program("nft", "nftables")
    lab.gateway.run([nft, "-f", "-"], input=NFT_FIREWALL)
    lab.gateway.run(["iptables", "-P", "FORWARD", "DROP"])
    try:
        causes, pasted = assert_mended(lab, doctor)
    finally:
        lab.gateway.run([nft, "delete", "table", "inet", "firewall"])

    assert sum("nft: chain forward of table inet firewall" in cause for cause in causes) == 2
    assert sum("iptables -t filter: the policy of FORWARD" in cause for cause in causes) == 2
    assert not any(" ahead " in line for line in pasted)


def test_no_default_route(lab: Lab, doctor: Doctor) -> None:
    lab.gateway.ip("route delete default")

    [cause], pasted = assert_mended(lab, doctor)

    assert cause.startswith("there is no route for a packet from 10.77.0.")
    # The only neighbour that the gateway has talked to is the router.
    assert pasted == ["ip route add default via 198.51.100.1 dev wan"]


def test_the_outside_link_down(lab: Lab, doctor: Doctor) -> None:
    lab.gateway.ip("link set wan down")

    causes, pasted = assert_mended(lab, doctor)

    assert causes[0] == "wan (outside) is down"
    assert pasted[0] == "ip link set wan up"


def test_the_outside_link_without_a_carrier(lab: Lab, doctor: Doctor) -> None:
    lab.router.ip("link set wan down")
    assert not passes(lab)

    assert (doctor.told(), doctor.status) == (["wan (outside) has no carrier"], 1)


def test_the_inside_link_down(lab: Lab, doctor: Doctor) -> None:
    lab.gateway.ip("link set lan down")

    causes, pasted = assert_mended(lab, doctor)

    assert causes == ["lan (inside) is down"]
    assert pasted == ["ip link set lan up"]


def test_no_outside_address(lab: Lab, doctor: Doctor) -> None:
    lab.gateway.ip("address flush dev wan")

    causes, _ = assert_mended(lab, doctor)

    assert causes[0].startswith("wan (outside) has no IPv4 address")


@pytest.mark.parametrize("setting", ["net.ipv4.ip_forward", "net.ipv4.conf.lan.forwarding"])
def test_no_forwarding(lab: Lab, doctor: Doctor, setting: str) -> None:
    lab.gateway.sysctl(setting, 0)

    causes, pasted = assert_mended(lab, doctor)

    assert len(causes) == len(pasted) == 1


@pytest.fixture
def second_line(lab: Lab) -> Iterator[None]:
    """Make a second line, by which packets leave; answers come in by the first."""
    lab.gateway.ip(f"link add wan2 type veth peer name wan2 netns {lab.router.namespace}")
    for host, address in ((lab.gateway, "198.51.101.2/24"), (lab.router, "198.51.101.1/24")):
        host.ip(f"address add {address} dev wan2")
        host.ip("link set wan2 up")
    lab.router.sysctl("net.ipv4.conf.wan2.rp_filter", 0)
    lab.gateway.sysctl("net.ipv4.conf.wan2.rp_filter", 0)
    lab.gateway.run(["ping", "-q", "-c", "1", "-i", "0.1", "-w", "20", "198.51.101.1"])
    lab.gateway.ip("route replace default via 198.51.101.1")
    yield
    lab.gateway.ip("route replace default via 198.51.100.1")
    lab.gateway.ip("link delete wan2")


@pytest.mark.usefixtures("second_line")
def test_rp_filter_where_answers_come_in_by_another_line(
    lab: Lab, masquerade: Callable[..., Daemon]
) -> None:
    address = ("--masquerade-address", "198.51.100.2")
    doctor = Doctor(lab, masquerade(*address, rules=("--outside", "wan2")))
    assert_passes(lab)
    assert (doctor.told(), doctor.status) == ([], 0)

    lab.gateway.sysctl("net.ipv4.conf.wan.rp_filter", 1)
    [cause], pasted = assert_mended(lab, doctor)

    assert cause.startswith("rp_filter drops answers that come in by wan")
    assert pasted == ["sysctl -w net/ipv4/conf/wan/rp_filter=2"]


@pytest.fixture
def dmz(lab: Lab) -> Iterator[None]:
    """Make an interface without an address, to which there is nobody."""
    lab.gateway.ip("link add dmz type veth peer name dmz-end")
    lab.gateway.ip("link set dmz-end up")
    lab.gateway.ip("link set dmz up")
    yield
    lab.gateway.ip("link delete dmz")


@pytest.mark.usefixtures("dmz")
@pytest.mark.parametrize(
    ("inside", "outside"), [("dmz", "wan"), ("lan", "dmz"), ("wan", "lan")], ids="-".join
)
def test_rules_for_the_wrong_interfaces(
    lab: Lab, doctor: Doctor, inside: str, outside: str
) -> None:
    lab.gateway.run([RULES, "up", "--inside", inside, "--outside", outside])
    assert not passes(lab)

    findings = doctor.look()
    assert doctor.status == 1
    # Without an address, dmz may be meant to get one; the command that loads rules tells better.
    doctor.paste([each for each in findings if str(RULES) in "".join(each.commands)][:1])

    assert_passes(lab)
    assert (doctor.told(), doctor.status) == ([], 0)


def test_rules_for_another_queue(lab: Lab, doctor: Doctor) -> None:
    lab.rules("up", "--queue", "5")

    [cause], [pasted] = assert_mended(lab, doctor)

    assert cause == "queue: the rules have 5, nfmasq has 0"
    assert pasted.startswith(f"{RULES} up ")


def test_rules_of_iptables_legacy_are_loaded_anew_by_it(lab: Lab, doctor: Doctor) -> None:
    lab.rules("down")
    lab.rules("up", "--queue", "5", "--iptables", "iptables-legacy")
    try:
        _, [pasted] = assert_mended(lab, doctor)
        assert "--iptables iptables-legacy" in pasted
        assert "NFMASQ" not in lab.gateway.run(["iptables-nft-save"]).stdout
    finally:
        lab.rules("down", IPTABLES="iptables-legacy")


def test_rules_that_are_gone(lab: Lab, doctor: Doctor) -> None:
    lab.rules("down")

    [cause], [pasted] = assert_mended(lab, doctor)

    assert cause == "the rules are not loaded: no packet reaches nfmasq"
    assert "--inside=lan --outside=wan" in pasted


def test_a_rule_that_lets_packets_pass_nfmasq_by(lab: Lab, doctor: Doctor) -> None:
    rule = ["FORWARD", "-o", "wan", "-j", "ACCEPT"]
    lab.gateway.run(["iptables", "-t", "security", "-I", *rule])
    try:
        assert not passes(lab)
        [told] = doctor.told()
        assert told.endswith("gets past nfmasq: inside addresses go out")
    finally:
        lab.gateway.run(["iptables", "-t", "security", "-D", *rule])


def test_doctor_changes_nothing(lab: Lab, doctor: Doctor) -> None:
    lab.gateway.run(["iptables", "-P", "FORWARD", "DROP"])
    looks = ("iptables-nft-save", "iptables-legacy-save", "ip link", "ip route show table all")

    def state() -> list[str]:
        shown = (lab.gateway.run(look.split()).stdout for look in looks)
        return [line for each in shown for line in each.splitlines() if line[:1] != "#"]

    before = state()
    with lab.capture(lab.router, "wan", "ip") as seen:
        doctor.look()

    assert state() == before
    assert seen == []


def test_ports_that_are_nearly_all_taken(lab: Lab, masquerade: Callable[..., Daemon]) -> None:
    doctor = Doctor(lab, masquerade(ports="61000-61009"))
    host, other = lab.inside

    def send(sender: Host, many: int) -> None:
        for _ in range(many):
            with sender.socket(AF_INET, SOCK_DGRAM) as client:
                client.sendto(b"question", (lab.outside[0].address, 9))

    send(host, 6)
    assert doctor.told() == []

    send(other, 3)
    assert doctor.told() == [
        "9 of 10 UDP masquerade ports of 198.51.100.2 are held, 6 of them by 10.77.0.11"
    ]
    assert doctor.status == 0
