"""Memory that ran out, and what bounds it."""

from __future__ import annotations

import resource
from typing import Any

import pytest

from horovodrunner import PredictionError
from horovodrunner.inference.inputs import InputPlan
from horovodrunner.inference.loading import ModelHandle
from horovodrunner.inference.scoring import Scoring, score
from horovodrunner.memory_limit import memory_hint
from horovodrunner.processes.task.exits import describe_exit

RAN_OUT: dict[str, Exception] = {
    "Python": MemoryError(),
    "NumPy": MemoryError("Unable to allocate 8.00 GiB for an array with shape (1073741824,)"),
    "thread": RuntimeError("can't start new thread"),
    "torch": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"),
    "torch on Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"),
    "system": OSError(12, "Cannot allocate memory"),
    "library": ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    "TensorFlow": RuntimeError("OOM when allocating tensor with shape[1024,1024]"),
}
OTHERS = [ValueError("no"), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")]


@pytest.fixture(params=["Spark's", "the system's"])
def setting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A limit of 512 MiB, which nothing here has to keep to."""
    limit = (512 * 2**20, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limit)
    if request.param == "Spark's":
        monkeypatch.setenv("PYSPARK_EXECUTOR_MEMORY_MB", "512")
        return "spark.executor.pyspark.memory allows each Python process 512 MiB"
    monkeypatch.delenv("PYSPARK_EXECUTOR_MEMORY_MB", raising=False)
    return "a limit (ulimit -v, setrlimit) allows this process 512 MiB"


@pytest.mark.parametrize("what", RAN_OUT)
def test_the_setting_is_named(setting: str, what: str) -> None:
    assert setting in memory_hint(RAN_OUT[what])
    assert [memory_hint(each) for each in OTHERS] == ["", ""]


def test_nothing_is_said_of_a_limit_that_is_none() -> None:
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert [memory_hint(each) for each in RAN_OUT.values()] == [""] * len(RAN_OUT)
    assert describe_exit(-6, "")[0] == "the worker process was ended by SIGABRT"


def test_a_process_that_aborts_says_no_more(setting: str) -> None:
    text, _, name = describe_exit(-6, "")
    assert name == "SIGABRT"
    assert setting in text


def test_scoring_names_it_too(setting: str) -> None:
    import pyarrow as pa

    def fail(_: Any) -> Any:
        raise MemoryError

    scoring = Scoring(
        model=ModelHandle.of_make_predict_fn(lambda: fail),
        target=pa.float64(),
        safe=True,
        batch_size=4,
        plan=InputPlan.of(None, "pass"),
        names=("x",),
    )
    batches = [pa.RecordBatch.from_pydict({"x": [1.0]})]
    with pytest.raises(PredictionError) as caught:
        list(score(scoring, iter(batches)))
    assert setting in str(caught.value)
