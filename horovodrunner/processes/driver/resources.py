"""What one task of a run takes of its executor. Runs in: the driver."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from horovodrunner.errors import ConfigurationError
from horovodrunner.spark.session import is_connect

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["TaskRequest", "task_request"]


@dataclass(frozen=True)
class TaskRequest:
    """What one task takes of its executor; a fraction of a GPU when tasks share one."""

    cpus: int
    gpus: float
    description: str
    profile: Any = None
    ranks: int = 1
    """How many ranks it runs."""

    def slots(self, cores: int, gpus: float) -> int:
        """Return how many tasks an executor can run at once.

        >>> TaskRequest(cpus=2, gpus=1, description="").slots(cores=8, gpus=3)
        3
        """
        slots = cores // self.cpus
        return min(slots, int(gpus / self.gpus)) if self.gpus else slots

    def tasks(self, ranks: int) -> int:
        """Return how many tasks run so many ranks.

        >>> TaskRequest(cpus=2, gpus=1, description="", ranks=4).tasks(10)
        3
        """
        return -(-ranks // self.ranks)

    def describe_tasks(self, ranks: int) -> str:
        """Describe the tasks that run so many ranks.

        >>> TaskRequest(cpus=1, gpus=4, description="", ranks=4).describe_tasks(8)
        '2 tasks of 4 ranks'
        """
        tasks = self.tasks(ranks)
        words = f"{tasks} task{'s' * (tasks != 1)}"
        return words if self.ranks == 1 else f"{words} of {self.ranks} ranks"

    def describe_rest(self, ranks: int) -> str:
        """Say what is not used where tasks and ranks do not divide; empty if they do.

        >>> TaskRequest(cpus=1, gpus=4, description="", ranks=4).describe_rest(10)
        'np=10 in 3 tasks: the last one runs 2 of 4, and 2 of its GPUs are idle'
        """
        rest = ranks % self.ranks
        if not rest:
            return ""
        tasks, idle = self.tasks(ranks), int(self.gpus) - rest
        which = "the last one" if tasks > 1 else "it"
        text = f"np={ranks} in {tasks} task{'s' * (tasks > 1)}: {which} runs {rest} of {self.ranks}"
        return text + (f", and {idle} of its GPUs are idle" if idle > 0 else "")


def task_request(
    spark: SparkSession, resources: Mapping[str, float] | None, ranks_per_task: int | str = 1
) -> TaskRequest:
    """Return what one task takes: by the session's settings, or what the run asks for.

    `ranks_per_task` may be ``"gpu"``: as many as the task owns GPUs.
    """
    request = _request(spark, resources)
    if ranks_per_task != "gpu":
        return replace(request, ranks=int(ranks_per_task))
    if request.gpus < 1:
        owns = "no GPU" if not request.gpus else f"only {request.gpus:g} of a GPU"
        raise ConfigurationError(
            f'ranks_per_task="gpu": a task owns {owns} here ({request.description}). Start the '
            "session with spark.task.resource.gpu.amount, give resources={'gpu': 8} or as many as "
            "an executor has, or give ranks_per_task a number"
        )
    return replace(request, ranks=int(request.gpus))


def _request(spark: SparkSession, resources: Mapping[str, float] | None) -> TaskRequest:
    cpus = spark.conf.get("spark.task.cpus", None) or "1"
    if resources is not None:
        return TaskRequest(
            cpus=int(resources.get("cpus", cpus)),
            gpus=float(resources.get("gpu", 0)),
            description=f"resources={dict(resources)!r}",
            profile=_profile(spark, resources),
        )
    gpus = spark.conf.get("spark.task.resource.gpu.amount", None)
    words = f"spark.task.cpus={cpus}"
    if gpus is not None:
        words += f", spark.task.resource.gpu.amount={gpus}"
    return TaskRequest(int(cpus), float(gpus or 0), words)


def _profile(spark: SparkSession, resources: Mapping[str, float]) -> Any:
    """Make a profile that asks for tasks, not for executors.

    Only these work without dynamic allocation, which barrier stages rule out: the tasks share the
    session's executors in other portions.
    """
    import pyspark
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException
    from pyspark.resource import ResourceProfileBuilder, TaskResourceRequests
    from pyspark.sql import DataFrame

    if "profile" not in inspect.signature(DataFrame.mapInArrow).parameters:
        raise _unsupported(f"pyspark {pyspark.__version__} has no way to (4.0 has)", resources)
    requests = TaskResourceRequests()
    for name, amount in resources.items():
        if name == "cpus":
            requests.cpus(int(amount))
        else:
            requests.resource(name, float(amount))
    profile = ResourceProfileBuilder().require(requests).build
    try:
        if is_connect(spark):
            profile.id  # noqa: B018 - asks the server, which can be done in this thread only
        else:
            manager = spark.sparkContext._jsc.sc().resourceProfileManager()
            manager.addResourceProfile(profile._java_resource_profile)
    except Py4JJavaError as error:
        raise _unsupported(error.java_exception.getMessage(), resources) from None
    except (PySparkException, RuntimeError) as error:
        raise _unsupported(str(error), resources) from None
    return profile


def _unsupported(why: str, resources: Mapping[str, float]) -> ConfigurationError:
    confs = ", ".join(
        f"spark.task.cpus={amount:g}"
        if name == "cpus"
        else f"spark.task.resource.{name}.amount={amount:g}"
        for name, amount in resources.items()
    )
    return ConfigurationError(
        f"resources={dict(resources)!r} asks for other resources than the session's for this run "
        f"only, and that is not possible here: {why.rstrip('.')}. Leave resources out and start "
        f"the session with {confs}"
    )
