"""Slots that the settings promise, before any executor has registered."""

from __future__ import annotations

from typing import Any

import pytest

from horovodrunner.processes.driver.resources import TaskRequest, task_request
from horovodrunner.processes.driver.slots import Holders, _expected_slots


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
