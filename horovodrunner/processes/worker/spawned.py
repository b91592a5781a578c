"""``__main__`` of a process that main starts without forking. Runs in: main's children.

multiprocessing executes this as ``__mp_main__``, and copies what it makes into the child's
``__main__``. Names come when the first one is asked for: many children need none.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys

from horovodrunner.placement.environment import MAIN_NAMES


def __getattr__(name: str) -> object:
    from horovodrunner.pickling.modules import load_names

    main = sys.modules["__main__"]
    load_names(main)
    if name not in vars(main):
        raise AttributeError(f"module '__main__' has no attribute {name!r}")
    return vars(main)[name]


with contextlib.suppress(KeyError, OSError), open(os.environ[MAIN_NAMES], "rb") as _file:  # noqa: PTH123
    if pickle.load(_file):  # noqa: S301 - modules beside __main__, which are imported by name
        from horovodrunner.pickling.modules import load_names

        load_names(sys.modules[__name__])
