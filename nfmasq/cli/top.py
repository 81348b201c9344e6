"""`nfmasq top`: the busiest entries of a running nfmasq, again and again."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Any

import click
from rich.live import Live
from rich.table import Table

from nfmasq.cli import options, output
from nfmasq.cli.entries import endpoints, protocol_of
from nfmasq.daemon.busiest import SECONDS
from nfmasq.daemon.control import request
from nfmasq.errors import NfmasqError


@click.command()
@options.control
@click.option(
    "--interval",
    type=click.FloatRange(*SECONDS),
    default=2.0,
    show_default=True,
    help="Seconds between two looks.",
)
def top(control: Path, interval: float) -> None:
    """Show the busiest entries, until Ctrl-C.

    A star after the protocol (tcp*) says that the flow cache carries the flow in the kernel.
    """
    console = output.console()
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        raise NfmasqError("top wants a terminal; nfmasq list prints the entries once")
    looks = request(control, "busiest", seconds=interval)
    first = next(looks)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for look in chain([first], looks):
            live.update(_table(look, console.height - 3), refresh=True)


def _table(look: dict[str, Any], rows: int) -> Table:
    table = Table(
        "protocol",
        "inside",
        "masquerade",
        "outside",
        "state",
        "out",
        "in",
        box=None,
        header_style="bold",
        title=f"{look['entries']} entries, {look['cached']} of them carried by the flow cache (*)",
        title_justify="left",
    )
    for entry in look["busiest"][:rows]:
        table.add_row(
            protocol_of(entry),
            *endpoints(entry),
            entry["state"],
            _bits(entry["rate_out"]),
            _bits(entry["rate_in"]),
        )
    return table


def _bits(rate: float) -> str:
    """Write a rate, given in bits a second, in the largest unit in which it is at least 1."""
    for unit in ("bit/s", "kbit/s", "Mbit/s"):
        if rate < 1000:
            return f"{rate:.1f} {unit}"
        rate /= 1000
    return f"{rate:.1f} Gbit/s"
