"""Draw a part of a Horovod timeline. Runs in: the command line.

``python scripts/draw_timeline.py run.json docs/timeline.svg --begin 400 --end 460``; the two are
milliseconds since ``hvd.init()``. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

COLOURS = {
    "NEGOTIATE_ALLREDUCE": "#d9d9d9",
    "ALLREDUCE": "#9ecae1",
    "MEMCPY_IN_FUSION_BUFFER": "#fdae6b",
    "GLOO_ALLREDUCE": "#3182bd",
    "MEMCPY_OUT_FUSION_BUFFER": "#e6550d",
}
OTHER = "#bcbddc"
BAR = 0.8
"""Height of a bar, of a row's 1."""


@dataclass(frozen=True)
class Span:
    """From an event's begin to its end.

    Parameters
    ----------
    name
        What happens.
    tensor
        To which one.
    begin, end
        Milliseconds since ``hvd.init()``.
    depth
        0 for a phase of the collective, 1 for an activity within it.
    """

    name: str
    tensor: str
    begin: float
    end: float
    depth: int


def spans_of(events: list[dict[str, Any]]) -> list[Span]:
    """Pair every begin with its end; what has no end is left out.

    Parameters
    ----------
    events
        The timeline.

    Returns
    -------
    list of Span
        In the order of their ends.
    """
    names = {
        event["pid"]: event["args"].get("name", "")
        for event in events
        if event.get("name") == "process_name"
    }
    spans = []
    open_of: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        stack = open_of.setdefault(event.get("pid", 0), [])
        if event["ph"] == "B":
            stack.append(event)
        elif event["ph"] == "E" and stack:
            first = stack.pop()
            begin, end = first["ts"] / 1000, event["ts"] / 1000
            spans.append(Span(first["name"], names[event["pid"]], begin, end, len(stack)))
    return spans


def draw(events: list[dict[str, Any]], begin: float, end: float, axes: Axes) -> None:
    """Draw one row for each tensor.

    Parameters
    ----------
    events
        The timeline.
    begin, end
        Milliseconds since ``hvd.init()``.
    axes
        Where.
    """
    shown = [span for span in spans_of(events) if begin <= span.begin and span.end <= end]
    tensors = sorted({span.tensor for span in shown})
    for span in shown:
        height = BAR / (span.depth + 1)
        axes.barh(
            tensors.index(span.tensor),
            span.end - span.begin,
            height=height,
            left=span.begin - begin,
            color=COLOURS.get(span.name, OTHER),
            edgecolor="white",
            linewidth=0.3,
            zorder=2 + span.depth,
        )
    for event in events:
        at = event.get("ts", 0) / 1000
        if event.get("name") == "CYCLE_START" and begin <= at <= end:
            axes.axvline(at - begin, color="#c7e9c0", linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(tensors)), tensors, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, end - begin)
    axes.set_xlabel("milliseconds")
    names = [name for name in COLOURS if any(span.name == name for span in shown)]
    handles = [Patch(color=COLOURS[name], label=name) for name in names]
    handles.append(Patch(color="#c7e9c0", label="CYCLE_START"))
    axes.legend(handles=handles, fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))


def main() -> None:
    """Read the timeline and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("timeline", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--begin", type=float, default=0.0)
    parser.add_argument("--end", type=float, default=100.0)
    arguments = parser.parse_args()
    events = json.loads(arguments.timeline.read_text())
    mpl.rcParams["svg.hashsalt"] = "timeline"  # the same picture from the same file
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    draw(events, arguments.begin, arguments.end, axes)
    figure.savefig(arguments.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
