"""Lets models of DistributedDataParallel be freed without a deadlock. Runs in: the worker.

Torch waits for the threads of a ``ProcessGroupGloo`` when it frees it. Since a thread that drops
the tensors of the last collective wants the GIL, this has to happen without the GIL: so it does
where Python's own reference is the last one, but not where that is DistributedDataParallel's
``Reducer``, after ``destroy_process_group()``. Then both may wait forever (seen with torch 2.13;
pytorch's ``torch/csrc/distributed/c10d/init.cpp`` and ``~ProcessGroupGloo``).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from typing import Any

from horovodrunner.flows.call.import_hook import after_import

__all__ = ["install"]


def install() -> None:
    """See to it that a group outlives the models that use it, once torch is imported."""
    after_import("torch.nn.parallel.distributed", _wrap)


def _wrap(module: Any) -> None:
    with contextlib.suppress(AttributeError):  # another version, which has another private name
        kind = module.DistributedDataParallel
        make_reducer = kind._ddp_init_helper

        @functools.wraps(make_reducer)
        def _ddp_init_helper(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = make_reducer(self, *args, **kwargs)
            for name in ("reducer", "logger"):  # the logger has the reducer, too
                with contextlib.suppress(AttributeError, TypeError):
                    last = weakref.finalize(getattr(self, name), _let_go_of, self.process_group)
                    last.atexit = False
            return result

        kind._ddp_init_helper = _ddp_init_helper


def _let_go_of(group: Any) -> None:
    """Free the group, if nobody else has it; its own deallocator gives up the GIL."""
