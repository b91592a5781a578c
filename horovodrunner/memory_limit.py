"""What bounds a process's memory, when memory ran out. Runs in: the task and the worker."""

from __future__ import annotations

import os
import re
import resource

__all__ = ["address_space_limit", "memory_hint"]

_SPARKS_VARIABLE = "PYSPARK_EXECUTOR_MEMORY_MB"
"""Spark's Python worker sets its limit from this; its children inherit both."""

_RAN_OUT = re.compile(
    r"can't start new thread|[Cc]annot allocate memory|can't allocate memory|not enough memory"
    r"|bad_alloc|failed to map segment|Unable to allocate|OOM when allocating|\[Errno 12\]"
)


def address_space_limit() -> str:
    """Return how much memory this process may have, and what to do about it; "" if unlimited."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return ""
    size = f"{limit / 2**20:,.0f} MiB"
    if os.environ.get(_SPARKS_VARIABLE, "-1") != "-1":
        return (
            f"spark.executor.pyspark.memory allows each Python process {size} of address space "
            "(RLIMIT_AS), ranks included: raise it (frameworks need several GiB), or leave it "
            "out"
        )
    return (
        f"a limit (ulimit -v, setrlimit) allows this process {size} of address space (RLIMIT_AS): "
        "raise it where the driver or the executor is started, frameworks need several GiB"
    )


def memory_hint(error: BaseException) -> str:
    """Return what to add to an error's text: the limit, if memory ran out and there is one."""
    text = str(error)
    if "CUDA" in text or not (isinstance(error, MemoryError) or _RAN_OUT.search(text)):
        return ""
    limit = address_space_limit()
    return f" ({limit})" if limit else ""
