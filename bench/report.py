"""What a run found, as tables on the terminal."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.network import QUANTITIES
from bench.targets import Medians, Verdict
from nfmasq import __version__

_TABLE_COLUMNS = (
    ("created", "created", "1/s"),
    ("found", "found", "1/s"),
    ("found_bare", "bare dict look-ups", "1/s"),
    ("packets", "packets of known flows", "1/s"),
    ("expired", "expired", "1/s"),
    ("bytes_made", "memory, new", "bytes"),
    ("bytes_in_use", "memory, in use", "bytes"),
)


def machine() -> dict[str, str | int]:
    """What the figures were taken on."""
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


def show_machine(console: Console, facts: Mapping[str, object]) -> None:
    """What the figures were taken on, in one line."""
    console.print(", ".join(f"{name} {fact}" for name, fact in facts.items()))


def show_paths(console: Console, medians: Medians) -> None:
    """The paths' figures, and below them what they are against the floor's."""
    floor = medians.get("floor")
    _show_quantities(console, "Data paths, medians", medians)
    if floor:
        ratios = {
            path: {key: value / floor[key] for key, value in found.items() if floor.get(key)}
            for path, found in medians.items()
        }
        _show_quantities(console, "Against the floor", ratios, digits=2)


def _show_quantities(
    console: Console, title: str, medians: Medians, digits: int | None = None
) -> None:
    table = _table(title)
    table.add_column("data path", no_wrap=True)
    for quantity in QUANTITIES:
        heading = quantity.title if digits else f"{quantity.title}\n{quantity.unit}"
        table.add_column(heading, justify="right")
    for path, found in medians.items():
        cells = (_number(found.get(q.key), digits or q.digits) for q in QUANTITIES)
        table.add_row(path, *cells, style="bold" if path == "nfmasq" else None)
    console.print(table)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def show_table(console: Console, results: Medians) -> None:
    """The engine's table, by the number of entries."""
    table = _table("The table, without a network")
    table.add_column("entries", justify="right")
    for _, title, unit in _TABLE_COLUMNS:
        table.add_column(f"{title}\n{unit}", justify="right")
    for entries, values in results.items():
        cells = (_number(values.get(key), 0) for key, _, _ in _TABLE_COLUMNS)
        table.add_row(f"{int(entries):,}", *cells)
    console.print(table)


def show_expiry(console: Console, medians: Mapping[str, float]) -> None:
    """The round trip while entries expire."""
    console.print(
        f"99th percentile of the round trip: {medians['quiet']:.0f} µs, and "
        f"{medians['expiring']:.0f} µs while 100,000 entries expire "
        f"(within {medians['seconds']:.1f} s)"
    )


def show_verdicts(console: Console, verdicts: Iterable[Verdict]) -> None:
    """The ratios that must hold, and whether they do."""
    table = _table("What must hold")
    for title in ("", "measured", "must be", ""):
        table.add_column(title, justify="right" if title else "left")
    for verdict in verdicts:
        relation = "at least" if verdict.at_least else "at most"
        mark = "[green]holds[/]" if verdict.holds else "[red]missed[/]"
        table.add_row(verdict.title, f"{verdict.value:.4g}", f"{relation} {verdict.bound:g}", mark)
    console.print(table)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
