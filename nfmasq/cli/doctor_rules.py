"""What `nfmasq doctor` says of the iptables rules, and of the interfaces that they name."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from ipaddress import IPv4Network
from typing import Any

from nfmasq import rules_script
from nfmasq.cli.finding import Finding
from nfmasq.errors import NfmasqError
from nfmasq.rules import (
    Comparison,
    Rule,
    interfaces_of,
    overlap,
    parse_rules,
    ports_of,
    save_programs,
)

_UNDEFRAGMENTED = "fragments are not put together, and are dropped"
_NO_HAIRPIN = "inside machines do not reach each other by the outside address"
_NOT_WHOLE = "the rules are not whole"

_BROKEN_WITHOUT: dict[tuple[str, str | None], str] = {
    ("security", "NFMASQ-FORWARD"): "inside addresses go out",
    ("security", "NFMASQ-OUTPUT"): "inside addresses go out in what this machine itself sends",
    ("raw", "NFMASQ-PREROUTING"): "answers do not come in",
    ("raw", "NFMASQ-OTHER"): "answers in other protocols do not come in",
    ("raw", "NFMASQ-OUTPUT"): "errors about rewritten packets do not come in",
    ("raw", "NFMASQ-DEFRAG"): _UNDEFRAGMENTED,
}
"""What goes wrong where a rule of the chain, or the jump into the chain, is missing."""


def loaded_rules(privileged: bool) -> tuple[list[Rule] | None, list[Finding]]:
    """Return the rules of iptables-nft and iptables-legacy together, and findings.

    The rules are None where they cannot be seen.
    """
    programs = save_programs()
    if not programs:
        return None, [Finding("problem", "no iptables here", "apt install iptables")]
    if not privileged:
        return None, [Finding("note", "the rules cannot be seen without CAP_NET_ADMIN")]
    rules: list[Rule] = []
    for program in programs:
        done = subprocess.run([program], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            return None, [Finding("warning", f"{program} failed: {reason}")]
        rules += parse_rules(done.stdout)
    return rules, [Finding("ok", "iptables is here")]


def our_rules(rules: Iterable[Rule], wanted: Mapping[str, Any], running: bool) -> Iterator[Finding]:
    """Yield where the rules that nfmasq-rules loaded do not agree with the configuration.

    `wanted` is the configuration as plain data (`Configuration.as_table`).
    """
    ours = [rule for rule in rules if rule.our_chain]
    queueing = [rule for rule in ours if "NFQUEUE" in rule.values("-j")]
    options = rules_script.options_for(wanted)
    sides = wanted["inside"], wanted["outside"]
    if all(sides):
        options = rules_script.arguments(wanted)
    load = " ".join(("iptables/nfmasq-rules up", *options))
    if not queueing:
        yield Finding(
            "problem" if running else "note",
            "the rules are not loaded: no packet reaches nfmasq",
            load if all(sides) else f"{load} --inside IF --outside IF",
        )
        return
    anew = f"load them anew: {load}"
    if not all(sides):
        sides = interfaces_of(ours)
        anew += ", with the same --inside and --outside"
    findings = [
        *_other_queue(queueing, wanted["queue"], anew),
        *_differences(ours, sides, options, wanted["ports"], anew),
        *_bypass(queueing),
    ]
    if "--other-protocols" not in options:
        findings += _other_protocols(queueing, load)
    yield from findings or [Finding("ok", "the rules are loaded, and agree with nfmasq")]


def _other_queue(queueing: Iterable[Rule], number: int, anew: str) -> Iterator[Finding]:
    numbers = {int(loaded) for rule in queueing for loaded in rule.values("--queue-num")}
    if numbers != {number}:
        what = f"queue: the rules have {_listed(numbers)}, nfmasq has {number}"
        yield Finding("problem", what, anew)


def _differences(
    ours: Sequence[Rule],
    sides: tuple[Sequence[str], Sequence[str]],
    options: Iterable[str],
    ports: str,
    anew: str,
) -> Iterator[Finding]:
    """Yield where the loaded rules differ from the rules that nfmasq-rules would load.

    `sides` are the interfaces, inside and outside. Where they are taken from the loaded rules, an
    interface that no loaded rule names any more cannot be missed. A side without any interface is
    shown as INSIDE or OUTSIDE.
    """
    script = rules_script.find()
    if script is None:
        what = f"the rules cannot be compared: {rules_script.NOT_FOUND}"
        yield Finding("warning", what, "install nfmasq again")
        return
    inside, outside = sides[0] or ["INSIDE"], sides[1] or ["OUTSIDE"]
    try:
        printed = rules_script.print_rules(script, inside, outside, options)
    except NfmasqError as error:
        yield Finding("warning", f"the rules cannot be compared: {error}", anew)
        return
    comparison = Comparison(ours, printed, ports_of(ports))
    yield from _other_ports(comparison.masquerade_ports(), ports, anew)
    yield from _lacking_forwards(comparison.lacking_forwards(), anew)
    yield from _missing(comparison.missing(), inside, anew)


def _other_ports(loaded: Set[frozenset[int]], ports: str, anew: str) -> Iterator[Finding]:
    if loaded - {ports_of(ports)}:
        have = _listed(map(_written_ports, loaded))
        yield Finding("problem", f"ports: the rules have {have}, nfmasq has {ports}", anew)


def _lacking_forwards(lacking: Iterable[Rule], anew: str) -> Iterator[Finding]:
    closed = {
        ":".join(word.replace(":", "-") for word in rule.values("-p", "--dport"))
        for rule in lacking
    }
    if closed:
        what = f"not everybody reaches {_listed(closed)}: a rule is missing"
        yield Finding("problem", what, anew)


def _missing(missing: Sequence[Rule], inside: Iterable[str], anew: str) -> Iterator[Finding]:
    for consequence in (*_BROKEN_WITHOUT.values(), _NO_HAIRPIN, _NOT_WHOLE):
        rules = [str(rule) for rule in missing if _broken_without(rule, inside) == consequence]
        if rules:
            level = "warning" if consequence == _UNDEFRAGMENTED else "problem"
            yield Finding(level, f"{consequence}: missing is {', '.join(rules)}", anew)


def _broken_without(rule: Rule, inside: Iterable[str]) -> str:
    """Return what goes wrong without the rule."""
    interfaces = {*rule.values("-i", "-o")}
    if "NFMASQ-HAIRPIN" in rule.words or (interfaces and interfaces <= {*inside}):
        return _NO_HAIRPIN
    return _BROKEN_WITHOUT.get((rule.table, rule.our_chain), _NOT_WHOLE)


def _bypass(queueing: Iterable[Rule]) -> Iterator[Finding]:
    if any("--queue-bypass" in rule.words for rule in queueing):
        yield Finding(
            "problem",
            "a rule has --queue-bypass: without nfmasq, inside addresses go out",
            "load the rules with iptables/nfmasq-rules",
        )


def _other_protocols(queueing: Iterable[Rule], load: str) -> Iterator[Finding]:
    if any(rule.chain == "NFMASQ-OTHER" for rule in queueing):
        yield Finding(
            "warning",
            "the rules hand over other protocols, which nfmasq does not masquerade",
            f"nfmasq run --other-protocols by-address, or load them anew: {load}",
        )


def _listed(values: Iterable[object]) -> str:
    return " and ".join(map(str, sorted(values, key=str))) or "none"


def _written_ports(ports: Iterable[int]) -> str:
    """Return ports as "LO-HI[,LO-HI]...", or "none"."""
    ranges: list[list[int]] = []
    for port in sorted(ports):
        if ranges and ranges[-1][1] == port - 1:
            ranges[-1][1] = port
        else:
            ranges.append([port, port])
    return ",".join(f"{low}-{high}" for low, high in ranges) or "none"


def foreign_translations(rules: Iterable[Rule]) -> Iterator[Finding]:
    """Yield other rules for source translation, which would translate again what nfmasq rewrote."""
    rules = list(rules)
    _, interfaces_outside = interfaces_of(rule for rule in rules if rule.our_chain)
    outside = {*interfaces_outside}
    for rule in rules:
        if rule.table != "nat" or not {"MASQUERADE", "SNAT"} & {*rule.values("-j")}:
            continue
        interfaces = {*rule.values("-o")} if "!" not in rule.words else set()
        names_ours = any(_among(name, outside) for name in interfaces)
        if interfaces and outside and not names_ours:
            continue
        sources = rule.values("-s")
        if sources and not names_ours:
            yield Finding(
                "warning",
                f"another rule may translate, too: {rule}",
                f"remove it, if {sources[0]} is inside",
            )
        else:
            yield Finding("problem", f"another rule translates, too: {rule}", "remove it")


def overlapping_networks(rules: Iterable[Rule]) -> Iterator[Finding]:
    """Yield where an inside network and an outside network overlap (RFC 4787 REQ-7)."""
    between = [rule for rule in rules if rule.chain == "NFMASQ-FORWARD"]
    inside, outside = (
        {name for rule in between for name in rule.values(option)} for option in ("-i", "-o")
    )
    networks = list(_networks())
    for name, network in networks:
        for other, another in networks:
            sides = _among(name, inside) and _among(other, outside)
            if sides and network.overlaps(another):
                yield Finding(
                    "warning",
                    f"{network} on {name} (inside) and {another} on {other} (outside) overlap",
                    "number the inside differently: hosts of one side hide those of the other",
                )


def _among(interface: str, named: Iterable[str]) -> bool:
    return any(overlap(interface, name) for name in named)


def _networks() -> Iterator[tuple[str, IPv4Network]]:
    """Yield the networks that this machine is in, each after its interface's name.

    Without iproute2 there are none.
    """
    try:
        shown = subprocess.run(["ip", "-json", "-4", "address"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return
    for interface in json.loads(shown.stdout):
        for address in interface["addr_info"]:
            written = f"{address['local']}/{address['prefixlen']}"
            yield interface["ifname"], IPv4Network(written, strict=False)
