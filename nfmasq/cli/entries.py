"""`nfmasq list`, `delete` and `flush`: the entries of a running nfmasq."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from nfmasq.cli import options, output
from nfmasq.config import UsageError
from nfmasq.daemon.control import request

Entry = dict[str, Any]

SORTS: dict[str, Callable[[Entry], Any]] = {
    "saddr": lambda entry: (IPv4Address(entry["saddr"]), entry["sport"]),
    "maddr": lambda entry: (IPv4Address(entry["maddr"]), entry["mport"]),
    "daddr": lambda entry: (IPv4Address(entry["daddr"]), entry["dport"]),
    "expires": lambda entry: entry["expires"],
    "packets": lambda entry: entry["packets_out"] + entry["packets_in"],
    "bytes": lambda entry: entry["bytes_out"] + entry["bytes_in"],
}

DRAWN = 1000  # entries; a list that has more is not drawn as a table

COLUMNS = (
    ("protocol", 8),
    ("inside", 21),
    ("masquerade", 21),
    ("outside", 21),
    ("state", 11),
    ("expires", 8),
    ("packets out/in", 17),
    ("bytes out/in", 21),
)
"""Headings, and widths that hold any usual value."""

ESSENTIAL = 5  # columns, the first of COLUMNS, that even a narrow terminal shows


def endpoints(entry: Entry) -> tuple[str, str, str]:
    """Return an entry's inside, masquerade and outside endpoints as texts.

    For a protocol without ports these are only the addresses.
    """
    inside, masquerade, outside = (
        entry[f"{side}addr"] + (f":{entry[f'{side}port']}" if entry["state"] != "OTHER" else "")
        for side in "smd"
    )
    return inside, masquerade, outside


def protocol_of(entry: Entry) -> str:
    """Return an entry's protocol, with a star where the flow cache carries its flow."""
    return f"{entry['protocol']}{'*' if entry['cached'] else ''}"


def cells(entry: Entry) -> tuple[str, ...]:
    """Return an entry as a row under COLUMNS."""
    return (
        protocol_of(entry),
        *endpoints(entry),
        entry["state"],
        f"{entry['expires']:.0f} s",
        f"{entry['packets_out']}/{entry['packets_in']}",
        f"{entry['bytes_out']}/{entry['bytes_in']}",
    )


@click.command("list")
@options.control
@options.as_json
@click.option(
    "--sort", type=click.Choice(list(SORTS)), help="Smallest first.  [default: as they stand]"
)
@click.option("--reverse", is_flag=True, help="The other way round.")
@options.criteria
def list_entries(
    control: Path, as_json: bool, sort: str | None, reverse: bool, **criteria: str | int | None
) -> None:
    """Show the entries.

    Shows all entries, or only the entries that meet every criterion given. A star after the
    protocol (tcp*) says that the flow cache carries the flow in the kernel.

    \b
    Examples:
      nfmasq list --saddr 10.0.0.5
      nfmasq list --protocol tcp --dport 443 --sort bytes --reverse
      nfmasq list --json | jq '.[] | select(.state == "ESTABLISHED")'
    """
    entries: Iterable[Entry] = request(control, "list", **_given(criteria))
    if sort or reverse:
        # Without a key the entries keep the order of the table.
        entries = sorted(entries, key=SORTS[sort]) if sort else list(entries)
        entries = reversed(entries) if reverse else entries
    if as_json:
        _print_json(entries)
    else:
        _print(iter(entries))


@click.command()
@options.control
@options.criteria
def delete(control: Path, **criteria: str | int | None) -> None:
    """Remove the entries that meet the criteria.

    An entry must meet every criterion given. Says how many entries were removed. Their sessions
    end: packets from the outside are no longer let in, and the next packet from the inside makes a
    new entry.

    \b
    Examples:
      nfmasq delete --saddr 10.0.0.5
      nfmasq delete --protocol udp --dport 53
      nfmasq delete --protocol tcp --maddr 198.51.100.2 --mport 61007
    """
    if not _given(criteria):
        raise UsageError("delete needs a criterion, as --saddr 10.0.0.5; flush removes all entries")
    for count in request(control, "delete", **_given(criteria)):
        click.echo(_deleted(count))


@click.command()
@options.control
def flush(control: Path) -> None:
    """Remove all entries, and say how many."""
    for count in request(control, "flush"):
        click.echo(_deleted(count))


def _given(criteria: dict[str, str | int | None]) -> dict[str, str | int]:
    return {name: value for name, value in criteria.items() if value is not None}


def _deleted(count: int) -> str:
    return "1 entry removed" if count == 1 else f"{count} entries removed"


def _print_json(entries: Iterable[Entry]) -> None:
    """Print a JSON array with a line for each entry, which is written as soon as it comes."""
    separator = "["
    for entry in entries:
        click.echo(separator + json.dumps(entry), nl=False)
        separator = ",\n "
    click.echo("[]" if separator == "[" else "]")


def _print(entries: Iterator[Entry]) -> None:
    """Print a table on a terminal, if the list is not too long; else aligned lines as they come."""
    first = list(islice(entries, DRAWN + 1))
    if sys.stdout.isatty() and len(first) <= DRAWN:
        _draw(first)
        return
    _print_line(name for name, _ in COLUMNS)
    for entry in chain(first, entries):
        _print_line(cells(entry))


def _print_line(row: Iterable[str]) -> None:
    widths = (width for _, width in COLUMNS)
    line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
    sys.stdout.write(line.rstrip() + "\n")


def _draw(entries: Sequence[Entry]) -> None:
    """Print a table with as many columns as the terminal has room for."""
    console = output.console()
    unbounded = console.options.update(max_width=sys.maxsize)
    for columns in range(len(COLUMNS), ESSENTIAL - 1, -1):
        drawn = table(entries, columns)
        width = console.measure(drawn, options=unbounded).maximum
        if width <= console.width:
            break
    # On an even narrower terminal the lines wrap, which is better than to cut off a port.
    console.width = max(console.width, width)
    console.print(drawn)


def table(entries: Iterable[Entry], columns: int) -> Table:
    """Make a table of entries for a terminal, with the first `columns` of COLUMNS."""
    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for name, _ in COLUMNS[:columns]:
        drawn.add_column(name, no_wrap=True)
    for entry in entries:
        drawn.add_row(*cells(entry)[:columns])
    return drawn
