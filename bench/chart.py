"""The chart of the README: `python -m bench.chart RESULTS.json CHART.svg`, needs matplotlib."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.paths import PATHS

_PANELS = (
    ("tcp_up", "TCP bulk, inside to outside", "Gbit/s"),
    ("tcp_down", "TCP bulk, outside to inside", "Gbit/s"),
    ("udp_64", "UDP, 64 bytes", "thousand packets/s"),
    ("connections", "new TCP connections", "1/s"),
    ("trip_median", "round trip, median (shorter is better)", "µs"),
)
_COLOURS = {"nfmasq": "#1f6feb", "nfmasq-no-gso": "#79aef5", "floor": "#57606a"}
_OTHERS = "#c9d1d9"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and sharp at any size
    "svg.hashsalt": "nfmasq",  # the same figures give the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw what a run measured of its data paths, as bars, into an SVG file."""
    medians = results["paths"]
    shown = [p for p in PATHS if p.key in medians]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 0.6 + len(_PANELS) * (0.45 + 0.2 * len(shown))))
        for axes, (key, title, unit) in zip(figure.subplots(len(_PANELS), 1), _PANELS, strict=True):
            values = [medians[p.key][key] for p in shown]
            colours = [_COLOURS.get(p.key, _OTHERS) for p in shown]
            bars = axes.barh([p.title for p in shown], values, color=colours, height=0.75)
            axes.bar_label(
                bars,
                [f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in values],
                padding=3,
            )
            axes.set_title(f"{title}, {unit}", loc="left", fontsize=10, fontweight="bold")
            axes.invert_yaxis()
            axes.set_xticks([])
            axes.tick_params(left=False)
        figure.text(0.01, 0.003, _taken_on(results["machine"]), fontsize=8, color="#57606a")
        figure.tight_layout(rect=(0, 0.015, 1, 1))
        figure.savefig(path, metadata={"Date": None})


def _taken_on(machine: Mapping[str, object]) -> str:
    return (
        f"{machine['cores']} cores of {machine['processor']}, {machine['kernel']}, "
        f"Python {machine['python']}; medians of one run of script/bench"
    )


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
