"""A machine for doctor: rules as nfmasq-rules loads them, and interfaces."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

from nfmasq import config
from nfmasq.cli.doctor.finding import Finding
from nfmasq.cli.doctor.network import Link

WANTED: dict[str, Any] = config.Configuration().as_table()

RULES = Path(__file__).parents[3] / "iptables" / "nfmasq-rules"


def nfmasq_rules(*more: str, script: Path = RULES) -> str:
    """What nfmasq-rules loads, as iptables-save shows it then."""
    command = [str(script), "print", "--inside", "lan", "--outside", "wan", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.sub(r"^-I (\S+) 1 ", r"-A \1 ", done.stdout, flags=re.MULTILINE)


OURS = nfmasq_rules()


def levels(findings: Iterable[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def link(name: str, *addresses: str, neighbours: tuple[str, ...] = (), **state: Any) -> Link:
    held = [IPv4Interface(address) for address in addresses]
    return Link(
        index=len(name),
        name=name,
        own=[each.ip for each in held],
        networks=[each.network for each in held],
        neighbours=[IPv4Address(address) for address in neighbours],
        **{"is_up": True, "has_carrier": True} | state,
    )
