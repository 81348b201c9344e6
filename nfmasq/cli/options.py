"""Command-line options that several commands have in common."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import click

from nfmasq.config import DEFAULT_CONTROL
from nfmasq.engine.wire.by_address import number_of

control = click.option(
    "--control",
    metavar="PATH",
    type=click.Path(readable=False, path_type=Path),
    default=DEFAULT_CONTROL,
    show_default=True,
    help="The control socket of the nfmasq to talk to.",
)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _dotted(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    try:
        return None if value is None else str(IPv4Address(value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not an IPv4 address.") from None


def _protocol(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and number_of(value) is None:
        raise click.BadParameter(f"{value!r} is neither a protocol's name nor its number.")
    return value


def criteria(command: click.decorators.FC) -> click.decorators.FC:
    """Add to a command the options that choose entries; an option that is not given is None."""
    port = click.IntRange(0, 65535)
    options = [
        click.option(
            "--protocol", metavar="P", callback=_protocol, help="tcp, udp, gre, ..., or a number."
        ),
        click.option("--saddr", metavar="A", callback=_dotted, help="Inside address."),
        click.option("--sport", metavar="N", type=port, help="Inside port (ICMP: identifier)."),
        click.option("--maddr", metavar="A", callback=_dotted, help="Masquerade address."),
        click.option("--mport", metavar="N", type=port, help="Masquerade port."),
        click.option("--daddr", metavar="A", callback=_dotted, help="Outside address."),
        click.option("--dport", metavar="N", type=port, help="Outside port."),
    ]
    for option in reversed(options):
        command = option(command)
    return command
