"""`nfmasq top`: the busiest entries of a running nfmasq, again and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable
from heapq import nlargest
from pathlib import Path
from typing import NamedTuple

import click
from rich.live import Live
from rich.table import Table

from nfmasq.cli import options, output
from nfmasq.cli.entries import Entry, endpoints, protocol_of
from nfmasq.daemon.control import request
from nfmasq.errors import NfmasqError

Key = tuple[str, str, int, str, int, str, int]


class Sample(NamedTuple):
    """The entries at a time (seconds), each under the values that tell it from the others."""

    time: float
    entries: dict[Key, Entry]


@click.command()
@options.control
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
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
    before = _look(control)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            after = _look(control)
            live.update(_table(before, after, console.height - 3), refresh=True)
            before = after


def _look(control: Path) -> Sample:
    return Sample(time.monotonic(), {_key(entry): entry for entry in request(control, "list")})


def _key(entry: Entry) -> Key:
    names = ("protocol", "saddr", "sport", "maddr", "mport", "daddr", "dport")
    return tuple(entry[name] for name in names)


def rates(before: Sample, after: Sample) -> Iterable[tuple[float, float, Entry]]:
    """Yield the bits a second of each entry, out and in; a new entry began with 0 bytes."""
    seconds = after.time - before.time
    for key, entry in after.entries.items():
        earlier = before.entries.get(key, {"bytes_out": 0, "bytes_in": 0})
        out, back = (entry[name] - earlier[name] for name in ("bytes_out", "bytes_in"))
        yield 8 * out / seconds, 8 * back / seconds, entry


def _table(before: Sample, after: Sample, rows: int) -> Table:
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
        title=_title(after.entries.values()),
        title_justify="left",
    )
    busiest = nlargest(rows, rates(before, after), key=lambda rate: rate[0] + rate[1])
    for out, back, entry in busiest:
        table.add_row(
            protocol_of(entry),
            *endpoints(entry),
            entry["state"],
            _bits(out),
            _bits(back),
        )
    return table


def _title(entries: Collection[Entry]) -> str:
    cached = sum(entry["cached"] for entry in entries)
    return f"{len(entries)} entries, {cached} of them carried by the flow cache (*)"


def _bits(rate: float) -> str:
    """Write a rate, given in bits a second, in the largest unit in which it is at least 1."""
    for unit in ("bit/s", "kbit/s", "Mbit/s"):
        if rate < 1000:
            return f"{rate:.1f} {unit}"
        rate /= 1000
    return f"{rate:.1f} Gbit/s"
