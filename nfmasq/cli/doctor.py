"""`nfmasq doctor`: what is missing or mismatched on this machine.

Each check yields findings: what is so, and where it is not well, what to do. A problem keeps
nfmasq from working or lets something go wrong; a warning may; a note is good to know. What
cannot be seen, for want of privilege say, is a note and not a problem.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import click

from nfmasq import config, rules_script
from nfmasq.cli import options
from nfmasq.daemon.control import request
from nfmasq.daemon.queue_table import queue_row
from nfmasq.errors import NfmasqError
from nfmasq.rules import Comparison, Rule, interfaces_of, parse_rules, ports_of, range_of

SYSCTLS = Path("/proc/sys/net")
NETWORK = Path("/sys/class/net")
CAP_NET_ADMIN = 1 << 12
CAP_NET_RAW = 1 << 13

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}

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


@dataclass(frozen=True)
class Finding:
    """What one check found; `level` is a key of STYLES, `advice` says what to do."""

    level: str
    what: str
    advice: str = ""


@click.command()
@options.control
@click.option(
    "--config",
    "path",
    metavar="FILE",
    type=click.Path(readable=False, path_type=Path),
    help="The configuration to check against where no nfmasq is running.  "
    f"[default: {config.DEFAULT_FILE} where there is one]",
)
@options.as_json
@click.pass_context
def doctor(context: click.Context, control: Path, path: Path | None, as_json: bool) -> None:
    """Say what is missing or wrong on this machine.

    Checks the machine against the configuration of the running nfmasq, or, where none is running,
    against the file's. Says what to do, changes nothing, and sees most as root. Exit status 1
    where there is a problem.
    """
    findings = list(examine(control, path))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            _print(finding)
    context.exit(int(any(finding.level == "problem" for finding in findings)))


def _print(finding: Finding) -> None:
    advice = f" -> {finding.advice}" if finding.advice else ""
    level = click.style(f"{finding.level:<8}", fg=STYLES[finding.level])
    click.echo(f"{level} {finding.what}{advice}")


def examine(control: Path, path: Path | None) -> Iterator[Finding]:
    """All findings, the first things first."""
    if platform.system() != "Linux":
        yield Finding("problem", f"this is {platform.system()}", "nfmasq run needs Linux")
        return
    yield Finding("ok", f"Linux {platform.release()}")
    yield from privilege()
    wanted, findings = _configuration(control, path)
    yield from findings
    running = findings[0].level == "ok"
    yield from queue(wanted["queue"], running)
    yield from forwarding()
    yield from local_ports(wanted["ports"])
    yield from routing()
    yield from socket_buffer(wanted["socket-buffer"])
    rules, findings = _loaded_rules()
    yield from findings
    if rules is not None:
        yield from our_rules(rules, wanted, running)
        yield from foreign_translations(rules)
        yield from overlapping_networks(rules)


def _configuration(control: Path, path: Path | None) -> tuple[Mapping[str, Any], list[Finding]]:
    """The configuration to check against; the first finding is ok where it is a running one."""
    try:
        [running] = request(control, "configuration")
        return running, [Finding("ok", f"nfmasq is running at {control}")]
    except NfmasqError as error:
        findings = [Finding("note", str(error))]
    try:
        return config.load(path or config.default_file(), {}).as_table(), findings
    except NfmasqError as error:
        findings.append(Finding("problem", str(error)))
    return config.Configuration().as_table(), findings


def privilege() -> Iterator[Finding]:
    """Root, or the two capabilities."""
    advice = "run nfmasq with sudo"
    if not _is_privileged():
        yield Finding("warning", "no CAP_NET_ADMIN: nfmasq run would fail", advice)
    elif not _has(CAP_NET_RAW):
        what = (
            "no CAP_NET_RAW: datagrams of more than 65,503 bytes would be lost, "
            "and nobody told of what is refused or ended"
        )
        yield Finding("warning", what, advice)
    else:
        yield Finding("ok", "CAP_NET_ADMIN and CAP_NET_RAW")


def _is_privileged() -> bool:
    return _has(CAP_NET_ADMIN)


def _has(capability: int) -> bool:
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    return match is not None and bool(int(match[1], 16) & capability)


def queue(number: int, running: bool) -> Iterator[Finding]:
    """The kernel's side of NFQUEUE, and who holds our queue."""
    holder = _holder(number)
    if running and holder is None:
        yield Finding(
            "problem",
            f"nfmasq runs, but queue {number} is not bound in this network namespace",
            "run doctor where nfmasq runs, or restart nfmasq",
        )
    elif running:
        yield Finding("ok", f"queue {number} is bound")
    elif holder is not None:
        yield Finding(
            "problem",
            f"queue {number} is bound by another program (netlink port {holder})",
            "stop it, or choose another --queue, for nfmasq and in the rules",
        )
    elif not _is_privileged():
        yield Finding("note", f"cannot try to bind queue {number} without CAP_NET_ADMIN")
    else:
        yield _try_to_bind(number)


def _holder(number: int) -> int | None:
    """Return the netlink port of the socket that has bound the queue."""
    row = queue_row(number)
    return row.port if row else None


def _try_to_bind(number: int) -> Finding:
    try:
        from netfilterqueue import NetfilterQueue
    except ImportError as error:
        return Finding("problem", f"NetfilterQueue: {error}", "pip install NetfilterQueue")
    trial = NetfilterQueue()
    try:
        trial.bind(number, lambda packet: packet.drop())
    except OSError as error:
        advice = "modprobe nfnetlink_queue, or a kernel with CONFIG_NETFILTER_NETLINK_QUEUE"
        return Finding("problem", f"queue {number} cannot be bound: {error}", advice)
    trial.unbind()
    return Finding("ok", f"queue {number} can be bound")


def forwarding() -> Iterator[Finding]:
    """Whether the kernel forwards at all."""
    if _sysctl("ipv4/ip_forward") == "1":
        yield Finding("ok", "net.ipv4.ip_forward is 1")
    else:
        yield Finding("problem", "net.ipv4.ip_forward is not 1", "sysctl -w net.ipv4.ip_forward=1")


def local_ports(ports: str) -> Iterator[Finding]:
    """Whether this machine's own connections may take ports of the masquerade range."""
    local = range_of((_sysctl("ipv4/ip_local_port_range") or "32768 60999").replace("\t", "-"))
    reserved = _sysctl("ipv4/ip_local_reserved_ports")
    if not (ports_of(ports) & {*local}) - ports_of(reserved or ""):
        yield Finding("ok", f"masquerade ports {ports} are apart from this machine's own ports")
    else:
        yield Finding(
            "problem",
            f"masquerade ports {ports} meet this machine's own, {local.start}-{local.stop - 1}",
            f"sysctl -w net.ipv4.ip_local_reserved_ports={ports}, or choose other --ports",
        )


def routing() -> Iterator[Finding]:
    """Settings that are right on most gateways, and puzzling on the others."""
    if _sysctl("ipv4/conf/all/rp_filter") == "1":
        yield Finding(
            "note",
            "net.ipv4.conf.all.rp_filter is 1 (strict)",
            "right with one way out; with several, answers may be dropped: set it to 2",
        )
    if _sysctl("bridge/bridge-nf-call-iptables") == "1" and any(NETWORK.glob("*/bridge")):
        yield Finding(
            "warning",
            "net.bridge.bridge-nf-call-iptables is 1: bridged packets meet the rules twice",
            "where a bridge is the inside interface and connections are tracked, the kernel then "
            "refuses to queue them: sysctl -w net.bridge.bridge-nf-call-iptables=0",
        )
    if _sysctl("ipv4/conf/all/send_redirects") == "1":
        yield Finding(
            "note",
            "net.ipv4.conf.all.send_redirects is 1",
            "where inside machines reach each other by the outside address, set it to 0: redirects "
            "are dropped, but hold back errors that the kernel would send",
        )


def socket_buffer(wanted: int) -> Iterator[Finding]:
    """Whether the kernel grants the receive buffer without force."""
    most = int(_sysctl("core/rmem_max") or wanted)
    if most < wanted:
        yield Finding(
            "note",
            f"net.core.rmem_max is {most}, less than the socket buffer of {wanted}",
            "with CAP_NET_ADMIN nfmasq gets it all the same",
        )


def _sysctl(name: str) -> str | None:
    try:
        return (SYSCTLS / name).read_text().strip()
    except OSError:
        return None


def _loaded_rules() -> tuple[list[Rule] | None, list[Finding]]:
    """The rules of iptables-nft and iptables-legacy together, or None where they cannot be seen."""
    names = ("iptables-save", "iptables-nft-save", "iptables-legacy-save")
    found = [path for path in map(shutil.which, names) if path]
    if not found:
        return None, [Finding("problem", "no iptables here", "apt install iptables")]
    if not _is_privileged():
        return None, [Finding("note", "the rules cannot be seen without CAP_NET_ADMIN")]
    # One program under several names answers to each; the name chooses nothing but the back end.
    programs = {os.path.realpath(path): path for path in reversed(found)}
    rules: list[Rule] = []
    for program in programs.values():
        done = subprocess.run([program], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            return None, [Finding("warning", f"{program} failed: {reason}")]
        rules += parse_rules(done.stdout)
    return rules, [Finding("ok", "iptables is here")]


def our_rules(rules: Iterable[Rule], wanted: Mapping[str, Any], running: bool) -> Iterator[Finding]:
    """Yield where the rules that nfmasq-rules loaded do not agree with the configuration."""
    ours = [rule for rule in rules if rule.our_chain]
    queueing = [rule for rule in ours if "NFQUEUE" in rule.values("-j")]
    options = rules_script.options_for(wanted)
    load = " ".join(("iptables/nfmasq-rules up", *options))
    if not queueing:
        yield Finding(
            "problem" if running else "note",
            "the rules are not loaded: no packet reaches nfmasq",
            f"{load} --inside IF --outside IF",
        )
        return
    anew = f"load them anew: {load}, with the same --inside and --outside"
    findings = [
        *_other_queue(queueing, wanted["queue"], anew),
        *_differences(ours, options, wanted["ports"], anew),
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
    ours: Sequence[Rule], options: Iterable[str], ports: str, anew: str
) -> Iterator[Finding]:
    """Yield where the rules differ from those that nfmasq-rules would load.

    The loaded rules tell the interfaces. So an interface that none of them names any more cannot
    be missed, and a side of which no interface is left is shown as INSIDE or OUTSIDE.
    """
    script = rules_script.find()
    if script is None:
        what = f"the rules cannot be compared: {rules_script.NOT_FOUND}"
        yield Finding("warning", what, "install nfmasq again")
        return
    inside, outside = interfaces_of(ours)
    inside, outside = inside or ["INSIDE"], outside or ["OUTSIDE"]
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
    """Other source translation, which would translate again what nfmasq has rewritten."""
    rules = list(rules)
    _, interfaces_outside = interfaces_of(rule for rule in rules if rule.our_chain)
    outside = {*interfaces_outside}
    for rule in rules:
        if rule.table != "nat" or not {"MASQUERADE", "SNAT"} & {*rule.values("-j")}:
            continue
        interfaces = {*rule.values("-o")} if "!" not in rule.words else set()
        if interfaces and outside and not interfaces & outside:
            continue
        sources = rule.values("-s")
        if sources and not interfaces & outside:
            yield Finding(
                "warning",
                f"another rule may translate, too: {rule}",
                f"remove it, if {sources[0]} is inside",
            )
        else:
            yield Finding("problem", f"another rule translates, too: {rule}", "remove it")


def overlapping_networks(rules: Iterable[Rule]) -> Iterator[Finding]:
    """Whether a network inside has numbers of one outside, as RFC 4787 REQ-7 warns of."""
    between = [rule for rule in rules if rule.chain == "NFMASQ-FORWARD"]
    inside, outside = (
        {name for rule in between for name in rule.values(option)} for option in ("-i", "-o")
    )
    networks = list(_networks())
    for name, network in networks:
        for other, another in networks:
            if name in inside and other in outside and network.overlaps(another):
                yield Finding(
                    "warning",
                    f"{network} on {name} (inside) and {another} on {other} (outside) overlap",
                    "number the inside differently: hosts of one side hide those of the other",
                )


def _networks() -> Iterator[tuple[str, IPv4Network]]:
    """The networks that this machine is in, by interface; none without iproute2."""
    try:
        shown = subprocess.run(["ip", "-json", "-4", "address"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return
    for interface in json.loads(shown.stdout):
        for address in interface["addr_info"]:
            written = f"{address['local']}/{address['prefixlen']}"
            yield interface["ifname"], IPv4Network(written, strict=False)
