"""`nfmasq stats`: what a running nfmasq has counted, under the names that Prometheus sees."""

from __future__ import annotations

import json
from pathlib import Path

import click

from nfmasq.cli import options
from nfmasq.daemon.control import request


@click.command()
@options.control
@options.as_json
@click.option("--all", "everything", is_flag=True, help="Show histograms and the process, too.")
def stats(control: Path, as_json: bool, everything: bool) -> None:
    """Show what is counted.

    Shows packets, bytes, entries, free ports, errors and the queue. With --json, prints an array of
    all figures, each an object with name, labels and value.
    """
    figures = list(request(control, "stats"))
    if as_json:
        keys = ("name", "labels", "value")
        click.echo(json.dumps([dict(zip(keys, figure, strict=True)) for figure in figures]))
        return
    for name, labels, value in figures:
        if everything or _is_telling(name):
            described = " ".join(f"{label}={text}" for label, text in labels.items())
            click.echo(f"{name:<32} {described:<44} {value:>16.15g}")


def _is_telling(name: str) -> bool:
    return name.startswith("nfmasq_") and not name.endswith(("_bucket", "_created"))
