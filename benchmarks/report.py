"""What every case of the benchmark gives back: figures, a table of medians and ratios, JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Case", "Figures", "interleaved", "machine"]

_PACKAGES = ("horovodrunner", "horovod", "torch", "tensorflow-cpu", "pyspark", "pyarrow", "numpy")


@dataclass(frozen=True)
class Figures:
    """One line of a table.

    Parameters
    ----------
    name
        What was measured.
    unit
        Of the values, such as ``"s"`` or ``"lines/s"``.
    values
        One of each round.
    beside
        The line that this one is compared with: the ratio is of the rounds' own ratios.
    note
        What a reader has to know.
    """

    name: str
    unit: str
    values: list[float]
    beside: str = ""
    note: str = ""

    @property
    def median(self) -> float:
        """The middle one of the values."""
        return statistics.median(self.values)


@dataclass(frozen=True)
class Case:
    """One table.

    Parameters
    ----------
    name
        By which the case is asked for.
    title
        What it shows, in one sentence.
    lines
        The figures.
    facts
        Sentences to stand below the table.
    """

    name: str
    title: str
    lines: list[Figures]
    facts: list[str] = field(default_factory=list)

    def ratio(self, line: Figures) -> float | None:
        """Compare a line with the one beside it, round by round.

        Parameters
        ----------
        line
            The line.

        Returns
        -------
        float or None
            The median of the ratios; None where there is nothing to compare with.
        """
        other = next((each for each in self.lines if each.name == line.beside), None)
        if other is None:
            return None
        pairs = zip(line.values, other.values, strict=False)
        return statistics.median(value / base for value, base in pairs)

    def table(self) -> str:
        """Write the case as a table of Markdown.

        Returns
        -------
        str
            Lines.
        """
        rows = [("", "median", "lowest", "highest", "ratio")]
        for line in self.lines:
            ratio = self.ratio(line)
            beside = "" if ratio is None else f"{ratio:.2f} × {line.beside}"
            ends = (_short(min(line.values)), _short(max(line.values)))
            note = f" ({line.note})" if line.note else ""
            rows.append((line.name + note, f"{_short(line.median)} {line.unit}", *ends, beside))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        rows.insert(1, tuple("-" * width for width in widths))
        text = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        return "\n".join([f"## {self.name}: {self.title}", "", *text, "", *self.facts])

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-compatible data.

        Returns
        -------
        dict
            The fields, with medians and ratios.
        """
        lines = [
            {**asdict(line), "median": line.median, "ratio": self.ratio(line)}
            for line in self.lines
        ]
        return {**asdict(self), "lines": lines}


def interleaved(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure several ways in turn, so that a slow minute of the machine meets all of them.

    Parameters
    ----------
    ways
        Functions that give one figure, by name.
    rounds
        How often each is called.

    Returns
    -------
    dict of list of float
        The figures, by name.
    """
    values: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            values[name].append(way())
    return values


def machine() -> dict[str, Any]:
    """Describe where the figures come from.

    Returns
    -------
    dict
        Processor, cores, memory, and the versions of what was measured.
    """
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
