"""`nfmasq servers`: the servers that share forwarded ports, and their weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from nfmasq.cli import options, output
from nfmasq.config import UsageError
from nfmasq.config.forwards import HIGHEST_WEIGHT
from nfmasq.daemon.control import request

COLUMNS = ("forward", "server", "state", "weight", "active", "inactive", "total")

COLOURS = {"up": "green", "down": "red", "drained": "yellow"}


@click.command()
@options.control
@options.as_json
@click.argument("forward", required=False)
@click.argument("server", required=False)
@click.option(
    "--weight",
    type=click.IntRange(0, HIGHEST_WEIGHT),
    metavar="N",
    help="Give the server this weight; 0 drains it: it gets no new sessions.",
)
def servers(
    control: Path, as_json: bool, forward: str | None, server: str | None, weight: int | None
) -> None:
    """Show the servers of forwarded ports, or set the weight of one.

    Shows all servers, the servers of a FORWARD, or one SERVER of the FORWARD. A server is up, down
    (by its health check), or drained (its weight is 0). Sessions are active while established, and
    inactive while they open and close; total counts all sessions that there have been.

    A weight set here stays until the configuration gives the server another weight, or nfmasq ends.

    \b
    Examples:
      nfmasq servers
      nfmasq servers tcp:80
      nfmasq servers tcp:80 10.0.0.2:80 --weight 0
    """
    named = {"forward": forward, "server": server}
    named = {key: name for key, name in named.items() if name is not None}
    if weight is None:
        rows = list(request(control, "servers", **named))
    elif len(named) < 2:
        raise UsageError("--weight is of one server: nfmasq servers FORWARD SERVER --weight N")
    else:
        rows = list(request(control, "weight", **named, weight=weight))
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    elif sys.stdout.isatty():
        output.console().print(table(rows))
    else:
        _print([COLUMNS, *([str(row[name]) for name in COLUMNS] for row in rows)])


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Make a table of servers for a terminal."""
    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for name in COLUMNS:
        drawn.add_column(name, no_wrap=True, justify="left" if name in COLUMNS[:3] else "right")
    for row in rows:
        cells = [str(row[name]) for name in COLUMNS]
        cells[2] = f"[{COLOURS[row['state']]}]{row['state']}"
        drawn.add_row(*cells)
    return drawn


def _print(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        aligned = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(aligned).rstrip())
