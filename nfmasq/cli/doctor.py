"""`nfmasq doctor`: what is missing or wrong on this machine.

Each function that looks at a part of the machine yields findings: what is so and, where something
is wrong, what to do. A problem keeps nfmasq from working or lets something go wrong; a warning is
about what may become a problem; a note is good to know. What cannot be seen, for example without
privileges, is a note and not a problem.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from nfmasq import config
from nfmasq.cli import doctor_rules, options
from nfmasq.cli.finding import STYLES, Finding
from nfmasq.daemon.control import request
from nfmasq.daemon.queue_table import queue_row
from nfmasq.errors import NfmasqError
from nfmasq.rules import ports_of, range_of

SYSCTLS = Path("/proc/sys/net")
NETWORK = Path("/sys/class/net")
CAP_NET_ADMIN = 1 << 12
CAP_NET_RAW = 1 << 13


@click.command()
@options.control
@click.option(
    "--config",
    "path",
    metavar="FILE",
    type=click.Path(readable=False, path_type=Path),
    help="The configuration to compare with where no nfmasq is running.  "
    f"[default: {config.DEFAULT_FILE} where there is one]",
)
@options.as_json
@click.pass_context
def doctor(context: click.Context, control: Path, path: Path | None, as_json: bool) -> None:
    """Say what is missing or wrong on this machine.

    Compares the machine with the configuration of the running nfmasq or, where none is running,
    with the configuration file. Says what to do, changes nothing, and sees most as root. The exit
    status is 1 where there is a problem.
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
    """Yield all findings, beginning with what the rest depends on."""
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
    yield from local_ports(wanted["ports"], wanted["reserve"])
    yield from routing()
    yield from socket_buffer(wanted["socket-buffer"])
    rules, findings = doctor_rules.loaded_rules(_is_privileged())
    yield from findings
    if rules is not None:
        yield from doctor_rules.our_rules(rules, wanted, running)
        yield from doctor_rules.foreign_translations(rules)
        yield from doctor_rules.overlapping_networks(rules)


def _configuration(control: Path, path: Path | None) -> tuple[Mapping[str, Any], list[Finding]]:
    """Return the configuration to compare with, and findings: the first is ok if nfmasq runs."""
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
    """Yield whether this process has the two capabilities that nfmasq needs; root has both."""
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
    """Yield whether the queue can be bound or, where it is bound, whether nfmasq has bound it."""
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
    """Yield whether the kernel forwards packets at all."""
    if _sysctl("ipv4/ip_forward") == "1":
        yield Finding("ok", "net.ipv4.ip_forward is 1")
    else:
        yield Finding("problem", "net.ipv4.ip_forward is not 1", "sysctl -w net.ipv4.ip_forward=1")


def local_ports(ports: str, reserve: bool = False) -> Iterator[Finding]:
    """Yield whether this machine's own connections may take masquerade ports.

    `ports` is LO-HI[,LO-HI]..., as in the configuration; `reserve` says that all of them should be
    reserved.
    """
    local = range_of(_sysctl("ipv4/ip_local_port_range") or "32768 60999")
    reserved = _sysctl("ipv4/ip_local_reserved_ports")
    free = ports_of(ports) - ports_of(reserved or "")
    if reserve and free:
        yield Finding(
            "problem",
            f"masquerade ports {ports} are not all in net.ipv4.ip_local_reserved_ports",
            "load the rules anew: nfmasq-rules up --reserve",
        )
    elif not free & {*local}:
        yield Finding("ok", f"masquerade ports {ports} are apart from this machine's own ports")
    else:
        yield Finding(
            "problem",
            f"masquerade ports {ports} meet this machine's own, {local.start}-{local.stop - 1}",
            "load the rules with nfmasq-rules up --reserve (reserve = true in the file), or choose "
            "other --ports",
        )


def routing() -> Iterator[Finding]:
    """Yield settings of the kernel that are right on most gateways, and puzzling on the others."""
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
    """Yield a note where the kernel grants a receive buffer of `wanted` bytes only by force."""
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
