"""One run of the benchmarks, from beginning to end: `sudo ./script/bench`.

Each path is measured several times, in rounds. Each round has new labs for all paths, so nothing is
left of the round before. Within a round one quantity after the other is measured, of all paths in
turn: a ratio compares what the machine did within the same few seconds, whatever else it had to do.
The result is the median of the rounds, both of figures and of ratios.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import chart, expiry, network, report, table
from bench.paths import PATHS, ROOT, DataPath
from bench.targets import outcomes
from nfmasq.cli.output import console as drawing_console
from nfmasq.errors import NfmasqError
from nfmasq.lab import Lab

ROUNDS, QUICK_ROUNDS = 5, 1
SECONDS = 1
WIDTH = 110
"""Columns that the tables need."""

QUICK_SIZES = table.SIZES[:-1]

Rounds = defaultdict[str, list[float]]
"""What was measured, by quantity: one value for each round."""


@click.command()
@click.option("--quick", is_flag=True, help="One short round and no million entries, in 2 minutes.")
@click.option(
    "--rounds", type=click.IntRange(1), help=f"[default: {ROUNDS}; quick: {QUICK_ROUNDS}]"
)
@click.option(
    "--path",
    "wanted",
    multiple=True,
    type=click.Choice([path.key for path in PATHS]),
    help="Measure this data path, and nothing but paths; may be repeated.",
)
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the results go, in JSON; the chart goes beside them, as .svg.  [default: "
    "docs/throughput.json of the checkout; with --quick or --path, build/throughput.json]",
)
def main(quick: bool, rounds: int | None, wanted: tuple[str, ...], output: Path | None) -> None:
    """Measure nfmasq side by side with other data paths.

    Exit status 1 where a ratio that must hold does not.
    """
    # Whatever ends the run takes down what it has put up.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        if os.geteuid() != 0:
            raise NfmasqError("the benchmarks make network namespaces: run script/bench with sudo")
        console = drawing_console()
        console.width = max(WIDTH, console.width)
        paths = [path for path in _available() if not wanted or path.key in wanted]
        output = output or ROOT / ("build" if quick or wanted else "docs") / "throughput.json"
        output.parent.mkdir(exist_ok=True)
        rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
        sizes = () if wanted else QUICK_SIZES if quick else table.SIZES
        facts = report.machine()
        console.print(report.in_one_line(facts))
        with _progress(console) as progress:
            results = _measure(progress, paths, rounds, sizes, expiring=not wanted)
        results = {"machine": facts, "rounds": rounds, "seconds": SECONDS} | results
        output.write_text(json.dumps(results, indent=1) + "\n")
        chart.draw(results, output.with_suffix(".svg"))
        missed = _show(console, results)
        console.print(f"Written: {output}, {output.with_suffix('.svg')}", soft_wrap=True)
    except (NfmasqError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(missed)


def _available() -> list[DataPath]:
    """Return the paths that this nfmasq has; if it has no superpackets, it cannot turn them off."""
    line = [sys.executable, "-m", "nfmasq", "run", "--help"]
    usage = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [path for path in PATHS if path.key != "nfmasq-no-gso" or "--no-gso" in usage]


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:40}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _measure(
    progress: Progress,
    paths: Sequence[DataPath],
    rounds: int,
    sizes: Sequence[int],
    *,
    expiring: bool,
) -> dict[str, Any]:
    """Measure everything; returns each value of each round, and the medians."""
    steps = rounds * (len(paths) * len(network.STEPS) + expiring) + len(sizes)
    task = progress.add_task("", total=steps)
    by_path: dict[str, Rounds] = {path.key: defaultdict(list) for path in paths}
    trips: Rounds = defaultdict(list)
    for number in range(1, rounds + 1):
        progress.update(task, description=f"round {number}: {len(paths)} labs")
        with ExitStack() as stack:
            labs = [stack.enter_context(Lab(1, 1)) for _ in paths]
            handlers = [path.put_up(lab) for path, lab in zip(paths, labs, strict=True)]
            for step in network.STEPS:
                for path, lab, handler in zip(paths, labs, handlers, strict=True):
                    progress.update(task, description=f"round {number}: {path.title}")
                    _add(by_path[path.key], step(lab, handler, SECONDS))
                    progress.advance(task)
        if expiring:
            progress.update(task, description=f"round {number}: 100,000 entries expire")
            try:
                _add(trips, expiry.measure())
            except expiry.TooBusy as error:  # perhaps in this round only
                progress.console.print(f"round {number}: {error}")
            progress.advance(task)
    if expiring and not trips:
        raise NfmasqError("100,000 entries could not be made or did not expire in time, ever")
    by_size = {}
    for size in sizes:
        progress.update(task, description=f"a table of {size:,} entries")
        by_size[str(size)] = table.measure_apart(size)
        progress.advance(task)
    return {
        "rounds_of_paths": by_path,
        "rounds_of_expiry": trips,
        "paths": {key: _medians(found) for key, found in by_path.items()},
        "expiry": _medians(trips),
        "table": by_size,
    }


def _add(rounds: Rounds, found: Mapping[str, float]) -> None:
    for key, value in found.items():
        rounds[key].append(value)


def _medians(rounds: Rounds) -> dict[str, float]:
    return {key: median(values) for key, values in rounds.items()}


def _show(console: Console, results: Mapping[str, Any]) -> bool:
    """Show everything; returns whether a ratio that must hold was missed."""
    report.show(console, report.of_paths(results["paths"]))
    if "floor" in results["paths"]:
        report.show(console, report.by_the_floor(results["rounds_of_paths"]))
    if results["table"]:
        report.show(console, report.of_table(results["table"]))
    if results["expiry"]:
        console.print(report.of_expiry(results["expiry"]))
    held = list(outcomes(results["rounds_of_paths"], results["table"], results["expiry"]))
    if held:
        report.show(console, report.of_outcomes(held))
    return not all(outcome.holds for outcome in held)


if __name__ == "__main__":
    main()
