"""Reports on the driver what does nothing in main, or not what it seems to. Runs in: the worker.

Other libraries have things that work on the driver only, find peers only where a launcher of their
own started them, or ignore an argument with a warning in a log that nobody reads. What is known of
that is listed in `_BEFORE_CALLS`; it is watched once the library is imported, and reported once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from operator import attrgetter
from types import FrameType, ModuleType
from typing import Any

from horovodrunner.flows.call.import_hook import after_import
from horovodrunner.pickling.installed import is_of_a_python
from horovodrunner.placement.environment import TF_CONFIG
from horovodrunner.processes.worker.context import notice
from horovodrunner.processes.worker.endless import refuse_without_end

__all__ = ["install", "watch"]

_LIBRARIES = frozenset(
    {"horovod", "horovodrunner", "importlib", "jax", "keras", "pyspark", "tensorflow", "tf_keras"}
)
"""Packages that are not where it happens."""


def install() -> None:
    """Watch what main is going to import."""
    for name in _BEFORE_CALLS:
        after_import(name, watch)
    after_import("keras.src.optimizers.base_optimizer", _watch_keras_3_lr)
    after_import("mpi4py.MPI", _watch_mpi)
    after_import("pyspark.taskcontext", _watch_task_context)


def watch(module: Any) -> None:
    """Look at the arguments of some functions of a module, each time before they are called."""
    functions, look = _BEFORE_CALLS[module.__name__]
    for path in functions.split():
        owner, _, name = path.rpartition(".")
        holder = attrgetter(owner)(module) if owner else module
        if (original := getattr(holder, name, None)) is not None:  # else another version
            setattr(holder, name, _watched(original, look))


def _watched(original: Callable[..., Any], look: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        look(*args, **kwargs)
        return original(*args, **kwargs)

    return watched


def _users_frame() -> FrameType:
    """Return the innermost frame that is none of those libraries'."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = str(frame.f_globals.get("__name__"))
        if name.partition(".")[0] not in _LIBRARIES:
            break
        frame = frame.f_back
    return frame


def _where() -> str:
    """Return the line of the user's that is being executed, in brackets."""
    frame = _users_frame()
    return f"({frame.f_code.co_filename}:{frame.f_lineno})"


def _is_alone() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1"


def _accumulator(accumulator: Any, term: Any) -> None:
    if getattr(accumulator, "_deserialized", False):  # else this process made it
        notice(
            "accumulator",
            f"main adds to an accumulator of Spark {_where()}, and the driver's stays as it "
            "is: a rank is no task of Spark's. Return the number from main, summed over the "
            "ranks by hvd.allreduce",
        )


def _spark_session(*args: Any, **kwargs: Any) -> None:
    notice(
        "spark session",
        f"main starts a Spark session of its own on rank {os.environ.get('RANK')} "
        f"{_where()}, local unless it names another master: it has neither the executors nor "
        "the views and settings of the driver's session. Read DataFrames on the driver "
        "(horovodrunner.data.from_dataframe), or let main read the files themselves",
    )


def _watch_task_context(module: Any) -> None:
    get = module.TaskContext.get

    def watched(cls: Any) -> Any:
        found = get() if cls is module.TaskContext else get.__func__(cls)
        caller = sys._getframe(1)
        # Libraries that are installed, such as MLflow, ask and are prepared for None.
        installed = is_of_a_python(caller.f_code.co_filename)
        is_spark = str(caller.f_globals.get("__name__")).startswith("pyspark.")
        if found is None and not installed and not is_spark:
            notice(
                "task context",
                f"TaskContext.get() is None in main {_where()}: a rank is a process beside "
                "Spark's task. Its number is hvd.rank(), or os.environ['RANK']",
            )
        return found

    module.TaskContext.get = classmethod(functools.wraps(get.__func__)(watched))


def _watch_mpi(module: Any) -> None:
    def look() -> None:
        code = _users_frame().f_code
        if code.co_name == "<module>" and is_of_a_python(code.co_filename):
            return  # h5py imports it because it was built with it, and need not use it
        notice(
            "mpi4py",
            f"MPI.COMM_WORLD has size {module.COMM_WORLD.Get_size()} on each of the "
            f"{os.environ['WORLD_SIZE']} ranks {_where()}: no mpirun has started them, so "
            "mpi4py's barriers and reductions do nothing. Use hvd.barrier(), hvd.allreduce() or "
            "torch.distributed",
        )

    class Watched(ModuleType):
        def __getattribute__(self, name: str) -> Any:
            if name == "MPI":  # later imports of it only look here
                look()
            return super().__getattribute__(name)

    if not _is_alone():
        look()
        sys.modules["mpi4py"].__class__ = Watched


def _jax_processes(*args: Any, **kwargs: Any) -> None:
    if sys.modules["jax"].process_count() == 1 and not _is_alone():
        notice(
            "jax",
            f"jax.process_count() is 1 on each of the {os.environ['WORLD_SIZE']} ranks "
            f"{_where()}, so what waits for other processes does nothing. Call "
            "jax.distributed.initialize(coordinator_address, num_processes, process_id) first "
            "(MASTER_ADDR and MASTER_PORT, WORLD_SIZE and RANK have the values)",
        )


def _tensorflow_workers(_: Any, cluster_resolver: Any = None, devices: Any = None) -> None:
    if not devices and TF_CONFIG not in os.environ and not _is_alone():
        notice(
            "multi-worker",
            f"MultiWorkerMirroredStrategy sees one worker on each of the "
            f"{os.environ['WORLD_SIZE']} ranks {_where()}, so each trains by itself: there is "
            "no TF_CONFIG. HorovodRunner(np=..., tf_config=True) sets it",
        )


def _mlflow_digest(_: Any, dataset: Any, targets: Any = None) -> None:
    refuse_without_end(dataset, targets)  # which autologging logs, and goes on


def _picture(action: str) -> None:
    notice(
        "picture",
        f"main {action} {_where()}, and no picture of a rank's reaches the notebook, only text: "
        "return the numbers and plot them there, or save a file (savefig) where you can read it",
    )


def _shown_figures(*args: Any, **kwargs: Any) -> None:
    pyplot: Any = sys.modules["matplotlib.pyplot"]
    if pyplot.get_fignums() and not pyplot.gcf().canvas.required_interactive_framework:
        _picture("calls plt.show()")


def _displayed_pictures(*objects: Any, **kwargs: Any) -> None:
    # figures, and the images of Pillow and IPython
    if any(hasattr(each, "savefig") or hasattr(each, "_repr_png_") for each in objects):
        _picture("calls display()")


def _ignored(optimizer: Any, argument: str, value: Any, instead: str) -> None:
    name = type(optimizer).__name__
    notice(
        f"{name} {argument}",
        f"{name} of this Keras ignores {argument}={value!r} {_where()}: {instead}",
    )


def _keras_2_lr(optimizer: Any, kwargs: dict[str, Any]) -> None:
    if "lr" in kwargs:
        instead = (
            "its learning rate is that of learning_rate=, or its default. Write learning_rate="
        )
        _ignored(optimizer, "lr", kwargs["lr"], instead)


def _keras_3_decay(optimizer: Any, *_: Any, **kwargs: Any) -> None:
    if kwargs.get("decay") is not None:
        instead = (
            "the learning rate stays as it is. Pass a schedule as learning_rate "
            "(keras.optimizers.schedules.InverseTimeDecay)"
        )
        _ignored(optimizer, "decay", kwargs["decay"], instead)


def _watch_keras_3_lr(module: Any) -> None:
    def set_lr(optimizer: Any, value: Any) -> None:
        _ignored(optimizer, "lr", value, "assign to its learning_rate")
        optimizer.__dict__["lr"] = value

    def get_lr(optimizer: Any) -> Any:
        if "lr" in optimizer.__dict__:
            return optimizer.__dict__["lr"]
        raise AttributeError(f"{type(optimizer).__name__!r} object has no attribute 'lr'")

    if not hasattr(module.BaseOptimizer, "lr"):
        module.BaseOptimizer.lr = property(get_lr, set_lr)


_BEFORE_CALLS: dict[str, tuple[str, Callable[..., None]]] = {
    "IPython.core.display_functions": ("display", _displayed_pictures),
    "jax.experimental.multihost_utils": (
        "sync_global_devices broadcast_one_to_all process_allgather",
        _jax_processes,
    ),
    "keras.src.optimizers.base_optimizer": ("BaseOptimizer.__init__", _keras_3_decay),
    "matplotlib.pyplot": ("show", _shown_figures),
    "mlflow.data.tensorflow_dataset": (
        "TensorFlowDataset._compute_tensorflow_dataset_digest",
        _mlflow_digest,
    ),
    "pyspark.accumulators": ("Accumulator.add", _accumulator),
    "pyspark.java_gateway": ("launch_gateway", _spark_session),
    "tensorflow.python.distribute.collective_all_reduce_strategy": (
        "CollectiveAllReduceExtended._initialize_local",
        _tensorflow_workers,
    ),
    "tf_keras.src.optimizers.optimizer": ("_BaseOptimizer._process_kwargs", _keras_2_lr),
}
"""By module: functions of it, and what looks at their arguments before each call."""
