"""Whether the driver is a session of notebooks or prompts. Runs in: the driver."""

from __future__ import annotations

import sys

from horovodrunner.pickling.installed import is_of_a_python

__all__ = ["is_interactive", "program_arguments"]


def is_interactive() -> bool:
    """Return whether this is a notebook's kernel, IPython, or a prompt (pyspark's shell is one).

    A kernel that nbclient, papermill or a scheduler drives is one, too. Scripts, spark-submit and
    pytest are none.
    """
    if hasattr(sys, "ps1") or sys.flags.interactive:
        return True
    shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return shell is not None and shell() is not None


def program_arguments() -> list[str]:
    """Return what main is to find in ``sys.argv``: a script's or a cell's, not a kernel's."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    is_a_script = isinstance(file, str) and file.endswith(".py") and not is_of_a_python(file)
    started_with = sys.orig_argv[len(sys.orig_argv) - len(sys.argv[1:]) :]
    is_of_a_cell = is_interactive() and sys.argv[1:] != started_with
    return sys.argv if sys.argv and (is_a_script or is_of_a_cell) else sys.argv[:1] or [""]
