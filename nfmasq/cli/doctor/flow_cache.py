"""The flow cache: whether this machine can have it, and what it means for the rules of others.

Where something is lacking, nfmasq works without it. So what is lacking is a note where the cache is
used if it can be had (auto), and a warning where it was asked for by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nfmasq.cli.doctor import machine
from nfmasq.cli.doctor.finding import Finding, as_root
from nfmasq.cli.doctor.network import Network, Sides
from nfmasq.cli.doctor.tables import Tables
from nfmasq.config.configuration import AUTO, DIRECT, OFF
from nfmasq.daemon.control import request
from nfmasq.errors import NfmasqError
from nfmasq.flowcache.attachment import can_serve
from nfmasq.flowcache.marks import KNOWN_MARK, reader_of_marks
from nfmasq.flowcache.programs import Programs
from nfmasq.rules import Rule, overlap

_CAPABILITIES = {"CAP_BPF": machine.CAP_BPF, "CAP_PERFMON": machine.CAP_PERFMON}
_INSTEAD = "where that matters, choose --flow-cache routed, with which they see every packet"
_LIBERAL = "netfilter/nf_conntrack_tcp_be_liberal"
_CHANGES_NOTHING = {"ACCEPT", "RETURN"}
_NEVER_KNOWN = {"SYN", "FIN", "RST"}
_SHOWN = 3


def flow_cache(
    wanted: str, tables: Tables | None, network: Network, sides: Sides
) -> Iterator[Finding]:
    """Yield what is in the way of the flow cache, and whose way it is in.

    `wanted` is the choice of --flow-cache.
    """
    if wanted == OFF:
        yield Finding("note", "the flow cache is off: each packet takes the way to the queue")
        return
    yield from _programs("note" if wanted == AUTO else "warning")
    yield from _left_out(network, sides, wanted)
    if tables is not None and wanted == DIRECT:
        yield from _passed_by(tables, sides)
        yield from _misled_by_gaps(tables)
    elif tables is not None:
        yield from _misled_by_the_mark(tables, wanted)


def mode_in_force(control: Path, wanted: str) -> Iterator[Finding]:
    """Yield how the running nfmasq has flows carried."""
    try:
        figures = [*request(control, "stats")]
    except NfmasqError as error:
        yield Finding("note", f"whether flows are carried in the kernel cannot be told: {error}")
        return
    for name, labels, value in figures:
        if name == "nfmasq_flow_cache" and value:
            mode = labels["mode"]
            if mode != OFF:
                yield Finding("ok", f"the kernel carries known flows: {mode}")
            elif wanted != OFF:
                what = f"--flow-cache is {wanted}, and the kernel carries no flows"
                yield Finding("note", what, 'the log of nfmasq says why ("flow cache off")')


def _programs(level: str) -> Iterator[Finding]:
    """Yield whether the kernel takes the programs, which are loaded, and gone again."""
    if not machine.is_privileged():
        yield Finding("note", "the flow cache cannot be tried without CAP_NET_ADMIN")
        return
    lacking = [name for name, bit in _CAPABILITIES.items() if not machine.has(bit)]
    if lacking and not machine.has(machine.CAP_SYS_ADMIN):
        what = f"no {' and no '.join(lacking)}: there is no flow cache"
        yield Finding(level, what, "run nfmasq with sudo, or give it these capabilities, too")
        return
    try:
        Programs(1).close()
    except OSError as error:
        yield _not_loaded(level, error)
    else:
        yield Finding("ok", "the kernel takes the programs of the flow cache")


def _not_loaded(level: str, error: OSError) -> Finding:
    if error.errno is not None:
        what = f"no flow cache: this kernel does not take its programs: {error.strerror}"
        advice = "take Linux 5.15 or later, or say --flow-cache off to have nfmasq not try"
        return Finding(level, what, advice)
    if "libbpf" in str(error):
        install = as_root("apt", "install", "libbpf1")
        return Finding(level, "no flow cache: there is no libbpf.so.1", "install it", (install,))
    return Finding(level, f"no flow cache: {error}", "say --flow-cache off to have nfmasq not try")


def _left_out(network: Network, sides: Sides, wanted: str) -> Iterator[Finding]:
    links = network.matching([*sides.inside, *sides.outside])
    names = [link.name for link in links if not can_serve(link.kind, wanted)]
    if names:
        advice = "nothing is wrong with that; they are as fast as without a flow cache"
        if wanted == DIRECT:
            advice = "--flow-cache routed serves tunnels and PPP, too"
        what = f"the flow cache cannot serve {', '.join(names)}: their packets go to the queue"
        yield Finding("note", what, advice)


def _misled_by_the_mark(tables: Tables, wanted: str) -> Iterator[Finding]:
    reader = reader_of_marks(tables.rules)
    if reader is None:
        return
    all_other_bits = 0xFFFF_FFFF ^ KNOWN_MARK
    advice = f"give it a mask without the bit {KNOWN_MARK:#x}, as VALUE/{all_other_bits:#x}"
    if wanted == AUTO:
        yield Finding("note", f"the flow cache stays off: {reader} compares whole marks", advice)
    else:
        what = f"{reader} compares whole marks, and takes known packets for others"
        yield Finding("warning", what, advice)


def _passed_by(tables: Tables, sides: Sides) -> Iterator[Finding]:
    """Yield what stands in FORWARD that packets of known flows would meet, if they went there."""
    rules = []
    for saved in tables.saved:
        harmless = _CHANGES_NOTHING.union(re.findall(r"^:(\S+)", saved.text, re.MULTILINE))
        for rule in _of_others_in_forward(saved.rules):
            # A rule without a target counts.
            does_something = harmless.isdisjoint(rule.values("-j", "-g"))
            if does_something and _would_meet_known_flows(rule, sides):
                rules.append(str(rule))
    if rules:
        more = f" and {len(rules) - _SHOWN} more" if len(rules) > _SHOWN else ""
        what = f"known flows pass by rules in FORWARD: {', '.join(rules[:_SHOWN])}{more}"
        yield Finding("warning", what, _INSTEAD)
    for table in tables.nft:
        for chain in table.forward_chains():
            what = f"known flows pass by chain {chain} of table {table}, which nft shows"
            yield Finding("note", what, _INSTEAD)


def _misled_by_gaps(tables: Tables) -> Iterator[Finding]:
    """Yield whether connection tracking is asked for connections of which it misses the middle."""
    if machine.sysctl(_LIBERAL) == "1":
        return
    forward = (rule for saved in tables.saved for rule in _of_others_in_forward(saved.rules))
    stateful = [str(rule) for rule in forward if _states(rule)]
    stateful += [str(table) for table in tables.nft if table.forward_chains() and table.is_stateful]
    if stateful:
        yield Finding(
            "warning",
            "connection tracking misses the middle of known flows and takes their end for INVALID; "
            f"it is asked by {stateful[0]}",
            "have it be liberal, for good in /etc/sysctl.d, or choose --flow-cache routed",
            (as_root("sysctl", "-w", f"net.{_LIBERAL.replace('/', '.')}=1"),),
        )


def _of_others_in_forward(rules: Sequence[Rule]) -> Iterator[Rule]:
    """Yield the rules of others in FORWARD, and in the chains that it leads to."""
    theirs: dict[tuple[str, str], list[Rule]] = {}
    for rule in rules:
        if not rule.our_chain:
            theirs.setdefault((rule.table, rule.chain), []).append(rule)
    for table in ("mangle", "filter", "security"):
        reached = ["FORWARD"]
        for chain in reached:
            for rule in theirs.get((table, chain), ()):
                yield rule
                reached += {*rule.values("-j", "-g")} - {*reached}


def _would_meet_known_flows(rule: Rule, sides: Sides) -> bool:
    """Say whether packets of known flows may match a rule; true where that is hard to say."""
    if "!" in rule.words:
        return True
    states, named = _states(rule), [*sides.inside, *sides.outside]
    return (
        {*rule.values("-p")} <= {"tcp", "udp", "all"}
        and (not states or "ESTABLISHED" in states)
        and _NEVER_KNOWN.isdisjoint(_flags_set(rule))
        and all(_is_among(name, named) for name in rule.values("-i", "-o"))
    )


def _states(rule: Rule) -> set[str]:
    """Return the states of connection tracking that a rule asks for."""
    return {state for value in rule.values("--ctstate", "--state") for state in value.split(",")}


def _flags_set(rule: Rule) -> set[str]:
    """Return the TCP flags that a packet must have to match a rule."""
    masks = [place for place, word in enumerate(rule.words) if word == "--tcp-flags"]
    return {flag for place in masks for flag in rule.words[place + 2].split(",")}


def _is_among(interface: str, names: Iterable[str]) -> bool:
    return any(overlap(interface, name) for name in names)
