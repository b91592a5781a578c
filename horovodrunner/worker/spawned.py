"""``__main__`` of a process that main starts without forking. Runs in: main's children.

multiprocessing executes this as ``__mp_main__``, and copies what it makes into the child's
``__main__``. Names come when the first one is asked for: many children need none.
"""

from __future__ import annotations

from horovodrunner.core.surroundings import load_names, modules_beside_main


def __getattr__(name: str) -> object:
    import sys

    main = sys.modules["__main__"]
    load_names(main)
    if name not in vars(main):
        raise AttributeError(f"module '__main__' has no attribute {name!r}")
    return vars(main)[name]


if modules_beside_main():
    import sys

    load_names(sys.modules[__name__])
