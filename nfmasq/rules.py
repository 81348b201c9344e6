"""The rules that lead packets to nfmasq: those that are loaded, and those that there should be.

Loaded rules are as iptables-save prints them. Which there should be follows from a configuration,
as plain data (`Configuration.as_table`, here `wanted`), and from the interfaces: it is what
nfmasq-rules loads for it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from nfmasq.daemon.netfilter import HAIRPIN_MARK
from nfmasq.engine.wire.by_address import BY_ADDRESS

_BROKEN_WITHOUT = {
    "-t security -A NFMASQ-FORWARD": "inside addresses go out",
    "-t security -A NFMASQ-OUTPUT": "inside addresses go out in what this machine itself sends",
    "-t raw -A NFMASQ-PREROUTING": "answers do not come in",
    "-t raw -A NFMASQ-OTHER": "answers in other protocols do not come in",
    "-t raw -A NFMASQ-OUTPUT": "errors about rewritten packets do not come in",
}
"""What goes wrong where a rule of the chain, or the jump into it, is missing."""

OTHER = "NFMASQ-OTHER"

_NO_HAIRPIN = "inside machines do not reach each other by the outside address"
"""The same of the rules that are for that only."""

_ICMP_ERRORS_MATCHED = [f"-p icmp -m icmp --icmp-type {kind}" for kind in (3, 4, 11, 12)]


class Rule(NamedTuple):
    """One rule as iptables-save prints it."""

    table: str
    chain: str
    words: list[str]

    def values(self, *options: str) -> list[str]:
        """What follows any of the options."""
        pairs = zip(self.words, self.words[1:], strict=False)
        return [value for word, value in pairs if word in options]

    @property
    def is_ours(self) -> bool:
        return self.chain.startswith("NFMASQ")

    def __str__(self) -> str:
        return f"-t {self.table} {' '.join(self.words)}"


def parse_rules(saved: str) -> Iterator[Rule]:
    """The rules in what iptables-save printed."""
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A "):
            words = shlex.split(line)
            yield Rule(table, words[1], words)


def interfaces_of(ours: Iterable[Rule]) -> tuple[list[str], list[str]]:
    """The inside and the outside interfaces that the rules name."""
    inside: set[str] = set()
    outside: set[str] = set()
    for rule in ours:
        targets = rule.values("-j")
        if "NFMASQ-HAIRPIN" in targets:
            inside.update(rule.values("-i", "-o"))
        elif "NFQUEUE" in targets:
            from_inside = rule.chain == "NFMASQ-FORWARD"
            (inside if from_inside else outside).update(rule.values("-i"))
            outside.update(rule.values("-o"))
    return sorted(inside - {"lo"}), sorted(outside - {"lo"})


# ---- ports --------------------------------------------------------------------------------------


def ports_of(text: str) -> frozenset[int]:
    """Ports from ranges with commas between, or none."""
    return frozenset(port for part in text.split(",") if part for port in range_of(part))


def range_of(text: str) -> range:
    """Ports from "LO-HI", "LO:HI", "LO HI" or a single one."""
    low, *high = re.split(r"[-:\s]+", text)
    return range(int(low), int(high[0] if high else low) + 1)


def forwarded(wanted: Mapping[str, Any]) -> dict[str, frozenset[int]]:
    """What the rules have beside the masquerade ports: tcp:8080 and the like, and which ports."""
    written = [forward["listen"] for forward in wanted["forward"]]
    written += [trigger["opens"] for trigger in wanted["trigger"]]
    # An address in the middle is none of the rules' business.
    parts = [text.split(":") for text in written]
    return {f"{protocol}:{ports}": ports_of(ports) for protocol, *_, ports in parts}


def _queued(ours: Iterable[Rule]) -> dict[tuple[str, str], frozenset[int]]:
    """The ports to which packets are queued, by interface and protocol."""
    queued: dict[tuple[str, str], frozenset[int]] = {}
    for rule in ours:
        if given := rule.values("--dport", "--dports"):
            what = listed(rule.values("-i")), listed(rule.values("-p"))
            queued[what] = queued.get(what, frozenset()) | ports_of(given[0])
    return queued


def masquerade_ports_of(ours: Iterable[Rule], wanted: Mapping[str, Any]) -> set[frozenset[int]]:
    """The masquerade ports in the rules; where they are not the same in all of them, each."""
    masquerade_ports = ports_of(wanted["ports"])
    found = set()
    for (_, protocol), ports in _queued(ours).items():
        beside = _of_protocol(protocol, wanted) - masquerade_ports
        found.add(ports - beside)
    return found


def _of_protocol(protocol: str, wanted: Mapping[str, Any]) -> frozenset[int]:
    """The forwarded ports of a protocol."""
    led_inside = forwarded(wanted).items()
    return frozenset().union(
        *(ports for text, ports in led_inside if text.split(":")[0] == protocol)
    )


def lacking_ports(ours: Iterable[Rule], wanted: Mapping[str, Any]) -> list[str]:
    """The forwarded ports that the rules of some interface lack."""
    queued = _queued(ours)
    interfaces = {interface for interface, _ in queued}
    return [
        text
        for text, ports in forwarded(wanted).items()
        if any(ports - queued.get((name, text.split(":")[0]), frozenset()) for name in interfaces)
    ]


def written_ports(ports: Iterable[int]) -> str:
    """Ports as "LO-HI[,LO-HI]..."."""
    ranges: list[list[int]] = []
    for port in sorted(ports):
        if ranges and ranges[-1][1] == port - 1:
            ranges[-1][1] = port
        else:
            ranges.append([port, port])
    return ",".join(f"{low}-{high}" for low, high in ranges)


# ---- what there should be -----------------------------------------------------------------------


def lacking_rules(
    ours: Iterable[Rule], rules: Iterable[Rule], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, list[str]]]:
    """What goes wrong, and the rules that are missing for it not to.

    The rules that are there tell the interfaces. So an interface that none of them names any more
    cannot be missed, and one side of which none is left is shown as INSIDE or OUTSIDE.
    """
    inside, outside = interfaces_of(ours)
    loaded = {_shape(str(rule)) for rule in rules}
    missing: dict[str, list[str]] = {what: [] for what in (*_BROKEN_WITHOUT.values(), _NO_HAIRPIN)}
    for consequence, rule in _complete(inside or ["INSIDE"], outside or ["OUTSIDE"], wanted):
        if _shape(rule) not in loaded:
            missing[consequence].append(rule)
    yield from ((what, rules) for what, rules in missing.items() if rules)


def _complete(
    inside: Iterable[str], outside: Iterable[str], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """What goes wrong without it, and each rule that nfmasq-rules loads, in iptables-save's words.

    Less what turns on defragmentation.
    """
    for chain, consequence in _BROKEN_WITHOUT.items():
        table, name = chain.split(" -A NFMASQ-")
        if f"NFMASQ-{name}" != OTHER:
            yield consequence, f"{table} -A {name} -j NFMASQ-{name}"
    for rule in _for_the_outside(inside, outside, wanted):
        chain = " ".join(rule.split()[:4])
        yield _BROKEN_WITHOUT[chain], rule
    for rule in _for_hairpins(inside, wanted):
        yield _NO_HAIRPIN, rule


def _for_the_outside(
    inside: Iterable[str], outside: Iterable[str], wanted: Mapping[str, Any]
) -> Iterator[str]:
    to_queue = f"-j NFQUEUE --queue-num {wanted['queue']}"
    if takes_other_protocols(wanted):
        for match in ("-p tcp", "-p udp", "-d 224.0.0.0/4"):
            yield f"-t raw -A {OTHER} {match} -j RETURN"
        yield f"-t raw -A {OTHER} {to_queue}"
    for interface in outside:
        for other in inside:
            yield f"-t security -A NFMASQ-FORWARD -i {other} -o {interface} {to_queue}"
        for match in _ports_matched(wanted):
            yield f"-t raw -A NFMASQ-PREROUTING -i {interface} {match} {to_queue}"
        yield f"-t raw -A NFMASQ-PREROUTING -i {interface} -p icmp {to_queue}"
        if takes_other_protocols(wanted):
            yield f"-t raw -A NFMASQ-PREROUTING -i {interface} -j {OTHER}"
        unlike_ours = "-p tcp -m addrtype ! --src-type LOCAL -j DROP"
        yield f"-t security -A NFMASQ-OUTPUT -o {interface} {unlike_ours}"
    for table, interface in (("raw", "lo"), *(("security", name) for name in outside)):
        for match in _ICMP_ERRORS_MATCHED:
            yield f"-t {table} -A NFMASQ-OUTPUT -o {interface} {match} {to_queue}"


def _for_hairpins(inside: Iterable[str], wanted: Mapping[str, Any]) -> Iterator[str]:
    to_queue = f"-j NFQUEUE --queue-num {wanted['queue']}"
    mark = f"{HAIRPIN_MARK:#x}/{HAIRPIN_MARK:#x}"
    to_us = "-m addrtype --dst-type LOCAL -j NFMASQ-HAIRPIN"
    for table in ("raw", "security"):
        yield f"-t {table} -A NFMASQ-HAIRPIN -j MARK --set-xmark {mark}"
        yield f"-t {table} -A NFMASQ-HAIRPIN {to_queue}"
    for interface in inside:
        for match in (*_ports_matched(wanted), *_ICMP_ERRORS_MATCHED):
            yield f"-t raw -A NFMASQ-PREROUTING -i {interface} {match} {to_us}"
        yield f"-t security -A NFMASQ-FORWARD -i {interface} -m mark --mark {mark} {to_queue}"
        redirect = "-p icmp -m icmp --icmp-type 5 -j DROP"
        yield f"-t security -A NFMASQ-OUTPUT -o {interface} {redirect}"
    for interface in (*inside, "lo"):
        for match in _ICMP_ERRORS_MATCHED:
            yield f"-t security -A NFMASQ-OUTPUT -o {interface} {match} -j NFMASQ-HAIRPIN"


def _ports_matched(wanted: Mapping[str, Any]) -> Iterator[str]:
    for protocol in ("tcp", "udp"):
        for ports in wanted["ports"].replace("-", ":").split(","):
            yield f"-p {protocol} -m {protocol} --dport {ports}"


def _shape(rule: str) -> str:
    """The rule, whatever its queue and ports: they are compared by themselves."""
    return re.sub(r"(--queue-num|--dport) \S+( --queue-bypass)?", r"\1", rule)


def takes_other_protocols(wanted: Mapping[str, Any]) -> bool:
    """By address, or the calls of PPTP."""
    return bool(wanted["other-protocols"] == BY_ADDRESS or wanted["apps"].get("pptp"))


def listed(values: Iterable[object]) -> str:
    return " and ".join(map(str, sorted(values, key=str))) or "none"
