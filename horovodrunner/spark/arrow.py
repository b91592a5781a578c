"""What PySpark warns of and does not concern the user. Runs in: the driver."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["close_sockets", "map_in_arrow"]


def map_in_arrow(df: Any, function: Callable[..., Any], schema: Any, **options: Any) -> Any:
    """Return ``df.mapInArrow(function, schema, **options)``.

    PySpark 4.2 and 4.3 warn of pandas 3 wherever a function is sent, even here, where it uses no
    pandas; with ``-W error`` a run would end.
    """
    close_sockets()
    with warnings.catch_warnings():
        message = "PySpark does not yet fully support pandas"
        warnings.filterwarnings("ignore", message, FutureWarning)
        return df.mapInArrow(function, schema, **options)


def close_sockets() -> None:
    """Let PySpark close the sockets over which rows come to the driver, as 4.3 does by itself.

    Earlier ones leave them to the garbage collector, which warns (ResourceWarning): with
    ``-W error`` every test that collects rows would fail.
    """
    for name in ("pyspark.util", "pyspark.rdd"):  # from 4.0 on; before
        names = vars(sys.modules.get(name, object))
        create, load = names.get("_create_local_socket"), names.get("_load_from_socket")
        if create is None or create.__module__ != name or hasattr(load, "__wrapped__"):
            continue
        connect = names["local_connect_and_auth"]
        if not hasattr(connect, "__wrapped__"):  # else that is ours
            setattr(sys.modules[name], connect.__name__, _closing(connect))


def _closing(connect: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(connect)
    def connect_and_close(*args: Any, **kwargs: Any) -> Any:
        file, socket = connect(*args, **kwargs)
        socket.close()  # as soon as the file is closed
        return file, socket

    return connect_and_close
