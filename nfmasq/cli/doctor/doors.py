"""The doors that the rules leave open unless they are told to close them.

None is a fault: a gateway may forward for others, and a firewall may close what the rules do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nfmasq.cli.doctor import machine
from nfmasq.cli.doctor.finding import Finding
from nfmasq.cli.doctor.network import Network, Sides, bystanders
from nfmasq.cli.doctor.tables import Tables
from nfmasq.rules import Rule


def open_doors(
    tables: Tables, ours: Sequence[Rule], network: Network, sides: Sides, wanted: Mapping[str, Any]
) -> Iterator[Finding]:
    """Yield by which ways packets pass without nfmasq; nothing where no rules are loaded."""
    if not ours:
        return
    others = [link.name for link in bystanders(network, sides)]
    if others and not any(_drops_what_is_not_inside(rule) for rule in ours):
        what = f"what comes by {', '.join(others)} leaves to the outside as it is"
        yield _note(what, "--only-inside")
    if not _is_firewall(tables) and not any(rule.chain == "NFMASQ-STRAIGHT" for rule in ours):
        what = "who is on the outside network itself may send to the addresses of inside hosts"
        yield _note(what, "--only-answers")
    if wanted["ipv6-forward"] and machine.sysctl("ipv6/conf/all/forwarding") == "1":
        yield _note("IPv6 is forwarded, and nfmasq does not masquerade it", "--no-ipv6-forward")


def _note(what: str, option: str) -> Finding:
    advice = f"where no firewall is to decide: {option}, of nfmasq run and nfmasq-rules"
    return Finding("note", what, advice)


def _drops_what_is_not_inside(rule: Rule) -> bool:
    is_last = rule.table == "security" and rule.chain == "NFMASQ-FORWARD"
    return is_last and "DROP" in rule.values("-j") and not rule.values("-i")


def _is_firewall(tables: Tables) -> bool:
    """Say whether a policy drops what is forwarded and no rule accepts."""
    by_iptables = any("\n:FORWARD DROP" in saved.text for saved in tables.saved)
    by_nft = any(re.search(r"hook forward .*policy drop", table.text) for table in tables.nft)
    return by_iptables or by_nft
