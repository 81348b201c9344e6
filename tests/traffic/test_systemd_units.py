"""The lines of the systemd units in contrib/, run on a gateway as they stand there.

The folders of the machine are left alone: each line runs with mounts of its own, in which /opt has
an installation and /etc a configuration file.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from socket import AF_UNIX, SOCK_DGRAM

import pytest

from nfmasq.lab import Lab
from tests.traffic.observed import eventually

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "contrib" / "systemd"

USER = 61234
"""A user that is nobody else's, as systemd makes it."""

# ip netns exec gives each command a name space for mounts, which ends with it.
MOUNTS = """
mount -t overlay overlay -o "lowerdir=$0/etc:/etc" /etc
mount --bind "$0/opt" /opt
mount -t tmpfs none /run
mkdir /run/nfmasq
chown {user} /run/nfmasq
exec "$@"
"""


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    return ()


def line_of(unit: str, key: str) -> list[str]:
    """Return the words of a line of a unit; without variables, which the units leave empty."""
    [line] = re.findall(rf"^{key}=(.*)$", (UNITS / unit).read_text(), re.MULTILINE)
    return [word for word in line.split() if not word.startswith("$")]


@pytest.fixture
def root(lab: Lab, tmp_path: Path) -> Iterator[Path]:
    """Make an installation and a configuration file; no rule is left after the test."""
    program = tmp_path / "opt" / "nfmasq" / "bin" / "nfmasq"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m nfmasq "$@"\n')
    program.chmod(0o755)
    shutil.copy(ROOT / "iptables" / "nfmasq-rules", program.with_name("nfmasq-rules"))
    write(tmp_path, "reserve = true\n")
    yield tmp_path
    lab.rules("down")


def test_the_flow_cache_s_system_call_is_let_through() -> None:
    """bpf is one of the privileged calls, and a later line has the last word."""
    filters = re.findall(
        "^SystemCallFilter=(.*)$", (UNITS / "nfmasq.service").read_text(), re.MULTILINE
    )
    refused = next(line for line in filters if "@privileged" in line)
    assert filters.index("bpf") > filters.index(refused)


def write(root: Path, more: str) -> None:
    control = root / "control"
    file = root / "etc" / "nfmasq.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        f'inside = "lan"\noutside = ["wan", "ppp0"]\nmetrics = "off"\ncontrol = "{control}"\n{more}'
    )


def command(root: Path, line: list[str]) -> list[str | Path]:
    return ["sh", "-ec", MOUNTS.replace("{user}", str(USER)), root, *line]


def run(lab: Lab, root: Path, key: str) -> subprocess.CompletedProcess[str]:
    return lab.gateway.run(command(root, line_of("nfmasq-rules.service", key)))


def test_the_rules_come_change_and_go(lab: Lab, root: Path) -> None:
    """An interface that is not there yet is no reason to fail."""
    before = lab.gateway.run(["iptables-save"]).stdout
    assert run(lab, root, "ExecStart").stderr.startswith("nfmasq-rules: not there yet: ppp0 (")
    lab.rules("status", "--outside=ppp0", "--reserve")
    write(root, "queue = 7\n")
    run(lab, root, "ExecReload")
    lab.rules("status", "--outside=ppp0", "--queue=7")
    assert lab.gateway.sysctl("net.ipv4.ip_local_reserved_ports") == ""
    lab.rules("down")
    assert lab.gateway.run(["iptables-save"]).stdout == before


def test_a_restart_of_the_rules_unit_takes_no_rule_away() -> None:
    """Between its two halves inside addresses would leave."""
    assert "ExecStop" not in (UNITS / "nfmasq-rules.service").read_text()


def as_the_unit_s_user() -> list[str]:
    """Return the command by which another runs as a user with no more than the unit's powers."""
    names = line_of("nfmasq.service", "AmbientCapabilities")
    assert names == line_of("nfmasq.service", "CapabilityBoundingSet")
    kept = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in names)])
    user = [f"--reuid={USER}", "--regid=root", "--clear-groups", "--no-new-privs"]
    kinds = ("bounding-set", "inh-caps", "ambient-caps")
    return ["setpriv", *user, *(f"--{kind}={kept}" for kind in kinds)]


def test_run_serves_with_the_rules_of_the_file_as_a_user_of_its_own(lab: Lab, root: Path) -> None:
    for each in (*root.glob("opt/**"), *root.glob("etc/**"), root / "etc" / "nfmasq.toml"):
        each.chmod(0o755)
    trial = ["/opt/nfmasq/bin/nfmasq", "--version"]
    if lab.gateway.run(command(root, [*as_the_unit_s_user(), *trial]), check=False).returncode:
        pytest.skip("takes sources and a Python that every user may read")
    log = root / "log"
    manager = lab.gateway.socket(AF_UNIX, SOCK_DGRAM)
    with log.open("w") as written:
        manager.bind("\0manager")
        daemon = lab.gateway.popen(
            command(root, [*as_the_unit_s_user(), *line_of("nfmasq.service", "ExecStart")]),
            stdout=written,
            stderr=written,
            env={**os.environ, "NOTIFY_SOCKET": "@manager", "WATCHDOG_USEC": "200000"},
        )
    try:
        assert [manager.recv(99) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        assert "cannot be read" not in log.read_text()
        assert eventually(lambda: " ready " in log.read_text()), log.read_text()
        assert "the rules are loaded" in log.read_text()
        assert " flow-cache=routed" in log.read_text(), log.read_text()
        lab.inside[0].run(["ping", "-c", "1", "-W", "10", lab.outside[0].address])
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(30)
        manager.close()
    assert daemon.returncode == 0
    lab.rules("status", "--outside=ppp0", "--reserve")
