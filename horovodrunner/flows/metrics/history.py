"""What a run reported, as its caller reads it. Runs in: the driver."""

from __future__ import annotations

import html
import math
import pickle
import threading
from array import array
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentValueError, ConfigurationError
from horovodrunner.flows.logs.training_log import format_logs, format_value
from horovodrunner.flows.metrics.records import Point
from horovodrunner.flows.metrics.series import PointTable, RankSummary
from horovodrunner.formatting import cut, printable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["History"]

MAX_POINTS = 1_000_000
"""Of rank 0, and of all other ranks together."""

MAX_SUMMARISED_STEPS = 200_000

MAX_SHOWN = 12
"""So many metrics are shown in one line."""

MAX_LISTED = 100
"""So many metrics are shown in a table."""

_NAMES_CHARACTERS = 500
_SPARK_POINTS = 120
_SPARK_WIDTH, _SPARK_HEIGHT = 160, 28


class History:
    """The metrics of a run, in the order in which they came; it grows while the run goes on.

    Iterating over it yields the points of rank 0, ``len`` counts them, and ``history["loss"]`` is
    one metric of rank 0 by step. A million points of rank 0 are kept. Beyond that one of two is
    left out (then three of four, and so on); :meth:`best` still knows them all. What all ranks
    reported at a step is summed up for 200,000 steps, and beyond that for half of them, and so on.

    A copy, and what pickle makes of one, stays as it was at that moment.
    """

    def __init__(self, size: int = 1) -> None:
        self._lock = threading.Lock()
        self._size = size
        self._leader = PointTable(MAX_POINTS)
        self._others = PointTable(MAX_POINTS)
        self._ranks = RankSummary(MAX_SUMMARISED_STEPS)

    def _add(self, point: Point) -> None:
        with self._lock:
            if point.rank == 0:
                self._leader.add(point)
            elif point.is_kept:
                self._others.add(point)
            if self._size != 1:
                self._ranks.add(point)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {
                "_size": self._size,
                "_leader": self._leader.copy(),
                "_others": self._others.copy(),
                "_ranks": pickle.dumps(self._ranks),
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        ranks = pickle.loads(state["_ranks"])  # noqa: S301 - what __getstate__ has made
        vars(self).update(state, _lock=threading.Lock(), _ranks=ranks)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of rank 0's metrics, in the order in which they first came."""
        with self._lock:
            return self._leader.names

    @property
    def last(self) -> Point | None:
        """The point of rank 0 that came last; None before the first one."""
        with self._lock:
            return self._leader.last

    def __len__(self) -> int:
        """Return how many points of rank 0 are kept."""
        with self._lock:
            return len(self._leader)

    def __iter__(self) -> Iterator[Point]:
        """Yield the points of rank 0."""
        with self._lock:
            points = self._leader.copy()
        return iter(points)

    def __contains__(self, metric: object) -> bool:
        """Return whether rank 0 has reported a metric."""
        return metric in self.metrics

    def __getitem__(self, metric: str) -> dict[int, float]:
        """Return a metric of rank 0 by step; of a step that ran again, the last value.

        Raises
        ------
        KeyError
            If rank 0 has not reported it.
        """
        with self._lock:
            if metric not in self._leader.names:
                raise KeyError(_unknown(metric, self._leader.names))
            return dict(self._leader.series(metric))

    def series(self, metric: str) -> list[tuple[int, float]]:
        """Return steps and values of a metric of rank 0, in the order in which they came."""
        with self._lock:
            return list(self._leader.series(metric))

    def samples(self, metric: str, most: int = _SPARK_POINTS) -> list[tuple[int, float]]:
        """Return about so many steps and values of a metric of rank 0, and the last ones."""
        with self._lock:
            return self._leader.samples(metric, most)

    def best(self, metric: str, mode: str = "min") -> Point:
        """Return the point of rank 0 at which a metric was best.

        Parameters
        ----------
        metric
            Its name.
        mode
            ``"min"`` or ``"max"``: whether small or large values are good.

        Returns
        -------
        Point
            With ``step``, ``values``, ``attempt`` and ``time``; the first one of several that are
            equally good. NaN is never the best.

        Raises
        ------
        ArgumentValueError
            If rank 0 has not reported the metric, or NaN only, or mode is another word.

        Examples
        --------
        >>> runner.history.best("val_acc", "max").step  # doctest: +SKIP
        17
        """
        name = checked.text("metric", metric)
        mode = checked.choice("mode", mode, ("min", "max"))
        with self._lock:
            found = self._leader.extremes(name)
            names = self._leader.names
        if found is None:
            why = "it was never a number" if name in names else _unknown(name, names)
            raise ArgumentValueError(f"best({name!r}): {why}")
        return found[0 if mode == "min" else 1]

    def to_pandas(self, ranks: str = "summary") -> pd.DataFrame:
        """Return the points as a DataFrame of pandas.

        Parameters
        ----------
        ranks
            ``"summary"``: a row for each point of rank 0, and with several ranks the columns
            ``<metric>.mean``, ``.min`` and ``.max`` over all that reported the step. ``"all"``: a
            row for each point that is kept, of any rank.

        Returns
        -------
        pandas.DataFrame
            With the columns ``step``, ``time`` (UTC), ``rank``, ``attempt`` and a column of floats
            for each metric, NaN where it was not reported. A metric that is called as another
            column has ``_`` behind its name.

        Raises
        ------
        ArgumentValueError
            If ranks is another word.
        ConfigurationError
            If pandas is not installed.

        Examples
        --------
        >>> runner.history.to_pandas().set_index("step")["loss"].plot()  # doctest: +SKIP
        """
        ranks = checked.choice("ranks", ranks, ("summary", "all"))
        try:
            import pandas as pd
        except ImportError as error:
            raise ConfigurationError(f"history.to_pandas() needs pandas: {error}") from error
        with self._lock:
            tables = [self._leader.copy()]
            summary = {}
            if ranks == "all":
                tables.append(self._others.copy())
            elif self._size != 1:
                summary = self._summary_columns(tables[0])
        names = dict.fromkeys(name for table in tables for name in table.names)
        taken = {*tables[0].places(), *names}
        frames = []
        for table in tables:
            columns: dict[str, Any] = dict(table.places())
            for name in names:
                columns[_free(name, taken) if name in columns else name] = table.column(name)
            for name, column in summary.items():
                columns[_free(name, taken) if name in taken else name] = column
            frames.append(pd.DataFrame(columns))
        frame = frames[0]
        if ranks == "all":
            frame = pd.concat(frames, ignore_index=True)
            frame = frame.sort_values("time", kind="stable", ignore_index=True)
        frame["time"] = pd.to_datetime(frame["time"], unit="s", utc=True)
        return frame

    def _summary_columns(self, table: PointTable) -> dict[str, array[float]]:
        at = [
            self._ranks.at(attempt, step)
            for attempt, step in zip(table.attempts, table.steps, strict=True)
        ]
        return {
            f"{name}.{statistic}": array(
                "d",
                (getattr(each[name], statistic) if name in each else math.nan for each in at),
            )
            for name in table.names
            for statistic in ("mean", "min", "max")
        }

    def plot(self, *metrics: str) -> Figure:
        """Draw metrics of rank 0 over the step, one below the other, with matplotlib.

        Parameters
        ----------
        *metrics
            Their names; all without any.

        Returns
        -------
        matplotlib.figure.Figure
            With one Axes a metric, and the range over the ranks where several reported.

        Raises
        ------
        ArgumentValueError
            If rank 0 has not reported one of them, or nothing at all.
        ConfigurationError
            If matplotlib is not installed.

        Examples
        --------
        >>> runner.history.plot("loss", "val_acc")  # doctest: +SKIP
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigurationError(
                f"history.plot() needs matplotlib: {error}. Install it, or use to_pandas()"
            ) from error
        names = [checked.text("metric", metric) for metric in metrics] or list(self.metrics)
        if not names:
            raise ArgumentValueError(
                "history.plot(): nothing was reported: call horovodrunner.metrics.report() in main"
            )
        columns = {name: self[name] for name in names if name in self.metrics}
        if missing := [name for name in names if name not in columns]:
            raise ArgumentValueError(f"history.plot(): {_unknown(missing[0], self.metrics)}")
        figure = Figure(figsize=(7, 1 + 2.2 * len(names)), layout="constrained")
        for place, (name, series) in enumerate(columns.items(), 1):
            axes = figure.add_subplot(len(columns), 1, place)
            axes.plot(*zip(*sorted(series.items()), strict=True))
            if span := self._span(name):
                axes.fill_between(*span, alpha=0.2, linewidth=0)
            axes.set_ylabel(printable(name), parse_math=False)
            axes.grid(alpha=0.3)
        axes.set_xlabel("step")
        return figure

    def _span(self, name: str) -> tuple[list[int], list[float], list[float]] | None:
        """Return steps, minima and maxima over the ranks, if they differ."""
        if self._size == 1:
            return None
        with self._lock:
            rows = sorted(
                (step, found[name].min, found[name].max)
                for step, attempt in zip(self._leader.steps, self._leader.attempts, strict=True)
                if name in (found := self._ranks.at(attempt, step))
            )
        if all(low == high for _, low, high in rows):
            return None
        first, lows, highs = zip(*rows, strict=True)
        return list(first), list(lows), list(highs)

    def __repr__(self) -> str:
        with self._lock:
            last, seen = self._leader.last, self._leader.seen
        if last is None:
            return "<History: nothing was reported>"
        shown = first_in_words(last.values)
        return f"<History: {seen} point{'s' * (seen != 1)} up to step {last.step}: {shown}>"

    def _repr_html_(self) -> str:
        """Return a table of all metrics, each with a small chart; notebooks show it."""
        names = self.metrics
        if not names:
            return html.escape(repr(self))
        head = "".join(
            f'<th style="text-align:left">{each}</th>' for each in ("metric", "last", "", "")
        )
        rows = []
        for name in names[:MAX_LISTED]:
            with self._lock:
                series = self._leader.samples(name, _SPARK_POINTS)
                extremes = self._leader.extremes(name)
            span = ""
            if extremes is not None:
                low, high = (format_value(each.values[name]) for each in extremes)
                span = f"{low} to {high}"
            rows.append(
                f"<tr><td>{html.escape(printable(name))}</td>"
                f"<td>{format_value(series[-1][1])}</td>"
                f"<td>{sparkline(series)}</td><td>{span}</td></tr>"
            )
        if len(names) > MAX_LISTED:
            rows.append(f'<tr><td colspan="4">and {len(names) - MAX_LISTED} more</td></tr>')
        caption = html.escape(repr(self).strip("<>").partition(":")[2].split(":")[0].strip())
        return (
            f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>"
        )


def sparkline(
    series: list[tuple[int, float]], width: int = _SPARK_WIDTH, height: int = _SPARK_HEIGHT
) -> str:
    """Return a small line chart as SVG; what is not finite is a gap."""
    values = [value for _, value in series if math.isfinite(value)]
    if not values:
        return ""
    largest = max(1.0, *map(abs, values))  # by which the differences are finite, too
    low, high = min(values) / largest, max(values) / largest
    steps = [step for step, _ in series]
    first, last = min(steps), max(steps)
    parts, pen = [], "M"
    for step, value in series:
        if not math.isfinite(value):
            pen = "M"
            continue
        x = (step - first) / ((last - first) or 1) * (width - 4) + 2
        y = (high - value / largest) / ((high - low) or 1) * (height - 4) + 2
        parts.append(f"{pen}{x:.1f},{y:.1f}")
        pen = "L"
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img"><path d="{" ".join(parts)}" fill="none" stroke="currentColor" '
        'stroke-width="1.5"/></svg>'
    )


def first_in_words(values: Mapping[str, float]) -> str:
    """Return numbers by name, as many as one line has place for."""
    more = len(values) - MAX_SHOWN
    text = format_logs(dict(islice(values.items(), MAX_SHOWN)))
    return f"{text} and {more} more" if more > 0 else text


def _free(name: str, taken: set[str]) -> str:
    """Return a column's name that no other column has."""
    while name in taken:
        name += "_"
    return name


def _unknown(metric: str, names: tuple[str, ...]) -> str:
    reported = cut(", ".join(map(repr, names)), _NAMES_CHARACTERS) or "nothing"
    return f"{metric!r} was not reported by rank 0, which reported {reported}"
