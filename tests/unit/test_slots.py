"""Slots that the settings promise, before any executor has registered."""

from __future__ import annotations

from typing import Any

import pytest

from horovodrunner import ArgumentTypeError, ArgumentValueError, ConfigurationError, HorovodRunner
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.processes.driver.resources import TaskRequest, task_request
from horovodrunner.processes.driver.slots import Holders, _expected_slots, _too_few_slots


class Session:
    """Has settings and nothing else."""

    def __init__(self, **settings: str) -> None:
        self.conf = {name.replace("_", "."): value for name, value in settings.items()}


def expected(**settings: str) -> int | None:
    session: Any = Session(**settings)
    return _expected_slots(session, task_request(session, None))


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        ({"spark_master": "local"}, 1),
        ({"spark_master": "local[3]"}, 3),
        ({"spark_master": "local[3, 5]"}, 3),  # 5 failures of a task are allowed
        ({"spark_master": "local[4]", "spark_task_cpus": "2"}, 2),
        ({"spark_master": "local-cluster[2,3,1024]"}, 6),
        ({"spark_master": "local-cluster[2,3,1024]", "spark_task_cpus": "2"}, 2),
        ({"spark_master": "local-cluster[1,4,1024]", "spark_executor_cores": "2"}, 4),
        ({"spark_master": "yarn", "spark_executor_cores": "4"}, None),
        ({"spark_master": "yarn", "spark_executor_instances": "3"}, None),
        (
            {
                "spark_master": "yarn",
                "spark_executor_instances": "3",
                "spark_executor_cores": "4",
                "spark_task_cpus": "2",
            },
            6,
        ),
    ],
)
def test_slots_from_the_master_and_the_settings(
    settings: dict[str, str], slots: int | None
) -> None:
    assert expected(**settings) == slots


@pytest.mark.parametrize(("per_task", "slots"), [("1", 4), ("2", 2), ("0.5", 8), ("0.25", 8)])
def test_gpus_limit_the_slots_of_an_executor(per_task: str, slots: int) -> None:
    settings = {
        "spark_master": "local-cluster[2,4,1024]",
        "spark_executor_resource_gpu_amount": "2",
        "spark_task_resource_gpu_amount": per_task,
    }
    assert expected(**settings) == slots


def test_an_executor_without_gpus_has_no_slot_for_a_task_that_needs_one() -> None:
    assert TaskRequest(cpus=1, gpus=1, description="").slots(cores=8, gpus=0) == 0


def test_holders_are_named_in_the_order_of_their_jobs() -> None:
    assert Holders(8, {12: 1, 3: 4}).describe() == "3 free, 4 held by job 3, 1 held by job 12"
    assert Holders(1, {3: 4}).describe() == "0 free, 4 held by job 3"  # an executor has just gone


def ranks(ranks_per_task: int | str, **settings: str) -> int:
    session: Any = Session(**settings)
    return task_request(session, None, ranks_per_task).ranks


def test_a_task_runs_as_many_ranks_as_it_owns_gpus() -> None:
    assert ranks("gpu", spark_task_resource_gpu_amount="8") == 8
    assert ranks(3, spark_task_resource_gpu_amount="8") == 3
    assert ranks(3) == 3
    with pytest.raises(ConfigurationError, match=r'ranks_per_task="gpu": a task owns no GPU here'):
        ranks("gpu")
    with pytest.raises(ConfigurationError, match=r"owns only 0\.5 of a GPU here .*amount=0\.5"):
        ranks("gpu", spark_task_resource_gpu_amount="0.5")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (0, ArgumentValueError),
        (-2, ArgumentValueError),
        ("GPU", ArgumentValueError),
        (2.5, ArgumentTypeError),
        (True, ArgumentTypeError),
        (None, ArgumentTypeError),
    ],
)
def test_what_is_no_number_of_ranks_is_refused(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="ranks_per_task="):
        HorovodRunner(np=2, ranks_per_task=given)


def test_ranks_fill_the_tasks_from_the_first_one() -> None:
    def workers(np: int, of_task: int) -> tuple[int, ...]:
        return JobSpec("r", np, b"", b"", ranks_per_task=of_task).workers

    assert workers(3, 1) == (1, 1, 1)
    assert workers(8, 4) == (4, 4)
    assert workers(9, 4) == (4, 4, 1)
    assert workers(2, 8) == (2,)


@pytest.mark.parametrize(
    ("np", "of_task", "gpus", "text"),
    [
        (8, 4, 4, ""),
        (3, 1, 2, ""),
        (6, 4, 4, "np=6 in 2 tasks: the last one runs 2 of 4, and 2 of its GPUs are idle"),
        (6, 4, 0, "np=6 in 2 tasks: the last one runs 2 of 4"),
        (3, 8, 8, "np=3 in 1 task: it runs 3 of 8, and 5 of its GPUs are idle"),
    ],
)
def test_gpus_that_no_rank_uses_are_told(np: int, of_task: int, gpus: int, text: str) -> None:
    assert TaskRequest(1, gpus, "", ranks=of_task).describe_rest(np) == text


def test_too_few_slots_are_told_in_tasks_and_ranks() -> None:
    session: Any = Session(spark_master="local-cluster[1,4,1024]")
    type(session).__module__ = "pyspark.sql.connect"  # which does not tell of its executors
    request = TaskRequest(4, 4, "spark.task.cpus=4", ranks=4)
    text = str(_too_few_slots(session, 16, 1, request))
    assert text.startswith("np=16 needs 4 task slots of 4 ranks each, and the cluster has 1 (")
    assert "a task takes spark.task.cpus=4 and runs 4 ranks" in text
