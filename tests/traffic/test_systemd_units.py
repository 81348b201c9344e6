"""The lines of the systemd units in contrib/, run on a gateway as they stand there.

The folders of the machine are left alone: each line runs with mounts of its own, in which /opt has
an installation and /etc a configuration file.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfmasq.lab import Lab
from tests.traffic.observed import eventually

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "contrib" / "systemd"

# ip netns exec gives each command a name space for mounts, which ends with it.
MOUNTS = """
mount -t overlay overlay -o "lowerdir=$0/etc:/etc" /etc
mount --bind "$0/opt" /opt
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
    assert filters.index("bpf") > filters.index("~@privileged")


def write(root: Path, more: str) -> None:
    control = root / "control"
    file = root / "etc" / "nfmasq.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        f'inside = "lan"\noutside = ["wan", "ppp0"]\nmetrics = "off"\ncontrol = "{control}"\n{more}'
    )


def command(root: Path, line: list[str]) -> list[str | Path]:
    return ["sh", "-ec", MOUNTS, root, *line]


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
    run(lab, root, "ExecStop")
    assert lab.gateway.run(["iptables-save"]).stdout == before


def test_run_serves_with_the_rules_of_the_file(lab: Lab, root: Path) -> None:
    capabilities = line_of("nfmasq.service", "CapabilityBoundingSet")
    kept = ["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in capabilities)]
    bounded = ["setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set={','.join(kept)}"]
    log = root / "log"
    with log.open("w") as written:
        daemon = lab.gateway.popen(
            command(root, [*bounded, *line_of("nfmasq.service", "ExecStart")]),
            stdout=written,
            stderr=written,
        )
    try:
        assert eventually(lambda: " ready " in log.read_text()), log.read_text()
        assert "the rules are loaded" in log.read_text()
        assert " flow-cache=routed" in log.read_text(), log.read_text()
        lab.inside[0].run(["ping", "-c", "1", "-W", "10", lab.outside[0].address])
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(30)
    assert daemon.returncode == 0
    lab.rules("status", "--outside=ppp0", "--reserve")
    run(lab, root, "ExecStop")
