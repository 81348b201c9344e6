"""The chart of the README: `python -m bench.chart RESULTS.json CHART.svg`, needs matplotlib."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.paths import PATHS

_PANELS = {
    "tcp_up": "TCP bulk, inside to outside, Gbit/s",
    "tcp_down": "TCP bulk, outside to inside, Gbit/s",
    "udp_64": "UDP, 64 bytes, thousand packets/s",
    "trip_median": "round trip, median, µs (shorter is better)",
    "http": "new TCP connections, HTTP, 1/s",
    "connections": "new TCP connections, reset at once, 1/s",
}
"""The quantities that are shown, by their keys, and what stands above them."""

_FLOWS = "UDP, 64 bytes, spread over flows that are known, thousand packets/s"
_COLOURS = {
    "forwarding": "#d0d7de",
    "masquerade": "#8c959f",
    "direct": "#0a3069",
    "routed": "#1f6feb",
    "nfmasq": "#80bbff",
}
"""The paths that are shown, by their keys."""

_COLUMNS = 2
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and sharp at any size
    "svg.hashsalt": "nfmasq",  # the same figures give the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw what a run measured of its data paths, as bars, into an SVG file.

    The file's name may end in .png, too.
    """
    keys = list(_PANELS)
    rows: list[Any] = [keys[at : at + _COLUMNS] for at in range(0, len(keys), _COLUMNS)]
    if results["flows"]:
        rows.append(["flows"] * _COLUMNS)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 0.3 + 1.5 * len(rows)))
        panels = figure.subplot_mosaic(rows)
        for key, title in _PANELS.items():
            panels[key].set_title(title)
            _draw_quantity(panels[key], key, results["paths"])
        for row in rows:
            for key in row[1:]:
                panels[key].tick_params(labelleft=key == "flows")
        if results["flows"]:
            panels["flows"].set_title(_FLOWS)
            _draw_flows(panels["flows"], results["flows"])
        figure.text(0.01, 0.006, _taken_on(results["machine"]), fontsize=8, color="#57606a")
        figure.tight_layout(rect=(0, 0.02, 1, 1))
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_quantity(axes: Axes, key: str, medians: Mapping[str, Mapping[str, float]]) -> None:
    """Draw a bar for each path that is shown, one below the other."""
    shown = [p for p in PATHS if p.key in _COLOURS and p.key in medians]
    values = [medians[p.key][key] for p in shown]
    colours = [_COLOURS[p.key] for p in shown]
    bars = axes.barh([p.title for p in shown], values, color=colours, height=0.75)
    axes.bar_label(bars, [_figure(value) for value in values], padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(left=False)


def _draw_flows(axes: Axes, medians: Mapping[str, Mapping[str, float]]) -> None:
    """Draw a group of bars for each number of flows, a bar for each path."""
    sizes = sorted({size for found in medians.values() for size in found}, key=int)
    shown = [p for p in PATHS if p.key in medians]
    width = 0.8 / len(shown)
    for place, path in enumerate(shown):
        found = medians[path.key]
        values = [found[size] for size in sizes if size in found]
        at = [n + (place - 1) * width for n, size in enumerate(sizes) if size in found]
        bars = axes.bar(at, values, width * 0.9, color=_COLOURS[path.key], label=path.title)
        axes.bar_label(bars, [_figure(value) for value in values], padding=2)
    axes.set_xticks(range(len(sizes)), [f"{int(size):,}" for size in sizes])
    axes.set_xlabel("flows")
    axes.set_yticks([])
    axes.margins(y=0.2)
    axes.spines["left"].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _figure(value: float) -> str:
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def _taken_on(machine: Mapping[str, object]) -> str:
    return (
        f"{machine['cores']} cores of {machine['processor']}, {machine['kernel']}, "
        f"Python {machine['python']}; medians of one run of script/bench"
    )


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
