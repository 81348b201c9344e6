"""The rules that lead packets to nfmasq, as iptables-save prints them, read and compared."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

_KNOWN_MARK = "0x10000000/0x10000000"
_QUEUE = "--queue-num"
_HOOKS = {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}


class Rule(NamedTuple):
    """A rule as iptables-save prints it."""

    table: str
    chain: str
    words: list[str]

    def values(self, *options: str) -> list[str]:
        """Return each word that follows one of the options."""
        pairs = zip(self.words, self.words[1:], strict=False)
        return [value for word, value in pairs if word in options]

    @property
    def our_chain(self) -> str | None:
        """Return the chain of nfmasq-rules that the rule stands in, or else jumps into, if any."""
        chains = (self.chain, *self.values("-j"))
        return next((chain for chain in chains if chain.startswith("NFMASQ")), None)

    @property
    def is_for_flow_cache(self) -> bool:
        """Whether the rule is about packets of flows that the flow cache knows."""
        return self.chain == "NFMASQ-KNOWN" or _KNOWN_MARK in self.values("--mark")

    @property
    def ports(self) -> frozenset[int]:
        """Return the ports that the rule matches; none where it matches them all.

        They are destination ports, or the source ports of what this machine itself sends.
        """
        return ports_of(",".join(self.values("--dport", "--sport")))

    @property
    def without_numbers(self) -> str:
        """Return the rule as text, less its ports, its queue and whether the queue is bypassed."""
        return re.sub(r"(--queue-num|--dport|--sport) \S+( --queue-bypass)?", r"\1", str(self))

    def __str__(self) -> str:
        return f"-t {self.table} {' '.join(self.words)}"


def parse_rules(saved: str) -> Iterator[Rule]:
    """Yield the rules in what iptables-save printed."""
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A "):
            words = shlex.split(line)
            yield Rule(table, words[1], words)


def save_programs() -> list[str]:
    """Return the programs that print the rules, of iptables-nft and of iptables-legacy."""
    places = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    names = ("iptables-save", "iptables-nft-save", "iptables-legacy-save")
    found = [path for name in names if (path := shutil.which(name, path=places))]
    # A name chooses nothing but the back end, and two names may lead to one program.
    return [*{os.path.realpath(path): path for path in reversed(found)}.values()]


def interfaces_of(ours: Iterable[Rule]) -> tuple[list[str], list[str]]:
    """Return the inside and the outside interfaces that the rules name."""
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


def ways_to_queue(rules: Sequence[Rule], queue: int) -> frozenset[tuple[str, str]]:
    """Return from where rules lead packets to a queue: tables, each with a chain of the kernel."""
    leading = {(rule.table, rule.chain) for rule in rules if str(queue) in rule.values(_QUEUE)}
    found: set[tuple[str, str]] = set()
    while leading - found:
        found |= leading
        leading = {
            (rule.table, rule.chain)
            for rule in rules
            if any((rule.table, chain) in found for chain in rule.values("-j", "-g"))
        }
    return frozenset(way for way in found if way[1] in _HOOKS)


def knows_flow_cache(ours: Iterable[Rule]) -> bool:
    """Say whether the rules let packets pass, both ways, of flows that the flow cache knows."""
    chains = {rule.chain for rule in ours if rule.is_for_flow_cache}
    return {"NFMASQ-KNOWN", "NFMASQ-PREROUTING", "NFMASQ-FORWARD"} <= chains


def is_interface(name: str) -> bool:
    """Say whether a rule may name this interface, or these: `ppp+` is all that begin with ppp."""
    written = re.fullmatch(r"(?!-|\.{1,2}\+?$)[A-Za-z0-9_.-]+\+?", name)
    return written is not None and len(name) <= 15


def overlap(name: str, other: str) -> bool:
    """Say whether rules with these names may match the same interface (`ppp+` and `ppp0` do)."""
    for one, another in ((name, other), (other, name)):
        if one.endswith("+") and another.startswith(one[:-1]):
            return True
    return name == other


def ports_of(text: str) -> frozenset[int]:
    """Return the ports of ranges with commas between; none of an empty text."""
    return frozenset(port for part in text.split(",") if part for port in range_of(part))


def range_of(text: str) -> range:
    """Return the ports of "LO-HI", "LO:HI", "LO HI" or a single number."""
    low, *high = re.split(r"[-:\s]+", text)
    return range(int(low), int(high[0] if high else low) + 1)


class Comparison:
    """Compares the loaded rules with the rules that there should be.

    Queues are not compared. Ports are compared apart from the rest of a rule, because a range of
    ports may be loaded in parts. `masquerade` are the masquerade ports of the configuration.
    """

    def __init__(
        self, loaded: Iterable[Rule], wanted: Sequence[Rule], masquerade: frozenset[int]
    ) -> None:
        self._loaded = _ports_by_text(loaded)
        self._wanted = wanted
        self._masquerade = masquerade

    def masquerade_ports(self) -> set[frozenset[int]]:
        """Return the loaded masquerade ports; as several sets where the rules do not agree."""
        return {
            self._loaded[text] - (ports - self._masquerade)
            for text, ports in _ports_by_text(self._wanted).items()
            if self._masquerade <= ports and text in self._loaded
        }

    def missing(self) -> list[Rule]:
        """Return the rules that are not loaded, except for rules for forwarded ports."""
        others = (rule for rule in self._wanted if not rule.ports - self._masquerade)
        return [rule for rule in others if rule.without_numbers not in self._loaded]

    def lacking_forwards(self) -> list[Rule]:
        """Return the rules for forwarded ports that are not loaded for all of these ports."""
        return [
            rule
            for rule in self._wanted
            if rule.ports - self._masquerade - self._loaded.get(rule.without_numbers, frozenset())
        ]


def _ports_by_text(rules: Iterable[Rule]) -> dict[str, frozenset[int]]:
    """Return the ports of all rules that differ in numbers alone, by the text that they share."""
    ports: dict[str, frozenset[int]] = {}
    for rule in rules:
        text = rule.without_numbers
        ports[text] = ports.get(text, frozenset()) | rule.ports
    return ports
