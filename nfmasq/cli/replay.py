"""`nfmasq replay`: run the engine over a capture, without a kernel."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import click

from nfmasq import config
from nfmasq.cli.run import engine_options
from nfmasq.config import Configuration
from nfmasq.engine.wire.address import dotted
from nfmasq.replay import Replay

# `Replay` says which file cannot be opened; click would call it wrong usage.
_CAPTURE = click.Path(readable=False, path_type=Path)


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
    type=click.Path(readable=False, path_type=Path),
    help="TOML, as for run; none is read unless it is named here.",
)
@click.option(
    "--ports",
    metavar="LO-HI[,LO-HI]...",
    help=f"Masquerade ports, both ends included.  [default: {Configuration().as_table()['ports']}]",
)
@click.option(
    "--masquerade-address",
    metavar="ADDRESS",
    multiple=True,
    help="What the outside sees as the source; several make a pool.  [required, here or in FILE]",
)
@engine_options
@click.argument("source", metavar="IN.pcap", type=_CAPTURE)
@click.argument("target", metavar="OUT.pcap", type=_CAPTURE)
def replay(
    inside: tuple[IPv4Network, ...], path: Path | None, source: Path, target: Path, **options: Any
) -> None:
    """Run the masquerade over a capture, as any user, on any machine.

    IN.pcap (pcap or pcapng) is what a gateway gets: packets from the inside networks to elsewhere,
    and packets to the masquerade address. OUT.pcap is what the gateway would send on, as raw IP
    packets with the times of the capture; a file there is replaced, a pipe or device is written to.
    Packets between other hosts are passed over. Hop limits stay as captured: lowering them is the
    kernel's part.

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
    addresses = ", ".join(map(dotted, configuration.masquerade_addresses))
    # Not on stdout, which may be OUT.pcap.
    click.echo(f"{source} -> {target}, masqueraded as {addresses}: {run.summary()}", err=True)
