"""``DataFrame.mapInArrow`` without a warning that concerns nobody. Runs in: the driver."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["map_in_arrow"]


def map_in_arrow(df: Any, function: Callable[..., Any], schema: Any, **options: Any) -> Any:
    """Return ``df.mapInArrow(function, schema, **options)``.

    PySpark 4.2 and 4.3 warn of pandas 3 wherever a function is sent, even here, where it uses no
    pandas; with ``-W error`` a run would end.
    """
    with warnings.catch_warnings():
        message = "PySpark does not yet fully support pandas"
        warnings.filterwarnings("ignore", message, FutureWarning)
        return df.mapInArrow(function, schema, **options)
