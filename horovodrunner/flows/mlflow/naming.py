"""What a run is called and told of in MLflow: names, parameters, tags. Runs in: the driver."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from horovodrunner import validation as checked
from horovodrunner.flows.call.record import HIDDEN
from horovodrunner.flows.call.recording import looks_secret, may_be_secret
from horovodrunner.flows.metrics.scalars import Scalar
from horovodrunner.formatting import cut
from horovodrunner.wire.events import Usage

__all__ = ["bounded", "metric_name", "parameters", "scalar_name", "system_metrics"]

MAX_PARAMETERS = 100
MAX_NAME_CHARACTERS = 250
MAX_TEXT_CHARACTERS = 400
"""Of a parameter or tag, less a mark for what is cut: before MLflow 2.8 only 500 were taken."""

MAX_ITEMS = 20
_SCALARS = (bool, int, float, str)
_MAX_DEPTH = 4

_OPTIONS = "horovodrunner."


def metric_name(name: str) -> str:
    """Return a name that MLflow takes: it may have letters, digits and ``_-./: ``, as a path.

    >>> metric_name("acc@5"), metric_name("../loss")
    ('acc_5', 'loss')
    """
    path = posixpath.normpath("/" + re.sub(r"[^\w\-. /:]", "_", name)).lstrip("/")
    return path[:MAX_NAME_CHARACTERS] or "_"


def scalar_name(scalar: Scalar) -> str:
    """Return the name of a number; another rank's is below the rank's own."""
    return metric_name(f"rank-{scalar.rank}/{scalar.name}" if scalar.rank else scalar.name)


def bounded(text: str) -> str:
    """Cut what is too long for a parameter or a tag."""
    return cut(text, MAX_TEXT_CHARACTERS)


def parameters(np: int, options: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters of a run: main's plain arguments, np and the options.

    Of a dict each item is one, ``optimizer.lr``. What may be a secret is masked.
    """
    found = dict(_flat("", arguments))
    found |= _flat(_OPTIONS, {"np": np, **options})
    return dict(list(found.items())[:MAX_PARAMETERS])


def _flat(prefix: str, values: Mapping[Any, Any], depth: int = 0) -> Iterator[tuple[str, str]]:
    for key, given in values.items():
        name, value = f"{prefix}{key}", checked.plain(given)
        if isinstance(value, dict) and 0 < len(value) <= MAX_PARAMETERS and depth < _MAX_DEPTH:
            yield from _flat(f"{name}.", value, depth + 1)
        elif _is_plain(value):
            text = str(value)
            is_secret = may_be_secret(name, value) or looks_secret(text)
            yield metric_name(name), HIDDEN if is_secret else bounded(text)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= MAX_ITEMS and all(map(_is_scalar, value))
    return _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, PurePath) or type(value) in _SCALARS


def system_metrics(usage: Usage) -> Iterator[tuple[str, float]]:
    """Yield what a host uses, under the names that MLflow's own monitor has for a node."""
    prefix = f"system/{metric_name(usage.host).replace('/', '_')}/"
    yield prefix + "cpu_utilization_percentage", usage.host_cpu_percent
    yield prefix + "system_memory_usage_megabytes", usage.host_memory_used / 1e6
    if usage.host_memory_total:
        percent = 100 * usage.host_memory_used / usage.host_memory_total
        yield prefix + "system_memory_usage_percentage", percent
    for index, busy, used, total in usage.gpus:
        yield f"{prefix}gpu_{index}_utilization_percentage", busy
        yield f"{prefix}gpu_{index}_memory_usage_megabytes", used / 1e6
        if total:
            yield f"{prefix}gpu_{index}_memory_usage_percentage", 100 * used / total
