"""`nfmasq reload`: have a running nfmasq read its configuration again."""

from __future__ import annotations

from pathlib import Path

import click

from nfmasq.cli import options
from nfmasq.daemon.control import request


@click.command()
@options.control
def reload(control: Path) -> None:
    """Read the configuration again.

    Reads the file again; the options that nfmasq was started with win over it. Says what changed.
    Sessions go on. Where the file is wrong, or changes what takes a restart, nothing is changed.
    """
    changes = list(request(control, "reload"))
    for change in changes:
        click.echo(change)
    if not changes:
        click.echo("nothing has changed")
