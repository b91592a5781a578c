"""A run's record as one page, which needs nothing else. Runs in: driver and command line."""

from __future__ import annotations

import html
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

from horovodrunner.flows.logs.training_log import format_logs, format_value
from horovodrunner.flows.rundir import layout
from horovodrunner.flows.rundir.charts import COLOURS, Line, line_chart, time_ticks
from horovodrunner.flows.rundir.reading import Rank, RunData, Samples, read_run
from horovodrunner.formatting import format_bytes, ranks_in_words

__all__ = ["render", "slowest_ranks", "write_report"]

MAX_ROWS = 64
"""Of ranks in a table; the slowest ones are among them."""

MAX_NUMBERS = 8
"""Of a checkpoint."""

MAX_LINES = 8
"""Of ranks in a chart; of more, the range and the mean are drawn."""

MAX_AVERAGES = 120
"""Of points of a line that shows what is used."""

WAITING_MATTERS = 0.05
"""Waiting for less than this part of main's time says nothing about who is slow."""

STEPS_DIFFER = 1.1

_STATUS = {
    "succeeded": "Succeeded",
    "failed": "Failed",
    "interrupted": "Interrupted",
    "stopped": "Stopped",
    "running": "Still running",
    "lost": "Driver lost",
}


def write_report(directory: Path) -> Path:
    """Write the report of the run in a directory, and return its path."""
    path = directory / layout.REPORT
    layout.replace_file(path, render(read_run(directory)).encode(errors="replace"))
    return path


def render(run: RunData) -> str:
    """Return the whole page."""
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    title = f"{run.facts.get('name') or run.facts.get('main', 'run')}: {_status(run).lower()}"
    sections = (
        _header(run),
        _cause(run),
        _tiles(run),
        _launch(run),
        _metrics(run),
        _ranks(run),
        _usage(run),
        _hot(run),
        _checkpoints(run),
        _output(run),
        _call(run),
        _versions(run),
        _files(run),
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_text(title)}</title><style>{style}</style>'
        f"</head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def slowest_ranks(ranks: Iterable[Rank]) -> tuple[list[int], str]:
    """Name the ranks that the others wait for, or whose steps are longest, and say why.

    Where ranks train in step, the slow one is the one that waits least.
    """
    timed = [rank for rank in ranks if rank.seconds > 0]
    if len(timed) < 2:
        return [], ""
    waits = {rank.number: rank.waited_seconds for rank in timed}
    typical, longest = statistics.median(waits.values()), max(waits.values())
    most = max(rank.seconds for rank in timed)
    if longest >= WAITING_MATTERS * most:
        slow = [number for number, seconds in waits.items() if seconds <= longest / 3]
        if slow and len(slow) <= len(timed) / 2:
            own = max(waits[number] for number in slow)
            others = statistics.median(
                waits[each.number] for each in timed if each.number not in slow
            )
            verb = "is" if len(slow) == 1 else "are"
            return slow, (
                f"{_start(ranks_in_words(slow))} {verb} slowest: the others waited for about "
                f"{_seconds(others)} in collectives, and {'it' if len(slow) == 1 else 'they'} for "
                f"{_seconds(own)}."
            )
    steps = {rank.number: rank.step_seconds for rank in timed if rank.step_seconds}
    if len(steps) > 1 and (usual := statistics.median_low(steps.values())):
        slow = [number for number, each in steps.items() if each > STEPS_DIFFER * usual]
        if slow:
            text = f"{_start(ranks_in_words(slow))} had the longest steps: up to "
            worst = max(steps[number] for number in slow)
            return slow, f"{text}{_seconds(worst)}, where the median is {_seconds(usual)}."
    return [], f"No rank stands out; each waited for about {_seconds(typical)} in collectives."


def _header(run: RunData) -> str:
    verb = {"running": "last sign of life", "lost": "last sign of life"}.get(run.status, "ended")
    size = len(run.ranks) or abs(int(run.facts.get("np") or 0))
    hosts = len({rank.host for rank in run.ranks.values() if rank.host})
    where = f" on {_count(hosts, 'host')}" if hosts else ""
    main, name = run.facts.get("main", "a run"), run.facts.get("name")
    title = f"{name} · {main}" if name else main
    return (
        f'<header class="{run.status}"><h1>{_text(title)}</h1>'
        f'<div><span class="status">{_status(run)}</span> · {_count(size, "rank")}{where} · '
        f"began {_when(run.began)}, {verb} {_when(run.ended)}</div>"
        f'<div class="muted small">run {_text(run.facts.get("run_id", ""))}</div></header>'
    )


def _cause(run: RunData) -> str:
    if run.status == "lost":
        last = _attempts(run)
        return _section(
            "Cause",
            '<p class="first">The driver’s process ended without a word, or its machine did: this '
            "record has no outcome.</p>"
            f"<p>All that is below was written before {_when(run.ended)}.</p>{last}",
            kind="cause",
        )
    error = _dict(_dict(run.facts.get("outcome")).get("error"))
    if not error:
        return _section("Attempts", text) if (text := _attempts(run)) else ""
    text = str(error.get("text", ""))
    first = f"{text.partition(chr(10))[0]}" or str(error.get("type", ""))
    parts = [f'<p class="first">{_text(error.get("type", ""))}: {_text(first)}</p>']
    if lines := str(error.get("traceback", "")).rstrip():
        title = "Traceback of the rank" if error.get("rank") is not None else "Traceback"
        parts.append(f"<h3>{title}</h3><pre>{_text(lines)}</pre>")
    if lines := str(error.get("last_lines", "")):
        parts.append(f"<h3>Its last lines of standard error</h3><pre>{_text(lines)}</pre>")
    if after := error.get("consequences"):
        items = "".join(f"<li>{_text(each)}</li>" for each in after)
        parts.append(f"<details><summary>After that</summary><ul>{items}</ul></details>")
    return _section("Cause", "".join(parts) + _attempts(run), kind="cause")


def _attempts(run: RunData) -> str:
    attempts = [each for each in run.facts.get("attempts") or () if isinstance(each, dict)]
    if len(attempts) < 2:
        return ""
    rows = [
        [
            _text(each.get("number")),
            _when(each.get("began")),
            _text(str(each.get("cause", "")).partition("\n")[0] or "–"),
        ]
        for each in attempts
    ]
    return f"<h3>{len(attempts)} attempts</h3>" + _table(["attempt", "began", "ended by"], rows)


def _tiles(run: RunData) -> str:
    tiles = [(_seconds(max(0.0, run.ended - run.began)), "in all")]
    if 0 in run.ranks and (bar := run.ranks[0].bar):
        of = "" if bar[2] is None else f" / {bar[2]:,}"
        tiles.append((f"{bar[1]:,}{of}", bar[0] or "progress of rank 0"))
    elif 0 in run.ranks and run.ranks[0].last_step is not None:
        tiles.append((f"{run.ranks[0].last_step:,}", "last step of rank 0"))
    steps = [rank.step_seconds for rank in run.ranks.values() if rank.step_seconds]
    if steps:
        tiles.append((_seconds(statistics.median(steps)), "a step, median"))
    for name, metric in list(run.metrics.items())[:4]:
        tiles.append((format_value(metric.last), f"{name}, last"))
    peak = max((rank.peak_memory for rank in run.ranks.values()), default=0)
    if peak:
        tiles.append((format_bytes(peak), "most memory of a rank"))
    if saved := run.facts.get("checkpoints"):
        tiles.append((str(len(saved)), "checkpoint" + "s" * (len(saved) > 1)))
    cells = (
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(name)}</span></div>'
        for value, name in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _launch(run: RunData) -> str:
    phases = [
        (str(each[0]), float(each[1]), float(each[2]), each[3])
        for each in run.facts.get("phases") or ()
        if isinstance(each, list) and len(each) == 4
    ]
    if not phases:
        text = "The phases are known when the run has ended."
        if placed := run.facts.get("placed"):
            text = f"The ranks were placed {_seconds(placed - run.began)} after the run’s begin."
        return _section("Launch", f'<p class="muted">{text}</p>')
    begins = [began for name, began, _, _ in phases if name == "main"]
    launched = min(begins, default=max(ended for _, _, ended, _ in phases))
    width = max(launched - run.began, 0.001)
    rows = []
    for name, began, ended, last in phases:
        start = 100 * min(1.0, max(0.0, (began - run.began) / width))
        stop = 100 * min(1.0, max(0.0, (ended - run.began) / width))
        late = name in ("main", "outcome back")
        bar = f'<i class="work" style="left:{start:.2f}%;width:{stop - start:.2f}%"></i>'
        rows.append(
            [
                _text(name)
                + ("" if last is None else f' <span class="muted">rank {last} last</span>'),
                "" if late else f'<div class="bar">{bar}</div>',
                _seconds(ended - began),
            ]
        )
    return _section(
        "Launch",
        f"<p>main began {_seconds(launched - run.began)} after <code>run()</code>; the bars are "
        "that time.</p>" + _table(["phase", "", "took"], rows, numbers={2}, wide={1}),
    )


def _metrics(run: RunData) -> str:
    charts = []
    for name, metric in run.metrics.items():
        band = [row for row in metric.span.rows if row[1] != row[2]]
        values = metric.values.column(1)
        chart = line_chart(
            [Line("rank 0", values, 0, band)],
            title=f"{name} by step",
            x_text=_plain,
            y_text=_plain,
        )
        low, high = format_value(metric.lowest), format_value(metric.highest)
        text = f"last {format_value(metric.last)}"
        if metric.lowest <= metric.highest:
            text += f", from {low} to {high}"
        if metric.odd:
            text += f"; {_count(metric.odd, 'value')} NaN or infinite"
        if band:
            text += "; the band is the range over the ranks"
        charts.append(_figure(name, chart, text))
    if not charts:
        return ""
    return _section("Metrics", f'<div class="charts">{"".join(charts)}</div>')


def _ranks(run: RunData) -> str:
    ranks = sorted(run.ranks.values(), key=lambda rank: rank.number)
    if not ranks:
        return ""
    slow, text = slowest_ranks(ranks)
    shown = ranks
    if len(ranks) > MAX_ROWS:
        first = [*slow, *(rank.number for rank in ranks)][:MAX_ROWS]
        shown = [rank for rank in ranks if rank.number in first]
        text += f" {len(shown)} of {len(ranks)} ranks are listed."
    longest = max((rank.seconds for rank in ranks), default=0.0)
    short = _short_names({rank.host for rank in ranks})
    rows = [_rank_row(rank, short[rank.host], longest) for rank in shown]
    may_wait = sorted({name for rank in ranks for name in rank.may_have_waited})
    note = (
        '<span class="legend"><span><i class="c0"></i>main’s own time</span>'
        '<span><i class="c1"></i>waiting in collectives</span></span>'
        '<p class="small muted">Waiting is estimated from one look a second'
        + (
            f"; {_text(', '.join(may_wait))} may compute or wait, and counts as own time"
            if may_wait
            else ""
        )
        + ".</p>"
    )
    columns = [
        "rank",
        "host",
        "main",
        "own",
        "waited",
        "step",
        "95 %",
        "cores",
        "memory",
        "last step",
    ]
    return _section(
        "Ranks",
        f"<p>{_text(text)}</p>{note}"
        + _table(
            columns,
            rows,
            numbers=set(range(3, 10)),
            wide={2},
            marked={place for place, rank in enumerate(shown) if rank.number in slow},
        ),
    )


def _rank_row(rank: Rank, host: str, longest: float) -> list[str]:
    waited = min(rank.waited_seconds, rank.seconds)
    own = rank.seconds - waited
    scale = 100 / longest if longest else 0.0
    bar = (
        f'<div class="bar"><i class="work" style="left:0;width:{own * scale:.2f}%"></i>'
        + (
            f'<i class="wait" style="left:{own * scale:.2f}%;width:{waited * scale:.2f}%"></i>'
            if waited
            else ""
        )
        + "</div>"
        if rank.seconds
        else '<span class="muted">–</span>'
    )
    in_which = ", ".join(f"{name} {_seconds(each)}" for name, each in rank.waited.items())
    return [
        str(rank.number),
        f'<span title="{_text(rank.host)}">{_text(host)}</span>',
        bar,
        _seconds(own) if rank.seconds else "–",
        f'<span title="{_text(in_which)}">{_seconds(waited)}</span>' if rank.seconds else "–",
        "–" if rank.step_seconds is None else _seconds(rank.step_seconds),
        "–" if rank.step_p95 is None else _seconds(rank.step_p95),
        f"{rank.cpu_sum / rank.cpu_count / 100:.1f}" if rank.cpu_count else "–",
        format_bytes(rank.peak_memory) if rank.peak_memory else "–",
        "–" if rank.last_step is None else f"{rank.last_step:,}",
    ]


def _usage(run: RunData) -> str:
    ranks = [rank for rank in sorted(run.ranks.values(), key=lambda r: r.number) if rank.usage.rows]
    of_ranks = [(f"rank {rank.number}", rank.usage) for rank in ranks]
    short = _short_names(run.hosts)
    of_hosts = [(short[host], each) for host, each in sorted(run.hosts.items())]
    of_gpus = [
        (f"{short[host]} GPU {number}", each) for (host, number), each in sorted(run.gpus.items())
    ]
    began = run.began
    charts = [
        _use("Memory of the ranks", of_ranks, 2, began, "resident, of each rank’s processes"),
        _use(
            "Cores in use by the ranks",
            of_ranks,
            1,
            began,
            "1 is one core all the time",
            factor=0.01,
        ),
        _use("Processors of the hosts", of_hosts, 1, began, "per cent of all cores"),
        _use("Memory of the hosts", of_hosts, 2, began, "in use"),
        _use("GPUs", of_gpus, 1, began, "per cent of the time in use"),
        _use("Memory of the GPUs", of_gpus, 2, began, "in use"),
    ]
    if not any(charts):
        text = "Nothing was measured: the ranks ended within a second, or never began."
        return _section("Processors and memory", f'<p class="muted">{text}</p>')
    return _section("Processors and memory", f'<div class="charts">{"".join(charts)}</div>')


def _use(
    title: str,
    named: Sequence[tuple[str, Samples]],
    column: int,
    began: float,
    text: str,
    *,
    factor: float | None = None,
) -> str:
    """Draw one column of several samples over the time since `began`: percent, or bytes."""
    if not named:
        return ""
    top = 100.0 if factor is None else None
    y_text: Callable[[float], str] = _percent
    if factor is not None:
        y_text = _plain
    elif column == 2:
        rows = [row for _, samples in named for row in samples.rows]
        top = max((row[3] for row in rows if len(row) > 3), default=None)
        if top:
            text += f", of {format_bytes(int(top))}"
        unit, factor = _unit(top or max(row[2] for row in rows))
        top = None if top is None else top * factor
        y_text = _in(unit)
    series = [
        (name, [(at - began, value * (factor or 1.0)) for at, value in samples.column(column)])
        for name, samples in named
    ]
    lines = _few(series)
    chart = line_chart(
        lines,
        title=title,
        x_text=_clock,
        y_text=y_text,
        y_from=0.0,
        y_to=top,
        x_ticks=time_ticks,
    )
    names = [(line.name, line.colour) for line in lines] if len(named) > 1 else []
    return _figure(title, chart, text, names)


def _short_names(hosts: Iterable[str]) -> dict[str, str]:
    """Return the first part of each host's name, if that tells them apart."""
    names = {host: host.partition(".")[0] for host in hosts}
    is_clear = len(set(names.values())) == len(names) and not any(
        name.isdecimal() or not name for name in names.values()
    )
    return names if is_clear else {host: host for host in names}


def _averages(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return so few points that lines beside each other can be told apart."""
    every = math.ceil(len(points) / MAX_AVERAGES)
    if every < 2:
        return points
    boxes = [points[place : place + every] for place in range(0, len(points), every)]
    return [
        (statistics.fmean(at for at, _ in box), statistics.fmean(value for _, value in box))
        for box in boxes
    ]


def _unit(most: float) -> tuple[str, float]:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if most >= 2**power:
            return unit, 2.0**-power
    return "bytes", 1.0


def _in(unit: str) -> Callable[[float], str]:
    return lambda value: f"{value:g} {unit}"


def _few(named: Sequence[tuple[str, list[tuple[float, float]]]]) -> list[Line]:
    """Return a line each, or the mean and the range of too many."""
    if len(named) <= MAX_LINES:
        return [
            Line(name, _averages(points), place % COLOURS)
            for place, (name, points) in enumerate(named)
        ]
    first = min(points[0][0] for _, points in named)
    last = max(points[-1][0] for _, points in named)
    width = max((last - first) / 200, 10.0)
    boxes: dict[int, list[float]] = {}
    for _, points in named:
        for at, value in points:
            if math.isfinite(value):
                boxes.setdefault(int((at - first) / width), []).append(value)
    rows = [(first + (box + 0.5) * width, values) for box, values in sorted(boxes.items())]
    mean = [(at, statistics.fmean(values)) for at, values in rows]
    band = [(at, min(values), max(values)) for at, values in rows]
    return [Line(f"mean and range of {len(named)}", mean, 0, band)]


def _hot(run: RunData) -> str:
    parts: list[str] = []
    slow, _ = slowest_ranks(run.ranks.values())
    order = sorted(run.ranks.values(), key=lambda rank: (rank.number not in slow, rank.number))
    for rank in [rank for rank in order if rank.hot][:4]:
        total = sum(seconds for _, seconds in rank.hot)
        rows = [
            [
                f"<code>{_text(place)}</code>",
                f'<div class="bar"><i class="work" style="left:0;width:{100 * each / total:.1f}%">'
                "</i></div>",
                _seconds(each),
            ]
            for place, each in rank.hot
            if total
        ]
        name = layout.stacks_of(rank.number)
        parts.append(
            f"<details{' open' if not parts else ''}><summary>rank {rank.number}</summary>"
            + _table(["where", "", "seen for"], rows, numbers={2}, wide={1}, texts={0})
            + f'<p class="small muted">All stacks: <a href="{name}">{name}</a>, for '
            "speedscope.app.</p></details>"
        )
    if not parts:
        return ""
    return _section("Where main’s time went", "".join(parts))


def _checkpoints(run: RunData) -> str:
    saved = [each for each in run.facts.get("checkpoints") or () if isinstance(each, dict)]
    if not saved:
        return ""
    best = [each for each in saved[:-MAX_ROWS] if each.get("is_best")]
    rows = [
        [
            f"{each.get('step')}",
            _when(each.get("time")),
            format_bytes(int(each.get("size") or 0)),
            ("<b>best:</b> " if each.get("is_best") else "") + _numbers_of(each),
            _text(each.get("path", "")) + ("" if each.get("is_kept", True) else " (deleted since)"),
        ]
        for each in [*best, *saved[-MAX_ROWS:]]
    ]
    columns = ["step", "saved", "size", "metrics", "where"]
    return _section("Checkpoints", _table(columns, rows, numbers={0, 2}, texts={3, 4}))


def _numbers_of(saved: Mapping[str, Any]) -> str:
    numbers = [*_dict(saved.get("metrics")).items()]
    return _text(format_logs(dict(numbers[:MAX_NUMBERS]))) + (
        f" and {len(numbers) - MAX_NUMBERS} more" if len(numbers) > MAX_NUMBERS else ""
    )


def _output(run: RunData) -> str:
    parts: list[str] = []
    failed = _dict(_dict(run.facts.get("outcome")).get("error")).get("rank")
    tails = [rank for rank in run.ranks.values() if rank.tail]
    for rank in sorted(tails, key=lambda each: (each.number != failed, each.number)):
        name = layout.output_of(rank.number)
        parts.append(
            f"<details{' open' if not parts else ''}><summary>rank {rank.number}, last lines"
            f'</summary><pre>{_text(rank.tail)}</pre><p class="small muted">All of it: '
            f'<a href="{name}">{name}</a></p></details>'
        )
    if run.log:
        lines = _text(run.log)
        parts.append(f"<details><summary>the run itself</summary><pre>{lines}</pre></details>")
    return _section("Output", "".join(parts)) if parts else ""


def _call(run: RunData) -> str:
    parts = [
        f"<h3>{title}</h3>" + _table(["", ""], _rows(values), texts={1})
        for title, values in (
            ("Arguments of main", _dict(run.facts.get("arguments"))),
            (
                "Options of HorovodRunner",
                {"np": run.facts.get("np"), **_dict(run.facts.get("options"))},
            ),
            ("Variables that reach the ranks", _dict(run.facts.get("environment"))),
        )
        if values
    ]
    return _section("Call", "".join(parts))


def _versions(run: RunData) -> str:
    facts = {
        **_dict(run.facts.get("cluster")),
        **{f"driver: {name}": each for name, each in _dict(run.facts.get("driver")).items()},
        **_dict(run.facts.get("versions")),
    }
    return _section("Cluster and versions", _table(["", ""], _rows(facts), texts={1}))


def _files(run: RunData) -> str:
    rows = [
        [f'<a href="{html.escape(name, quote=True)}">{_text(name)}</a>', format_bytes(size)]
        for name, size in run.files[:200]
    ]
    more = len(run.files) - len(rows)
    text = f'<p class="muted">and {more} more</p>' if more > 0 else ""
    version = _dict(run.facts.get("versions")).get("horovodrunner", "")
    return (
        _section("Files beside this page", _table(["", ""], rows, numbers={1}, texts={0}) + text)
        + f"<footer>Written by horovodrunner {_text(version)} at {_when(time.time())}.</footer>"
    )


def _section(title: str, content: str, kind: str = "") -> str:
    name = "".join(
        each for each in title.lower().replace(" ", "-") if each.isalnum() or each == "-"
    )
    return f'<section id="{name}" class="{kind}"><h2>{title}</h2>{content}</section>'


def _figure(title: str, chart: str, text: str, names: Sequence[tuple[str, int]] = ()) -> str:
    legend = "".join(
        f'<span><i class="c{colour}"></i>{_text(name)}</span>' for name, colour in names
    )
    drawn = chart or '<p class="muted">nothing to draw</p>'
    return (
        f"<figure><h3>{_text(title)}</h3>{drawn}<figcaption>{_text(text)}</figcaption>"
        + (f'<div class="legend">{legend}</div>' if legend else "")
        + "</figure>"
    )


def _table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: set[int] = frozenset(),  # type: ignore[assignment]
    wide: set[int] = frozenset(),  # type: ignore[assignment]
    texts: set[int] = frozenset(),  # type: ignore[assignment]
    marked: set[int] = frozenset(),  # type: ignore[assignment]
) -> str:
    """Return a table; the cells are HTML already."""

    def kind(column: int) -> str:
        names = {"number": numbers, "wide": wide, "text": texts}
        found = " ".join(name for name, columns in names.items() if column in columns)
        return f' class="{found}"' if found else ""

    head = ""
    if any(columns):
        cells = "".join(f"<th{kind(place)}>{each}</th>" for place, each in enumerate(columns))
        head = f"<thead><tr>{cells}</tr></thead>"
    body = "".join(
        f"<tr{' class=slow' if place in marked else ''}>"
        + "".join(f"<td{kind(column)}>{cell}</td>" for column, cell in enumerate(row))
        + "</tr>"
        for place, row in enumerate(rows)
    )
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _rows(values: Mapping[str, Any]) -> list[list[str]]:
    return [[_text(name), _text(value)] for name, value in values.items()]


def _status(run: RunData) -> str:
    return _STATUS.get(run.status, run.status)


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _start(text: str) -> str:
    return text[:1].upper() + text[1:]


def _when(at: Any) -> str:
    if not isinstance(at, (int, float)) or at <= 0:
        return "–"
    return f"{datetime.fromtimestamp(at, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"


def _seconds(seconds: float) -> str:
    """Return a time span in a unit that fits.

    >>> [_seconds(each) for each in (0.0042, 0.25, 12.3, 125.0, 7300.0, 200000.0)]
    ['4.2 ms', '0.25 s', '12.3 s', '2 min 5 s', '2 h 1 min', '2 d 7 h']
    """
    if seconds < 0.1:
        return f"{1000 * seconds:.3g} ms" if seconds > 0 else "0 s"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:g} s"
    if whole % 3600 == 0:
        return f"{whole // 3600} h"
    if whole % 60 == 0 and whole < 7200:
        return f"{whole // 60} min"
    if whole < 7200:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600} h {whole % 3600 // 60:02}"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _percent(value: float) -> str:
    return f"{value:g} %"
