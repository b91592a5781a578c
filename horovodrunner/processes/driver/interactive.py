"""Whether the driver is a session of notebooks or prompts. Runs in: the driver."""

from __future__ import annotations

import sys

__all__ = ["is_interactive"]


def is_interactive() -> bool:
    """Whether this is a notebook's kernel, IPython, or a Python prompt (pyspark's shell is one).

    A kernel that nbclient, papermill or a scheduler drives is one, too. Scripts, spark-submit and
    pytest are none.
    """
    if hasattr(sys, "ps1") or sys.flags.interactive:
        return True
    shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return shell is not None and shell() is not None
