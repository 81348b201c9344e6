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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import abuse as attacked
from bench import chart, expiry, flows, network, report, table
from bench.paths import CACHED, PATHS, ROOT, DataPath, has_flow_cache
from bench.targets import outcomes
from nfmasq.cli.output import console as drawing_console
from nfmasq.errors import NfmasqError
from nfmasq.lab import Lab

ROUNDS, QUICK_ROUNDS = 5, 1
SECONDS = 1
MOST, QUICK_MOST = 1_000_000, 100_000
WIDTH = 120
"""Columns that the tables need."""

Rounds = defaultdict[str, list[float]]
"""What was measured, by quantity: one value for each round."""

ByPath = dict[str, Rounds]

Step = Callable[[str], AbstractContextManager[None]]
"""What shows a step by its description, and that it is done."""


@click.command()
@click.option(
    "--quick", is_flag=True, help="One short round, and no million entries or flows, in 2 minutes."
)
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
    "--abuse",
    is_flag=True,
    help="Measure what attacks leave a quiet neighbour, and nothing else, in 8 minutes.",
)
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the results go, in JSON; the chart goes beside them, as .svg.  [default: "
    "docs/throughput.json of the checkout, or docs/abuse.json; with --quick or --path in build/]",
)
def main(
    quick: bool, rounds: int | None, wanted: tuple[str, ...], abuse: bool, output: Path | None
) -> None:
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
        if abuse:
            sys.exit(_abuse(console, output or ROOT / "docs" / "abuse.json"))
        available = _available()
        if not any(path.key in CACHED for path in available):
            console.print("no flow cache on this machine: nfmasq doctor says why")
        paths = [path for path in available if not wanted or path.key in wanted]
        output = output or ROOT / ("build" if quick or wanted else "docs") / "throughput.json"
        output.parent.mkdir(exist_ok=True)
        rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
        most = 0 if wanted else QUICK_MOST if quick else MOST
        facts = report.machine()
        console.print(report.in_one_line(facts))
        with _progress(console) as progress:
            results = _measure(progress, paths, rounds, most)
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


def _abuse(console: Console, output: Path) -> bool:
    """Measure all attacks, and show it; returns whether a neighbour has too little left."""
    facts = report.machine()
    console.print(report.in_one_line(facts))
    by_path: dict[str, dict[str, network.Results]] = {path: {} for path in attacked.PATHS}
    with _progress(console) as progress, ExitStack() as stack:
        task = progress.add_task("", total=len(attacked.ATTACKS) * len(by_path))
        labs = [
            (path, stack.enter_context(attacked.scene(put_up)))
            for path, put_up in attacked.PATHS.items()
        ]
        for attack in attacked.ATTACKS:
            for path, lab in labs:
                progress.update(task, description=f"{path}: {attack.title}")
                by_path[path][attack.key] = attacked.suffer(lab, attack)
                progress.advance(task)
    output.write_text(json.dumps({"machine": facts, "abuse": by_path}, indent=1) + "\n")
    held = list(attacked.outcomes(by_path))
    report.show(console, report.of_abuse(by_path))
    report.show(console, report.of_outcomes(held))
    console.print(f"Written: {output}", soft_wrap=True)
    return not all(outcome.holds for outcome in held)


def _available() -> list[DataPath]:
    """Return the paths that this machine and this nfmasq have.

    If nfmasq has no superpackets, it cannot turn them off.
    """
    line = [sys.executable, "-m", "nfmasq", "run", "--help"]
    usage = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    missing = () if has_flow_cache() else CACHED
    if "--no-gso" not in usage:
        missing = (*missing, "nfmasq-no-gso")
    return [path for path in PATHS if path.key not in missing]


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:40}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _measure(
    progress: Progress, paths: Sequence[DataPath], rounds: int, most: int
) -> dict[str, Any]:
    """Measure everything; returns each value of each round, and the medians.

    `most` is the most entries and flows that there shall be; 0: nothing is measured but paths.
    """
    expiring = bool(most)
    caching = any(path.key in CACHED for path in paths)
    flow_sizes = [size for size in flows.SIZES if size <= most] if caching else []
    table_sizes = [size for size in table.SIZES if size <= most]
    steps = rounds * (len(paths) * len(network.STEPS) + expiring)
    steps += len(flow_sizes) * (1 + rounds) + len(table_sizes)
    task = progress.add_task("", total=steps)

    @contextmanager
    def step(description: str) -> Iterator[None]:
        progress.update(task, description=description)
        yield
        progress.advance(task)

    by_path: ByPath = {path.key: defaultdict(list) for path in paths}
    trips: Rounds = defaultdict(list)
    for number in range(1, rounds + 1):
        _measure_paths(step, by_path, f"round {number}", paths)
        if expiring:
            with step(f"round {number}: 100,000 entries expire"):
                try:
                    _add(trips, expiry.measure())
                except expiry.TooBusy as error:  # perhaps in this round only
                    progress.console.print(f"round {number}: {error}")
    if expiring and not trips:
        raise NfmasqError("100,000 entries could not be made or did not expire in time, ever")
    by_flows = _measure_flows(step, rounds, flow_sizes)
    by_size = {}
    for size in table_sizes:
        with step(f"a table of {size:,} entries"):
            by_size[str(size)] = table.measure_apart(size)
    return {
        "rounds_of_paths": by_path,
        "rounds_of_expiry": trips,
        "rounds_of_flows": by_flows,
        "paths": {key: _medians(found) for key, found in by_path.items()},
        "expiry": _medians(trips),
        "flows": {key: _medians(found) for key, found in by_flows.items()},
        "table": by_size,
    }


def _measure_paths(step: Step, by_path: ByPath, title: str, paths: Sequence[DataPath]) -> None:
    """Measure a round of all paths, in new labs."""
    with ExitStack() as stack:
        labs = [stack.enter_context(Lab(1, 1)) for _ in paths]
        handlers = [path.put_up(lab) for path, lab in zip(paths, labs, strict=True)]
        for measure in network.STEPS:
            for path, lab, handler in zip(paths, labs, handlers, strict=True):
                with step(f"{title}: {path.title}"):
                    _add(by_path[path.key], measure(lab, handler, SECONDS))


def _measure_flows(step: Step, rounds: int, sizes: Sequence[int]) -> ByPath:
    """Measure all rounds of each size in turn: a flow that is known stays known."""
    by_path: ByPath = defaultdict(partial(defaultdict, list))
    if not sizes:
        return by_path
    with flows.Spread() as spread:
        for size in sizes:
            with step(f"{size:,} flows become known"):
                spread.know(size)
            for number in range(1, rounds + 1):
                with step(f"round {number}: {size:,} flows"):
                    for path, arrived in spread.measure(SECONDS).items():
                        by_path[path][str(size)].append(arrived)
    return by_path


def _add(rounds: Rounds, found: Mapping[str, float]) -> None:
    for key, value in found.items():
        rounds[key].append(value)


def _medians(rounds: Rounds) -> dict[str, float]:
    return {key: median(values) for key, values in rounds.items()}


def _show(console: Console, results: Mapping[str, Any]) -> bool:
    """Show everything; returns whether a ratio that must hold was missed."""
    report.show(console, report.of_paths(results["paths"]))
    for other in ("masquerade", "floor"):
        if other in results["paths"]:
            report.show(console, report.of_ratios(other, results["rounds_of_paths"]))
    if results["flows"]:
        report.show(console, report.of_flows(results["flows"]))
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
