"""The command `nfmasq doctor`: it looks at everything in turn, and prints what it finds."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from pyroute2.netlink.exceptions import NetlinkError

from nfmasq import config
from nfmasq.cli import options
from nfmasq.cli.doctor import machine, ports, rules
from nfmasq.cli.doctor.doors import open_doors
from nfmasq.cli.doctor.finding import STYLES, Finding
from nfmasq.cli.doctor.flow_cache import flow_cache, mode_in_force
from nfmasq.cli.doctor.network import (
    Loading,
    Network,
    Sides,
    carriers,
    overlapping_networks,
    read_network,
    sides_of,
)
from nfmasq.cli.doctor.passage import passage
from nfmasq.cli.doctor.routes import guessed_sides, strays, ways_back, ways_out
from nfmasq.cli.doctor.tables import Tables, loaded_tables
from nfmasq.cli.doctor.translations import foreign_translations
from nfmasq.daemon.control import request
from nfmasq.errors import NfmasqError


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
    for command in finding.commands:
        click.echo(f"{'':8} {command}")


def examine(control: Path, path: Path | None) -> Iterator[Finding]:
    """Yield all findings, beginning with what the rest depends on."""
    if platform.system() != "Linux":
        yield Finding("problem", f"this is {platform.system()}", "nfmasq run needs Linux")
        return
    yield Finding("ok", f"Linux {platform.release()}")
    yield from machine.privilege()
    wanted, findings = _configuration(control, path)
    yield from findings
    running = findings[0].level == "ok"
    yield from machine.queue(wanted["queue"], running)
    yield from machine.forwarding()
    yield from machine.settings()
    yield from machine.socket_buffer(wanted["socket-buffer"])
    tables, findings = loaded_tables(machine.is_privileged())
    yield from findings
    here, findings = _interfaces()
    yield from findings
    program = tables.program_of_ours if tables else "iptables"
    ours = [rule for rule in tables.rules if rule.our_chain] if tables else []
    sides = sides_of(wanted, ours)
    likely = sides if all(sides) else guessed_sides(here)
    load = rules.loading(wanted, program)
    if tables is not None:
        yield from rules.our_rules(ours, wanted, running, load, likely)
    yield from flow_cache(wanted["flow-cache"], tables, here, sides)
    if running:
        yield from mode_in_force(control, wanted["flow-cache"])
    yield from _way_out(here, sides, wanted, load, tables)
    if tables is not None:
        yield from foreign_translations(tables, here, sides, wanted)
        yield from open_doors(tables, ours, here, sides, wanted)
    reserving = rules.loading({**wanted, "reserve": True}, program)(likely.or_unknown())
    yield from ports.local_ports(wanted, reserving)
    yield from ports.sockets(wanted, reserving)
    if running:
        yield from ports.nearly_taken(control, wanted)


def _interfaces() -> tuple[Network, list[Finding]]:
    try:
        return read_network(), []
    except (OSError, NetlinkError) as error:
        return Network([]), [Finding("note", f"the interfaces cannot be read: {error}")]


def _way_out(
    here: Network, sides: Sides, wanted: Mapping[str, Any], load: Loading, tables: Tables | None
) -> Iterator[Finding]:
    """Yield what is in the way of packets from the inside to the outside, and back."""
    addresses = wanted["masquerade-address"]
    yield from carriers(here, sides, addresses, load)
    yield from overlapping_networks(here, sides)
    ways, findings = ways_out(here, sides)
    yield from findings
    yield from strays(ways, sides, here, load)
    yield from ways_back(ways, here, sides, addresses)
    for way in ways:
        if tables is not None and way.outside in here.matching(sides.outside):
            yield from passage(tables, here, way)


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
