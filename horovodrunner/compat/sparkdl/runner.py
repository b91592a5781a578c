"""HorovodRunner with exactly the documented signatures. Runs in: the driver."""

from typing import TYPE_CHECKING

import horovodrunner
from horovodrunner.usage import explained, wrong_options, wrong_run

__all__ = ["HorovodRunner"]


class HorovodRunner(horovodrunner.HorovodRunner):
    """Runs a training function on every rank of a Horovod job, on Spark or on this machine.

    As :class:`horovodrunner.HorovodRunner`, which has more options and describes these.
    """

    # Code looks at these signatures, which have no annotations; type checkers see some.
    if TYPE_CHECKING:

        def __init__(self, *, np: int, driver_log_verbosity: str = "log_callback_only") -> None: ...

    else:

        @explained(wrong_options)
        def __init__(self, *, np, driver_log_verbosity="log_callback_only"):
            super().__init__(np=np, driver_log_verbosity=driver_log_verbosity)

        @explained(wrong_run)
        def run(self, /, main, **kwargs):
            """Run ``main(**kwargs)`` once on every rank and return what rank 0 returned."""
            __tracebackhide__ = True
            return self._run(self._function(main, kwargs))
