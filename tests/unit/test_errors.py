"""The public error tree."""

import inspect
import pickle

import pytest

import horovodrunner
from horovodrunner import errors

TREE = [value for value in vars(errors).values() if inspect.isclass(value)]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_is_ours_public_and_survives_pickling(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.HorovodRunnerError)
    assert getattr(horovodrunner, kind.__name__) is kind
    error = kind("what happened")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)


def test_a_worker_failure_keeps_its_facts_when_pickled() -> None:
    error = errors.StallTimeoutError(
        "boom", 3, "node", 2, "SIGKILL", "Traceback", ("rank 0: x",), stacks={0: "File ..."}
    )
    copy = pickle.loads(pickle.dumps(error))
    assert vars(copy) == vars(error)
    assert (copy.rank, copy.host, copy.exit_code, copy.signal) == (3, "node", 2, "SIGKILL")


def test_a_worker_failure_says_the_cause_first() -> None:
    error = errors.WorkerFailedError("ValueError: x", 1, "n", traceback="Traceback ...\nValueError")
    assert str(error).splitlines()[0] == "rank 1 on n failed: ValueError: x"


def test_a_lost_stage_keeps_its_facts_when_pickled() -> None:
    error = errors.BarrierStageError("gone", executor_was_lost=True)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.executor_was_lost, copy.was_cancelled) == (True, False)


def test_argument_errors_are_what_python_programmers_expect() -> None:
    assert issubclass(errors.ArgumentTypeError, TypeError)
    assert issubclass(errors.ArgumentValueError, ValueError)
    assert issubclass(errors.StartTimeoutError, TimeoutError)


def test_the_tree_in_the_docstring_is_complete() -> None:
    assert errors.__doc__ is not None
    assert all(kind.__name__ in errors.__doc__ for kind in TREE)
    assert sorted(errors.__all__) == sorted(kind.__name__ for kind in TREE)
