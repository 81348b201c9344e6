"""Whether our iptables rules are loaded, and agree with the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from nfmasq import rules_script
from nfmasq.cli.doctor.finding import Finding, as_root
from nfmasq.cli.doctor.network import Loading, Sides, sides_of
from nfmasq.errors import NfmasqError
from nfmasq.rules import Comparison, Rule, ports_of

_ANEW = "load them anew"
_UNDEFRAGMENTED = "fragments are not put together, and are dropped"
_NO_HAIRPIN = "inside machines do not reach each other by the outside address"
_UNCACHED = "the flow cache cannot carry all that it could"
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


def loading(wanted: Mapping[str, Any], program: str) -> Loading:
    """Return what makes the command that loads the rules, as this machine has the script.

    `program` is the iptables that has loaded them before, or else would.
    """
    script = rules_script.find() or "nfmasq-rules"

    def load(sides: Sides) -> str:
        configured = {**wanted, "iptables": program}
        configured["inside"], configured["outside"] = sides
        return as_root(script, "up", *rules_script.arguments(configured))

    return load


def our_rules(
    rules: Iterable[Rule],
    wanted: Mapping[str, Any],
    running: bool,
    load: Loading,
    likely: Sides,
) -> Iterator[Finding]:
    """Yield where the rules that nfmasq-rules loaded do not agree with the configuration.

    `wanted` is the configuration as plain data (`Configuration.as_table`), `load` makes the command
    that loads the rules, and `likely` are the interfaces for it where no rules are loaded.
    """
    ours = [rule for rule in rules if rule.our_chain]
    queueing = [rule for rule in ours if "NFQUEUE" in rule.values("-j")]
    sides = sides_of(wanted, ours)
    if not queueing:
        yield _not_loaded(likely, load, running)
        return
    anew = load(sides.or_unknown())
    findings = [
        *_other_queue(queueing, wanted["queue"], anew),
        *_differences(ours, sides, wanted, anew),
        *_bypass(queueing, anew),
    ]
    if "--other-protocols" not in rules_script.options_for(wanted):
        findings += _other_protocols(queueing, anew)
    yield from findings or [Finding("ok", "the rules are loaded, and agree with nfmasq")]


def _not_loaded(sides: Sides, load: Loading, running: bool) -> Finding:
    level = "problem" if running else "note"
    what = "the rules are not loaded: no packet reaches nfmasq"
    advice = "load them, for the interfaces that are inside and outside"
    return Finding(level, what, advice, (load(sides.or_unknown()),))


def _other_queue(queueing: Iterable[Rule], number: int, anew: str) -> Iterator[Finding]:
    numbers = {int(loaded) for rule in queueing for loaded in rule.values("--queue-num")}
    if numbers != {number}:
        what = f"queue: the rules have {_listed(numbers)}, nfmasq has {number}"
        yield Finding("problem", what, _ANEW, (anew,))


def _differences(
    ours: Sequence[Rule], sides: Sides, wanted: Mapping[str, Any], anew: str
) -> Iterator[Finding]:
    """Yield where the loaded rules differ from the rules that nfmasq-rules would load.

    Where `sides` are taken from the loaded rules, an interface that no loaded rule names any more
    cannot be missed. A side without any interface is shown as INSIDE or OUTSIDE.
    """
    script = rules_script.find()
    if script is None:
        what = f"the rules cannot be compared: {rules_script.NOT_FOUND}"
        yield Finding("warning", what, "install nfmasq again")
        return
    inside, outside = sides.or_unknown()
    configured = wanted["inside"] and wanted["outside"]
    options = (rules_script.arguments if configured else rules_script.options_for)(wanted)
    try:
        printed = rules_script.print_rules(script, inside, outside, options)
    except NfmasqError as error:
        yield Finding("warning", f"the rules cannot be compared: {error}", _ANEW, (anew,))
        return
    ports = wanted["ports"]
    comparison = Comparison(ours, printed, ports_of(ports))
    yield from _other_ports(comparison.masquerade_ports(), ports, anew)
    yield from _lacking_forwards(comparison.lacking_forwards(), anew)
    yield from _missing(comparison.missing(), inside, anew)


def _other_ports(loaded: Set[frozenset[int]], ports: str, anew: str) -> Iterator[Finding]:
    if loaded - {ports_of(ports)}:
        have = _listed(map(_written_ports, loaded))
        yield Finding(
            "problem", f"ports: the rules have {have}, nfmasq has {ports}", _ANEW, (anew,)
        )


def _lacking_forwards(lacking: Iterable[Rule], anew: str) -> Iterator[Finding]:
    closed = {
        ":".join(word.replace(":", "-") for word in rule.values("-p", "--dport", "--sport"))
        for rule in lacking
    }
    if closed:
        what = f"not everybody reaches {_listed(closed)}: a rule is missing"
        yield Finding("problem", what, _ANEW, (anew,))


def _missing(missing: Sequence[Rule], inside: Iterable[str], anew: str) -> Iterator[Finding]:
    for consequence in (*_BROKEN_WITHOUT.values(), _NO_HAIRPIN, _UNCACHED, _NOT_WHOLE):
        rules = [str(rule) for rule in missing if _broken_without(rule, inside) == consequence]
        if rules:
            level = "warning" if consequence in (_UNDEFRAGMENTED, _UNCACHED) else "problem"
            what = f"{consequence}: missing is {', '.join(rules)}"
            yield Finding(level, what, _ANEW, (anew,))


def _broken_without(rule: Rule, inside: Iterable[str]) -> str:
    """Return what goes wrong without the rule."""
    if rule.is_for_flow_cache:
        return _UNCACHED
    interfaces = {*rule.values("-i", "-o")}
    if "NFMASQ-HAIRPIN" in rule.words or (interfaces and interfaces <= {*inside}):
        return _NO_HAIRPIN
    return _BROKEN_WITHOUT.get((rule.table, rule.our_chain), _NOT_WHOLE)


def _bypass(queueing: Iterable[Rule], anew: str) -> Iterator[Finding]:
    if any("--queue-bypass" in rule.words for rule in queueing):
        yield Finding(
            "problem",
            "a rule has --queue-bypass: without nfmasq, inside addresses go out",
            "load the rules as nfmasq-rules has them",
            (anew,),
        )


def _other_protocols(queueing: Iterable[Rule], anew: str) -> Iterator[Finding]:
    if any(rule.chain == "NFMASQ-OTHER" for rule in queueing):
        yield Finding(
            "warning",
            "the rules hand over other protocols, which nfmasq does not masquerade",
            f"nfmasq run --other-protocols by-address, or {_ANEW}",
            (anew,),
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
