"""What a run found, as tables: on the terminal, and in Markdown for the documentation.

`python -m bench.report RESULTS.json` writes what README.md, docs/throughput.md and docs/abuse.md
show of a run.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from bench import abuse
from bench.abuse import ATTACKS
from bench.network import QUANTITIES, Quantity
from bench.paths import CACHED, PATHS
from bench.targets import Medians, Outcome, Rounds, against, outcomes
from nfmasq import __version__

_ENTRIES = (
    Quantity("created", "created", "1/s", 0),
    Quantity("found", "found", "1/s", 0),
    Quantity("found_in_order", "found in order", "1/s", 0),
    Quantity("found_bare", "found in a bare dict", "1/s", 0),
    Quantity("packets", "packets of known flows", "1/s", 0),
    Quantity("expired", "expired", "1/s", 0),
    Quantity("bytes_made", "memory, new", "bytes", 0),
    Quantity("bytes_in_use", "memory, in use", "bytes", 0),
)
"""What the results of the engine's table hold, for each number of entries."""

_OURS = ("nfmasq", *CACHED)
_COLOURS = {"holds": "[green]holds[/]", "missed": "[red]missed[/]"}


class Sheet(NamedTuple):
    """A table: its headings, each with a unit or without, and its rows.

    The first column says what a row is about; figures follow.
    """

    title: str
    headings: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str]]


# ---- what a run found ---------------------------------------------------------------------------


def machine() -> dict[str, str | int]:
    """Return what the figures are taken on: the machine, and the versions of programs."""
    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "processor": ", ".join(sorted(models)) or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "NetfilterQueue": version("NetfilterQueue"),
        "nfmasq": __version__,
    }


def in_one_line(facts: Mapping[str, object]) -> str:
    """Return what the figures were taken on, in one line."""
    return ", ".join(f"{name} {fact}" for name, fact in facts.items())


def of_paths(medians: Medians, quantities: Sequence[Quantity] = QUANTITIES) -> Sheet:
    """Return the paths' figures."""
    return _sheet("Data paths, medians", "data path", medians, quantities)


def of_ratios(other: str, paths: Rounds) -> Sheet:
    """Return the paths' figures, divided by those of one of them."""
    quantities = [quantity._replace(unit="", digits=2) for quantity in QUANTITIES]
    return _sheet(f"Against {other}", "data path", against(other, paths), quantities)


def of_flows(medians: Medians) -> Sheet:
    """Return the datagrams a second that pass, by path and by the number of known flows."""
    sizes = {size: None for found in medians.values() for size in found}
    quantities = [Quantity(n, f"{int(n):,} flow{'s' * (n != '1')}", "kpps", 1) for n in sizes]
    return _sheet("UDP 64 B, spread over flows that are known", "data path", medians, quantities)


def of_table(results: Medians) -> Sheet:
    """Return the figures of the engine's table, by the number of entries."""
    by_entries = {f"{int(entries):,}": found for entries, found in results.items()}
    return _sheet("The table, without a network", "entries", by_entries, _ENTRIES)


def of_abuse(by_path: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Sheet:
    """Return what a neighbour had in each attack, by path."""
    columns = (
        Quantity("fetches", "fetches", "kept", 2),
        Quantity("fetch_p99", "p99", "ms", 2),
        Quantity("echoes", "echoes", "kept", 2),
        Quantity("echo_p99", "p99", "ms", 2),
    )
    headings = [("attack", ""), ("sent", "1/s")]
    headings += [(f"{path}: {q.title}", q.unit) for path in by_path for q in columns]
    rows = []
    for attack in ATTACKS:
        rate = max(found[attack.key]["rate"] for found in by_path.values())
        row = [attack.title, _number(rate, 0)]
        for found in by_path.values():
            row += [_number(found[attack.key][q.key], q.digits) for q in columns]
        rows.append(row)
    return Sheet("What a quiet neighbour has left", headings, rows)


def of_expiry(medians: Mapping[str, float]) -> str:
    """Return a sentence that tells the round trip while entries expire."""
    return (
        f"99th percentile of the round trip: {medians['quiet']:.0f} µs, and "
        f"{medians['expiring']:.0f} µs while 100,000 entries expire "
        f"(within {medians['seconds']:.1f} s)"
    )


def of_outcomes(outcomes: Iterable[Outcome]) -> Sheet:
    """Return the ratios that must hold, and whether they hold."""
    rows = []
    for outcome in outcomes:
        relation = "at least" if outcome.at_least else "at most"
        holds = "holds" if outcome.holds else "missed"
        bound = f"{relation} {outcome.bound:g}"
        rows.append([outcome.title, f"{outcome.value:.4g}", bound, holds])
    headings = [(title, "") for title in ("", "measured", "must be", "")]
    return Sheet("What must hold", headings, rows)


def _sheet(title: str, about: str, results: Medians, quantities: Sequence[Quantity]) -> Sheet:
    headings = [(about, ""), *((quantity.title, quantity.unit) for quantity in quantities)]
    rows = [
        [name, *(_number(found.get(quantity.key), quantity.digits) for quantity in quantities)]
        for name, found in results.items()
    ]
    return Sheet(title, headings, rows)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


# ---- how it is shown ----------------------------------------------------------------------------


def show(console: Console, sheet: Sheet) -> None:
    """Print a table on the terminal."""
    table = Table(title=sheet.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column, (title, unit) in enumerate(sheet.headings):
        heading = f"{title}\n{unit}" if unit else title
        table.add_column(heading, justify="right" if column else "left", no_wrap=not column)
    for row in sheet.rows:
        cells = (_COLOURS.get(cell, cell) for cell in row)
        table.add_row(*cells, style="bold" if row[0] in _OURS else None)
    console.print(table)


def markdown(sheet: Sheet) -> str:
    """Return a table in Markdown, without its title."""
    headings = [f"{title}, {unit}" if unit else title for title, unit in sheet.headings]
    dashes = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, dashes, *sheet.rows))


def _documentation(results: Mapping[str, Any]) -> Iterator[str]:
    if "abuse" in results:
        yield f"Taken on: {in_one_line(results['machine'])}"
        yield markdown(of_abuse(results["abuse"]))
        yield markdown(of_outcomes(abuse.outcomes(results["abuse"])))
        return
    medians, table, expiry = results["paths"], results["table"], results["expiry"]
    yield f"Taken on: {in_one_line(results['machine'])}, rounds {results['rounds']}"
    titled = _by_title(medians)
    of_handlers = [quantity for quantity in QUANTITIES if quantity.key.startswith("cpu")]
    handled = {title: found for title, found in titled.items() if of_handlers[0].key in found}
    yield markdown(of_paths(titled, [q for q in QUANTITIES if q not in of_handlers]))
    yield markdown(of_paths(handled, of_handlers))
    yield markdown(of_flows(_by_title(results["flows"])))
    yield markdown(of_table(table))
    yield markdown(of_outcomes(outcomes(results["rounds_of_paths"], table, expiry)))


def _by_title(medians: Medians) -> Medians:
    return {path.title: medians[path.key] for path in PATHS if path.key in medians}


if __name__ == "__main__":
    print("\n\n".join(_documentation(json.loads(Path(sys.argv[1]).read_text()))))
