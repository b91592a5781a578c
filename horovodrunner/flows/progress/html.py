"""A run's area in a notebook: one piece of HTML, with neither scripts nor a network.

Runs in: the driver.
"""

from __future__ import annotations

from html import escape

from tqdm import tqdm

from horovodrunner.flows.logs.training_log import format_value
from horovodrunner.flows.metrics.history import sparkline
from horovodrunner.flows.metrics.records import Bar
from horovodrunner.flows.progress.view import FAILED, RUNNING, SUCCEEDED, RunState
from horovodrunner.formatting import printable

__all__ = ["in_html"]

MAX_METRICS = 12
MAX_RANKS = 256

_COLOURS = {RUNNING: "#1f77b4", SUCCEEDED: "#2ca02c", FAILED: "#d62728"}
_RANK_COLOURS = {
    "starting": "#b0b0b0",
    "training": "#2ca02c",
    "ended": "#1f77b4",
    "failed": "#d62728",
    "lost": "#d62728",
    "stopped": "#7f7f7f",
}
_AS_IT_SHOULD = ("training", "ended", "stopped")
_WAITING = "#ff7f0e"
_STOPPED = "#7f7f7f"


def in_html(run: RunState) -> str:
    """Return the area."""
    colour = _COLOURS.get(run.state, _STOPPED)
    state, _, rest = run.headline.partition(",")
    title = f"<b>{escape(run.title)}</b> " if run.title else ""
    parts = [
        f'<div>{title}<b style="color:{colour}">{escape(state)}</b>{escape("," + rest)}</div>',
        f'<div style="color:{colour};white-space:pre-wrap">{escape(run.cause)}</div>'
        if run.cause
        else "",
        *(_bar(bar, colour, is_running=run.state == RUNNING) for bar in run.bars),
        _ranks(run.ranks),
        _metrics(run),
    ]
    body = "".join(part for part in parts if part)
    return f'<div style="font-family:sans-serif;font-size:13px;line-height:1.6">{body}</div>'


def _bar(bar: Bar, colour: str, *, is_running: bool) -> str:
    share = min(1.0, bar.done / bar.total) if bar.total else 0.0
    seconds = max(0.0, bar.time - bar.began)
    facts = [f"{bar.done}/{bar.total} ({share:.0%})" if bar.total else f"{bar.done}"]
    if seconds and bar.done:
        rate = bar.done / seconds
        facts.append(f"{rate:.2f}/s" if rate >= 1 else f"{1 / rate:.2f} s each")
        if bar.total and bar.done <= bar.total and is_running and not bar.has_ended:
            facts.append(f"{tqdm.format_interval((bar.total - bar.done) / rate)} left")
    if bar.postfix:
        facts.append(printable(bar.postfix))
    track = (
        '<span style="display:inline-block;width:220px;height:9px;border-radius:4px;'
        'background:rgba(128,128,128,.25);vertical-align:middle;overflow:hidden">'
        f'<span style="display:block;height:9px;width:{share:.1%};background:{colour}"></span>'
        "</span>"
    )
    text = escape(", ".join(facts))
    return f"<div>{escape(printable(bar.description))} {track if bar.total else ''} {text}</div>"


def _ranks(ranks: tuple[str, ...]) -> str:
    if not ranks:
        return ""
    squares = "".join(
        f'<span title="rank {rank}: {escape(state)}" style="display:inline-block;width:10px;'
        f"height:10px;margin-right:2px;border-radius:2px;"
        f'background:{_RANK_COLOURS.get(state, _WAITING)}"></span>'
        for rank, state in enumerate(ranks[:MAX_RANKS])
    )
    odd = [f"rank {rank} {s}" for rank, s in enumerate(ranks) if s not in _AS_IT_SHOULD]
    more = f" … {len(odd) - 4} more" if len(odd) > 4 else ""
    text = escape(", ".join(odd[:4]) + more)
    return f'<div>{squares} <span style="opacity:.7">{text}</span></div>'


def _metrics(run: RunState) -> str:
    names = run.history.metrics
    rows = []
    for name in names[:MAX_METRICS]:
        series = run.history.samples(name)
        last = format_value(series[-1][1])
        rows.append(
            f'<tr><td style="text-align:left">{escape(printable(name))}</td>'
            f'<td style="text-align:right">{last}</td><td>{sparkline(series)}</td></tr>'
        )
    if not rows:
        return ""
    more = len(names) - MAX_METRICS
    note = f"<div>and {more} more in runner.history</div>" if more > 0 else ""
    body = "".join(rows)
    return f'<table style="font-size:inherit"><tbody>{body}</tbody></table>{note}'
