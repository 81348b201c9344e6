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
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, NamedTuple

import click

from nfmasq import config
from nfmasq.cli import options
from nfmasq.daemon.control import request
from nfmasq.engine.by_address import BY_ADDRESS
from nfmasq.errors import NfmasqError

SYSCTLS = Path("/proc/sys/net")
NETWORK = Path("/sys/class/net")
QUEUES = Path("/proc/net/netfilter/nfnetlink_queue")
CAP_NET_ADMIN = 1 << 12
CAP_NET_RAW = 1 << 13

BROKEN_WITHOUT = {
    "-t security -A NFMASQ-FORWARD": "inside addresses go out",
    "-t security -A NFMASQ-OUTPUT": "inside addresses go out in what this machine itself sends",
    "-t raw -A NFMASQ-PREROUTING": "answers do not come in",
    "-t raw -A NFMASQ-OTHER": "answers in other protocols do not come in",
    "-t raw -A NFMASQ-OUTPUT": "errors about rewritten packets do not come in",
}
"""What goes wrong where a rule of the chain, or the jump into it, is missing."""

OTHER = "NFMASQ-OTHER"

NO_HAIRPIN = "inside machines do not reach each other by the outside address"
"""The same of the rules that are for that only."""

ICMP_ERRORS_MATCHED = [f"-p icmp -m icmp --icmp-type {kind}" for kind in (3, 4, 11, 12)]

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Finding:
    """What one check found; `level` is a key of STYLES, `advice` says what to do."""

    level: str
    what: str
    advice: str = ""


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
    """The netlink port that has bound the queue."""
    try:
        rows = [line.split() for line in QUEUES.read_text().splitlines()]
    except OSError:
        return None
    return next((int(row[1]) for row in rows if int(row[0]) == number), None)


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


def ports_of(text: str) -> frozenset[int]:
    """Ports from ranges with commas between, or none."""
    return frozenset(port for part in text.split(",") if part for port in range_of(part))


def range_of(text: str) -> range:
    """Ports from "LO-HI", "LO:HI", "LO HI" or a single one."""
    low, *high = re.split(r"[-:\s]+", text)
    return range(int(low), int(high[0] if high else low) + 1)


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


def parse_rules(saved: str) -> Iterator[Rule]:
    """The rules in what iptables-save printed."""
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A "):
            words = shlex.split(line)
            yield Rule(table, words[1], words)


def our_rules(rules: Iterable[Rule], wanted: Mapping[str, Any], running: bool) -> Iterator[Finding]:
    """The rules that nfmasq-rules loaded, against the configuration."""
    rules = list(rules)
    ours = [rule for rule in rules if rule.is_ours]
    queueing = [rule for rule in ours if "NFQUEUE" in rule.values("-j")]
    load = f"iptables/nfmasq-rules up --queue {wanted['queue']} --ports {wanted['ports']}"
    if _takes_other_protocols(wanted):
        load += " --other-protocols"
    load += "".join(f" --forward {ports}" for ports in forwarded(wanted))
    if not queueing:
        yield Finding(
            "problem" if running else "note",
            "the rules are not loaded: no packet reaches nfmasq",
            f"{load} --inside IF --outside IF",
        )
        return
    numbers = {int(number) for rule in queueing for number in rule.values("--queue-num")}
    ports = _ports_by_rule(ours, wanted)
    well = True
    for name, loaded, agreed in (
        ("queue", numbers, numbers == {wanted["queue"]}),
        ("ports", map(_written, ports), ports == {ports_of(wanted["ports"])}),
    ):
        if not agreed:
            well = False
            yield Finding(
                "problem",
                f"{name}: the rules have {_listed(loaded)}, nfmasq has {wanted[name]}",
                f"load them anew: {load}, with the same --inside and --outside",
            )
    if lacking := _not_queued(ours, wanted):
        well = False
        yield Finding(
            "problem",
            f"not everybody reaches {_listed(lacking)}: a rule is missing",
            f"load them anew: {load}, with the same --inside and --outside",
        )
    for consequence, missing in _missing(ours, rules, wanted):
        well = False
        yield Finding(
            "problem",
            f"{consequence}: missing is {', '.join(missing)}",
            f"load them anew: {load}, with the same --inside and --outside",
        )
    if any("--queue-bypass" in rule.words for rule in queueing):
        well = False
        yield Finding(
            "problem",
            "a rule has --queue-bypass: without nfmasq, inside addresses go out",
            "load the rules with iptables/nfmasq-rules",
        )
    if not any("socket" in rule.values("-m") for rule in ours):
        well = False
        yield Finding(
            "warning",
            "no rule with a socket match: fragments are not put together, and are dropped",
            "load the rules with iptables/nfmasq-rules",
        )
    if not _takes_other_protocols(wanted) and any(rule.chain == OTHER for rule in queueing):
        well = False
        yield Finding(
            "warning",
            "the rules hand over other protocols, which nfmasq does not masquerade",
            f"nfmasq run --other-protocols by-address, or load them anew: {load}",
        )
    if well:
        yield Finding("ok", "the rules are loaded, and agree with nfmasq")


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
            what = _listed(rule.values("-i")), _listed(rule.values("-p"))
            queued[what] = queued.get(what, frozenset()) | ports_of(given[0])
    return queued


def _ports_by_rule(ours: Iterable[Rule], wanted: Mapping[str, Any]) -> set[frozenset[int]]:
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


def _not_queued(ours: Iterable[Rule], wanted: Mapping[str, Any]) -> list[str]:
    """The forwarded ports that the rules of some interface lack."""
    queued = _queued(ours)
    interfaces = {interface for interface, _ in queued}
    return [
        text
        for text, ports in forwarded(wanted).items()
        if any(ports - queued.get((name, text.split(":")[0]), frozenset()) for name in interfaces)
    ]


def _written(ports: Iterable[int]) -> str:
    """Ports as "LO-HI[,LO-HI]..."."""
    ranges: list[list[int]] = []
    for port in sorted(ports):
        if ranges and ranges[-1][1] == port - 1:
            ranges[-1][1] = port
        else:
            ranges.append([port, port])
    return ",".join(f"{low}-{high}" for low, high in ranges)


def _takes_other_protocols(wanted: Mapping[str, Any]) -> bool:
    """By address, or the calls of PPTP."""
    return bool(wanted["other-protocols"] == BY_ADDRESS or wanted["apps"].get("pptp"))


def _missing(
    ours: Iterable[Rule], rules: Iterable[Rule], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, list[str]]]:
    """What goes wrong, and the rules that are missing for it not to.

    The rules that are there tell the interfaces. So an interface that none of them names any more
    cannot be missed, and one side of which none is left is shown as INSIDE or OUTSIDE.
    """
    inside, outside = _interfaces(ours)
    loaded = {_shape(str(rule)) for rule in rules}
    missing: dict[str, list[str]] = {what: [] for what in (*BROKEN_WITHOUT.values(), NO_HAIRPIN)}
    for consequence, rule in _complete(inside or ["INSIDE"], outside or ["OUTSIDE"], wanted):
        if _shape(rule) not in loaded:
            missing[consequence].append(rule)
    yield from ((what, rules) for what, rules in missing.items() if rules)


def _interfaces(ours: Iterable[Rule]) -> tuple[list[str], list[str]]:
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


def _complete(
    inside: Iterable[str], outside: Iterable[str], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """What goes wrong without it, and each rule that nfmasq-rules loads, in iptables-save's words.

    Less what turns on defragmentation.
    """
    for chain, consequence in BROKEN_WITHOUT.items():
        table, name = chain.split(" -A NFMASQ-")
        if f"NFMASQ-{name}" != OTHER:
            yield consequence, f"{table} -A {name} -j NFMASQ-{name}"
    for rule in _for_the_outside(inside, outside, wanted):
        chain = " ".join(rule.split()[:4])
        yield BROKEN_WITHOUT[chain], rule
    for rule in _for_hairpins(inside, wanted):
        yield NO_HAIRPIN, rule


def _for_the_outside(
    inside: Iterable[str], outside: Iterable[str], wanted: Mapping[str, Any]
) -> Iterator[str]:
    to_queue = f"-j NFQUEUE --queue-num {wanted['queue']}"
    if _takes_other_protocols(wanted):
        for match in ("-p tcp", "-p udp", "-d 224.0.0.0/4"):
            yield f"-t raw -A {OTHER} {match} -j RETURN"
        yield f"-t raw -A {OTHER} {to_queue}"
    for interface in outside:
        for other in inside:
            yield f"-t security -A NFMASQ-FORWARD -i {other} -o {interface} {to_queue}"
        for match in _ports_matched(wanted):
            yield f"-t raw -A NFMASQ-PREROUTING -i {interface} {match} {to_queue}"
        yield f"-t raw -A NFMASQ-PREROUTING -i {interface} -p icmp {to_queue}"
        if _takes_other_protocols(wanted):
            yield f"-t raw -A NFMASQ-PREROUTING -i {interface} -j {OTHER}"
        unlike_ours = "-p tcp -m addrtype ! --src-type LOCAL -j DROP"
        yield f"-t security -A NFMASQ-OUTPUT -o {interface} {unlike_ours}"
    for table, interface in (("raw", "lo"), *(("security", name) for name in outside)):
        for match in ICMP_ERRORS_MATCHED:
            yield f"-t {table} -A NFMASQ-OUTPUT -o {interface} {match} {to_queue}"


def _for_hairpins(inside: Iterable[str], wanted: Mapping[str, Any]) -> Iterator[str]:
    to_queue = f"-j NFQUEUE --queue-num {wanted['queue']}"
    mark = "0x20000000/0x20000000"
    to_us = "-m addrtype --dst-type LOCAL -j NFMASQ-HAIRPIN"
    for table in ("raw", "security"):
        yield f"-t {table} -A NFMASQ-HAIRPIN -j MARK --set-xmark {mark}"
        yield f"-t {table} -A NFMASQ-HAIRPIN {to_queue}"
    for interface in inside:
        for match in (*_ports_matched(wanted), *ICMP_ERRORS_MATCHED):
            yield f"-t raw -A NFMASQ-PREROUTING -i {interface} {match} {to_us}"
        yield f"-t security -A NFMASQ-FORWARD -i {interface} -m mark --mark {mark} {to_queue}"
        redirect = "-p icmp -m icmp --icmp-type 5 -j DROP"
        yield f"-t security -A NFMASQ-OUTPUT -o {interface} {redirect}"
    for interface in (*inside, "lo"):
        for match in ICMP_ERRORS_MATCHED:
            yield f"-t security -A NFMASQ-OUTPUT -o {interface} {match} -j NFMASQ-HAIRPIN"


def _ports_matched(wanted: Mapping[str, Any]) -> Iterator[str]:
    for protocol in ("tcp", "udp"):
        for ports in wanted["ports"].replace("-", ":").split(","):
            yield f"-p {protocol} -m {protocol} --dport {ports}"


def _shape(rule: str) -> str:
    """The rule, whatever its queue and ports: they are compared by themselves."""
    return re.sub(r"(--queue-num|--dport) \S+( --queue-bypass)?", r"\1", rule)


def foreign_translations(rules: Iterable[Rule]) -> Iterator[Finding]:
    """Other source translation, which would translate again what nfmasq has rewritten."""
    rules = list(rules)
    _, interfaces_outside = _interfaces(rule for rule in rules if rule.is_ours)
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


def _listed(values: Iterable[object]) -> str:
    return " and ".join(map(str, sorted(values, key=str))) or "none"
