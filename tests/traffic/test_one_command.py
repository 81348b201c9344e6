"""`nfmasq run` that knows the interfaces: it loads the rules, watches them, and has them follow.

Nothing here depends on how packets come out of the queue, so superpackets make no difference.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from nfmasq.daemon.control import request
from nfmasq.daemon.queue_table import QUEUE_TABLE
from nfmasq.lab import Daemon, Lab
from tests.traffic.observed import eventually, figure

ROOT = Path(__file__).parents[2]
INSIDE = IPv4Network("10.77.0.0/24")
SIDES = ["--inside", "lan", "--outside", "wan"]
FORWARDING = "net.ipv4.ip_forward"

Start = Callable[..., Daemon]


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    return ()


@pytest.fixture(params=["iptables-nft", "iptables-legacy"])
def iptables(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def _no_rule_is_left(lab: Lab) -> Iterator[None]:
    """Remove the rules after each test, when no nfmasq loads them again any more."""
    yield
    for name in ("iptables-nft", "iptables-legacy"):
        lab.rules("down", IPTABLES=name)
    lab.gateway.sysctl(FORWARDING, 1)


def loaded(lab: Lab, *options: str) -> bool:
    """Say whether the rules are there, with these options."""
    return lab.rules("status", *options, check=False).returncode == 0


def saved(lab: Lab) -> str:
    """Return all rules of the gateway, without what changes by itself."""
    both = [lab.gateway.run([f"iptables-{kind}-save"]).stdout for kind in ("nft", "legacy")]
    return re.sub(r"^#.*\n| \[\d+:\d+\]", "", "".join(both), flags=re.MULTILINE)


def logged(daemon: Daemon, text: str) -> bool:
    return eventually(lambda: text in daemon.log.read_text())


def shown(daemon: Daemon, name: str) -> list[float]:
    """Return the values of a figure: none where there is no such figure."""
    return [value for metric, _, value in request(daemon.control, "stats") if metric == name]


def file_with(folder: Path, text: str) -> Path:
    file = folder / "nfmasq.toml"
    file.write_text('inside = "lan"\noutside = "wan"\n' + text)
    return file


def test_one_command_is_a_working_masquerade(lab: Lab, start: Start, iptables: str) -> None:
    outside = lab.outside[0].address
    lab.gateway.sysctl(FORWARDING, 0)
    with lab.capture(lab.router, "wan") as seen:
        daemon = start(*SIDES, "--forwarding", "on", "--iptables", iptables)
        lab.inside[0].run(["ping", "-c", "1", "-W", "10", outside])
    sources = {IPv4Address(packet.data[12:16]) for packet in seen}
    assert IPv4Address(lab.gateway.address) in sources
    assert not any(source in INSIDE for source in sources)
    assert "WARNING" not in daemon.log.read_text()
    assert daemon.stop() == 0
    assert loaded(lab, "--iptables", iptables), "the rules stay"
    assert lab.gateway.sysctl(FORWARDING) == "1"


def test_forwarding_that_is_off_is_told_and_left_alone(lab: Lab, start: Start) -> None:
    lab.gateway.sysctl(FORWARDING, 0)
    daemon = start(*SIDES)
    assert daemon.log.read_text().count("net.ipv4.ip_forward is 0: sysctl -w") == 1
    assert lab.gateway.sysctl(FORWARDING) == "0"


def test_the_rules_are_made_of_the_configuration(lab: Lab, start: Start, tmp_path: Path) -> None:
    options = """
        queue = 0
        ports = "50000-50009,61000-61009"
        clamp-mss = true
        reserve = true
        other-protocols = "by-address"
        masquerade-address = ["198.51.100.2", "192.0.2.7"]
        forward = "tcp:8080=10.77.0.11:80"
    """
    start("--config", str(file_with(tmp_path, options)))
    written_out = [
        *("--ports=50000-50009,61000-61009", "--clamp-mss", "--reserve", "--other-protocols"),
        *("--masquerade-address=198.51.100.2", "--masquerade-address=192.0.2.7"),
        "--forward=tcp:8080",
    ]
    by_run = saved(lab)
    lab.rules("up", *written_out)
    assert saved(lab) == by_run
    assert lab.gateway.sysctl("net.ipv4.ip_local_reserved_ports") == "50000-50009,61000-61009"


def test_rules_that_somebody_removes_are_loaded_again(
    lab: Lab, start: Start, iptables: str
) -> None:
    daemon = start(*SIDES, "--iptables", iptables)
    assert figure(daemon, "nfmasq_rules_present") == 1
    for spoil in ("-t raw -D PREROUTING -j NFMASQ-PREROUTING", "-t security -F NFMASQ-FORWARD"):
        lab.gateway.run([iptables, *spoil.split()])
    assert eventually(lambda: loaded(lab, "--iptables", iptables))
    assert logged(daemon, "rules were gone: loading them again")


def test_a_change_that_is_announced_is_seen_at_once(lab: Lab, start: Start) -> None:
    """The time between two looks is five seconds; what nftables changes is announced."""
    start(*SIDES, "--iptables", "iptables-nft")
    waited = []
    for _ in range(3):
        lab.gateway.run(["iptables-nft", "-t", "security", "-F", "NFMASQ-FORWARD"])
        began = time.monotonic()
        assert eventually(lambda: loaded(lab, "--iptables", "iptables-nft"))
        waited.append(time.monotonic() - began)
    assert min(waited) < 2.5


def test_rules_that_cannot_be_loaded_again_are_told_of(lab: Lab, start: Start) -> None:
    """Somebody else uses a chain of ours that would go."""
    daemon = start(*SIDES, "--iptables", "iptables-nft")
    security = ["iptables-nft", "-t", "security"]
    lab.gateway.run([*security, "-N", "NFMASQ-OLD"])
    lab.gateway.run([*security, "-A", "OUTPUT", "-g", "NFMASQ-OLD"])
    lab.gateway.run([*security, "-F", "NFMASQ-FORWARD"])
    assert logged(daemon, "the rules cannot be loaded: up failed, nothing was changed")
    assert logged(daemon, "the rules for queue 0 are gone")
    assert figure(daemon, "nfmasq_rules_present") == 0
    lab.gateway.run([*security, "-D", "OUTPUT", "-g", "NFMASQ-OLD"])
    assert logged(daemon, "the rules for queue 0 are there")
    assert loaded(lab, "--iptables", "iptables-nft")


def test_kept_rules_are_told_of_once_when_they_come_and_when_they_go(
    lab: Lab, start: Start
) -> None:
    daemon = start()
    assert logged(daemon, "no rules lead to queue 0 yet")
    assert figure(daemon, "nfmasq_rules_present") == 0
    lab.rules("up")
    assert logged(daemon, "the rules for queue 0 are there")
    assert figure(daemon, "nfmasq_rules_present") == 1
    lab.rules("down")
    assert logged(daemon, "the rules for queue 0 are gone")
    assert figure(daemon, "nfmasq_rules_present") == 0
    assert not loaded(lab)
    assert len(re.findall("rules", daemon.log.read_text())) == 3


def test_rules_for_another_queue_are_not_taken_for_ours(lab: Lab, start: Start) -> None:
    lab.rules("up", "--queue", "10")
    assert logged(start("--queue", "1"), "no rules lead to queue 1 yet")


def test_with_rules_before_it_nothing_is_said(lab: Lab, start: Start) -> None:
    lab.rules("up")
    daemon = start()
    assert eventually(lambda: shown(daemon, "nfmasq_rules_present") == [1])
    assert "rules" not in daemon.log.read_text()


def test_kept_rules_for_known_interfaces_have_to_be_there(
    lab: Lab, start: Start, tmp_path: Path
) -> None:
    keep = [*SIDES, "--rules", "keep"]
    assert "the rules are not loaded, or not all of them" in complaint(lab, tmp_path, *keep)
    lab.rules("up", "--ports", "50000-50009")
    assert "--rules load loads them" in complaint(lab, tmp_path, *keep)
    assert "50000" in saved(lab)

    lab.rules("up")
    daemon = start(*keep)
    lab.rules("down")
    assert logged(daemon, "the rules for queue 0 are gone")
    assert not loaded(lab)


def test_without_rules_where_that_is_asked_for(lab: Lab, start: Start) -> None:
    daemon = start(*SIDES, "--rules", "off")
    assert not loaded(lab)
    assert "rules" not in daemon.log.read_text()
    assert shown(daemon, "nfmasq_rules_present") == []


def test_the_rules_follow_a_reload(lab: Lab, start: Start, tmp_path: Path) -> None:
    file = file_with(tmp_path, 'ports = "61000-61009"\n')
    daemon = start("--config", str(file))
    file_with(tmp_path, 'ports = "50000-50009"\nforward = "tcp:8080=10.77.0.11:80"\n')
    daemon.ask("reload")
    assert loaded(lab, "--ports=50000-50009", "--forward=tcp:8080")
    assert "61000" not in saved(lab)
    file.write_text('inside = "lan"\noutside = ["wan", "ppp+"]\n')
    daemon.ask("reload")
    assert loaded(lab, "--outside=ppp+")
    assert "8080" not in saved(lab)


def test_a_reload_whose_rules_cannot_be_loaded_changes_nothing(
    lab: Lab, start: Start, tmp_path: Path
) -> None:
    file = file_with(tmp_path, "")
    daemon = start("--config", str(file), "--iptables", "iptables-nft")
    # Somebody else's jump keeps a chain that would go.
    file_with(tmp_path, 'other-protocols = "by-address"\n')
    daemon.ask("reload")
    foreign = ["-t", "raw", "-A", "OUTPUT", "-g", "NFMASQ-OTHER"]
    lab.gateway.run(["iptables-nft", *foreign])
    before = saved(lab)
    file_with(tmp_path, "")
    line = [sys.executable, "-m", "nfmasq", "reload", "--control", str(daemon.control)]
    done = lab.gateway.run(line, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert "the rules cannot be loaded: up failed, nothing was changed" in done.stderr
    assert saved(lab) == before
    lab.gateway.run(["iptables-nft", *["-D" if word == "-A" else word for word in foreign]])
    assert "other-protocols" in daemon.ask("reload")


# ---- what people do wrong -----------------------------------------------------------------------


def complaint(
    lab: Lab, folder: Path, *options: str, shell: str = "", module: str = "", **environment: str
) -> str:
    """Return the one line that `nfmasq run` writes when it does not start, and changes nothing.

    `shell` is run before it, in the same shell; `module` is Python that is run before it.
    """
    before = saved(lab), lab.gateway.sysctl(FORWARDING)
    program = f"{module}\nfrom nfmasq.cli import main\nmain()"
    control = folder / "control"
    usual = ["--config", "/dev/null", "--control", str(control), "--metrics", "off"]
    run = [sys.executable, "-c", program, "run", *usual, *options]
    variables = [f"{name}={value}" for name, value in environment.items()]
    command = ["env", *variables, "sh", "-ec", f'{shell}\nexec "$@"', "sh", *run]
    done: subprocess.CompletedProcess[str] = lab.gateway.run(command, cwd=ROOT, check=False)
    assert done.returncode in (1, 2), done
    assert (done.stdout, done.stderr.count("nfmasq: ")) == ("", 1), done.stderr
    assert done.stderr.count("\n") == 1
    assert not control.exists()
    assert lab.gateway.call(QUEUE_TABLE.read_text) == ""
    assert (saved(lab), lab.gateway.sysctl(FORWARDING)) == before
    return done.stderr


def test_a_script_that_is_not_there(lab: Lab, tmp_path: Path) -> None:
    gone = "from nfmasq import rules_script; rules_script.find = lambda: None"
    told = complaint(lab, tmp_path, *SIDES, module=gone)
    assert "the script nfmasq-rules is neither" in told
    assert "install nfmasq again" in told


def test_an_iptables_that_is_not_there(lab: Lab, tmp_path: Path) -> None:
    told = complaint(lab, tmp_path, *SIDES, IPTABLES="noiptables")
    assert told == (
        "nfmasq: the rules cannot be loaded: noiptables-save: not found, install iptables\n"
    )


def test_forwarding_that_cannot_be_switched_on(lab: Lab, tmp_path: Path) -> None:
    read_only = "mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys"
    lab.gateway.sysctl(FORWARDING, 0)
    told = complaint(lab, tmp_path, *SIDES, "--forwarding=on", shell=read_only)
    lab.gateway.sysctl(FORWARDING, 1)
    assert "forwarding cannot be switched on here" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--inside lan", "inside is given without outside: the rules need both"),
        ("--outside wan", "outside is given without inside: the rules need both"),
        ("--inside lan --inside lan --outside wan", "--inside has lan twice"),
        ("--inside lan --outside lan", "inside lan and outside lan overlap"),
        ("--inside ppp+ --outside ppp0", "inside ppp+ and outside ppp0 overlap"),
        ("--rules load", "rules load needs to know for which interfaces"),
        ("--inside lan/7 --outside wan", "--inside must be the name of an interface"),
        ("--inside + --outside wan", "--inside must be the name of an interface"),
    ],
)
def test_interfaces_that_make_no_sense(lab: Lab, tmp_path: Path, options: str, told: str) -> None:
    assert told in complaint(lab, tmp_path, *options.split())
