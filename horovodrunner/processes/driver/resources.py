"""What one task of a run takes of its executor. Runs in: the driver."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
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

    def slots(self, cores: int, gpus: float) -> int:
        """Return how many tasks an executor can run at once.

        >>> TaskRequest(cpus=2, gpus=1, description="").slots(cores=8, gpus=3)
        3
        """
        slots = cores // self.cpus
        return min(slots, int(gpus / self.gpus)) if self.gpus else slots


def task_request(spark: SparkSession, resources: Mapping[str, float] | None) -> TaskRequest:
    """Return what one task takes: by the session's settings, or what the run asks for."""
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
