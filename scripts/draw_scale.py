"""Draw what each further rank costs. Runs in: the command line.

``python -m benchmarks scale --json scale.json`` measures, and ``python scripts/draw_scale.py
scale.json docs/scale.svg`` draws. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = {"np={}": "#3182bd", "np=-{}": "#e6550d", "spawn": "#969696", "barrier job": "#bdbdbd"}
LABELS = {
    "np={}": "a run on Spark",
    "np=-{}": "a run without Spark",
    "spawn": "bare processes with a worker's imports",
    "barrier job": "a barrier job that does nothing",
}


def curves_of(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Take the curves out of the case's lines.

    Parameters
    ----------
    lines
        Of the case ``scale``.

    Returns
    -------
    dict of list of tuple
        Number of ranks and seconds, by what was measured.
    """
    medians = {line["name"]: float(line["median"]) for line in lines}
    sizes = sorted({int(name.partition(":")[0]) for name in medians})
    curves: dict[str, list[tuple[int, float]]] = {}
    for what in COLOURS:
        for size in sizes:
            name = f"{size}: {what.format(size)}"
            parts = [name] if name in medians else [f"{name} launch", f"{name} teardown"]
            curves.setdefault(what, []).append((size, sum(medians[part] for part in parts)))
    return curves


def draw(curves: dict[str, list[tuple[int, float]]], whole: Axes, each: Axes) -> None:
    """Draw the seconds of a run, and those of one of its ranks.

    Parameters
    ----------
    curves
        Number of ranks and seconds, by what was measured.
    whole, each
        Where.
    """
    for what, points in curves.items():
        sizes, seconds = zip(*points, strict=True)
        style = {"color": COLOURS[what], "marker": "o", "markersize": 4, "label": LABELS[what]}
        whole.plot(sizes, seconds, **style)
        each.plot(sizes, [1e3 * s / n for n, s in points], **style)
    for axes, label in ((whole, "seconds"), (each, "milliseconds a rank")):
        axes.set_xlabel("ranks")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.set_xticks(sizes)
        axes.grid(color="#eeeeee")
    whole.legend(fontsize=7, loc="upper left")


def main() -> None:
    """Read the figures and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    cases = json.loads(arguments.figures.read_text())["cases"]
    lines = next(case["lines"] for case in cases if case["name"] == "scale")
    mpl.rcParams["svg.hashsalt"] = "scale"  # the same picture from the same file
    figure, (whole, each) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    draw(curves_of(lines), whole, each)
    figure.savefig(arguments.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
