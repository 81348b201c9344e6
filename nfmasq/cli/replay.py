"""`nfmasq replay`: the engine over a capture, without a kernel."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import click

from nfmasq import config
from nfmasq.cli.run import engine_options
from nfmasq.replay import Replay


def _networks(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[IPv4Network, ...]:
    try:
        return tuple(map(IPv4Network, values))
    except ValueError as error:
        raise click.BadParameter(f"{error}; give a network such as 10.0.0.0/24.") from None


@click.command()
@click.option(
    "--inside",
    callback=_networks,
    metavar="NET",
    required=True,
    multiple=True,
    help="A network that is masqueraded, as 10.0.0.0/24; may be given more than once.",
)
@click.option(
    "--config",
    "path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="TOML, as for run; none is read unless it is named here.",
)
@engine_options
@click.argument("source", metavar="IN.pcap", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT.pcap", type=click.Path(path_type=Path))
def replay(
    inside: tuple[IPv4Network, ...], path: Path | None, source: Path, target: Path, **options: Any
) -> None:
    """Run the masquerade over a capture, as any user, on any machine.

    IN.pcap (pcap or pcapng) is what a gateway gets: packets from the inside networks to elsewhere,
    and packets to the masquerade address. OUT.pcap is what it would send on, as raw IP packets with
    the times of the capture. Packets between others are passed over. Hop limits stay as
    captured: lowering them is the kernel's part.

    \b
    Example:
      nfmasq replay --inside 10.0.0.0/24 --masquerade-address 198.51.100.2 lan.pcap wan.pcap
    """
    command_line = {name.replace("_", "-"): value for name, value in options.items()}
    configuration = config.load(path, command_line)
    if not configuration.masquerade_addresses:
        raise click.UsageError("--masquerade-address is needed: there is no routing to ask.")
    run = Replay(configuration, inside)
    run.over(source, target)
    addresses = ", ".join(str(IPv4Address(a)) for a in configuration.masquerade_addresses)
    click.echo(f"{source} -> {target}, masqueraded as {addresses}: {run.summary()}")
