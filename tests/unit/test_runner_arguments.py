"""Bad input is refused before anything starts."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import horovodrunner
from horovodrunner import ConfigurationError, HorovodRunner
from horovodrunner.core import payload


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something was launched")

    monkeypatch.setattr(HorovodRunner, "_run_locally", refuse)
    monkeypatch.setattr(HorovodRunner, "_run_on_spark", refuse)


def train(lr: float, *, epochs: int = 1) -> None:
    """Train nothing."""


def test_the_documented_interface() -> None:
    init = inspect.getfullargspec(HorovodRunner.__init__)
    assert init.args == ["self"]
    assert init.kwonlyargs[:2] == ["np", "driver_log_verbosity"]
    assert init.kwonlydefaults is not None
    assert init.kwonlydefaults["driver_log_verbosity"] == "log_callback_only"
    assert "np" not in init.kwonlydefaults
    run = inspect.getfullargspec(HorovodRunner.run)
    assert (run.args, run.varkw, run.varargs) == (["self", "main"], "kwargs", None)


def test_np_is_keyword_only() -> None:
    with pytest.raises(TypeError):
        HorovodRunner(2)  # type: ignore[call-arg]


@pytest.mark.parametrize("np", [True, False, 2.0, "2", None, [2]])
def test_np_must_be_an_int(np: Any) -> None:
    with pytest.raises(horovodrunner.ArgumentTypeError, match=r"np=.*must be an int"):
        HorovodRunner(np=np)


def test_numpy_integers_are_ints() -> None:
    numpy = pytest.importorskip("numpy")
    HorovodRunner(np=numpy.int64(2))


@pytest.mark.parametrize("verbosity", ["ALL", "", None, 1])
def test_a_wrong_verbosity_is_a_value_error_that_names_both(verbosity: Any) -> None:
    with pytest.raises(ValueError, match=r"'all'.*'log_callback_only'"):
        HorovodRunner(np=-1, driver_log_verbosity=verbosity)


@pytest.mark.parametrize(
    ("timeout", "kind"),
    [("600", TypeError), (True, TypeError), (0, ValueError), (-1.0, ValueError)],
)
def test_a_wrong_timeout_is_refused(timeout: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="start_timeout"):
        HorovodRunner(np=-1, start_timeout=timeout)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"stall_timeout": 0}, ValueError, r"stall_timeout=0: .* more than 0 seconds"),
        ({"stall_timeout": "60"}, TypeError, r"stall_timeout='60': .* number of seconds"),
        ({"stall_timeout": float("nan")}, ValueError, "stall_timeout=nan"),
        ({"checkpoint_dir": 3}, TypeError, "checkpoint_dir=3: .* path or a URL, got int"),
        ({"checkpoint_dir": b"/tmp"}, TypeError, "checkpoint_dir=.* got bytes"),
        ({"checkpoint_dir": ""}, ValueError, "checkpoint_dir='': .* not be empty"),
        ({"checkpoint_dir": "nosuch://x"}, ConfigurationError, "nosuch"),
        ({"keep_checkpoints": 0}, ValueError, "keep_checkpoints=0: .* at least 1"),
        ({"keep_checkpoints": None}, TypeError, "keep_checkpoints=None: .* int, got NoneType"),
        ({"keep_checkpoints": True}, TypeError, "keep_checkpoints=True: .* not a bool"),
        ({"checkpoint_errors": "x"}, ValueError, "checkpoint_errors='x': .*'warn' or 'raise'"),
        ({"checkpoint_errors": None}, ValueError, "checkpoint_errors=None"),
        ({"max_restarts": -1}, ValueError, "max_restarts=-1: .* at least 0"),
        ({"max_restarts": 1.0}, TypeError, r"max_restarts=1\.0: .* int, got float"),
        ({"restart_on": (3,)}, TypeError, "restart_on: 3 is not a type of exception"),
        ({"restart_on": 3}, TypeError, "restart_on: 3 is not a type of exception"),
        ({"restart_on": (OSError, int)}, TypeError, "restart_on: <class 'int'> is not a type"),
        ({"restart_on": ValueError("x")}, TypeError, "restart_on: ValueError"),
        ({"restart_on": "OSError"}, TypeError, "restart_on: 'O' is not a type of exception"),
        ({"restart_on": None}, TypeError, "restart_on: None is not a type of exception"),
        ({"horovodrun_args": 3}, TypeError, "horovodrun_args=3: give words, such as"),
        ({"horovodrun_args": {"--x": 1}}, TypeError, "horovodrun_args=.*: give words"),
        ({"horovodrun_args": ["--cycle-time-ms", 2]}, TypeError, "horovodrun_args: 2 is no str"),
        ({"horovodrun_args": "'"}, ValueError, "horovodrun_args=.*No closing quotation"),
        ({"keep_warm": "yes"}, TypeError, "keep_warm='yes': .*'auto', True or False, got str"),
        ({"keep_warm": None}, TypeError, "keep_warm=None: .*'auto', True or False, got NoneType"),
        ({"keep_warm": 1}, TypeError, "keep_warm=1: .* True or False, got int"),
        ({"show_phases": 1}, TypeError, "show_phases=1: .* True or False, got int"),
        ({"tf_config": 1}, TypeError, "tf_config=1: .* True or False, got int"),
        ({"tf_config": "yes"}, TypeError, "tf_config='yes': .* True or False, got str"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(
    arguments: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(ConfigurationError, match=text) as caught:
        HorovodRunner(np=-1, **arguments)
    assert isinstance(caught.value, kind)


@pytest.mark.parametrize("restart_on", [OSError, (OSError,), [OSError, ValueError], ()])
def test_one_type_or_several_are_restarted_on(restart_on: Any) -> None:
    HorovodRunner(np=-1, restart_on=restart_on, max_restarts=1)


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_launched(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path / "file" / "kept")
    with pytest.raises(ConfigurationError, match=str(tmp_path / "file" / "kept")):
        runner.run(train, lr=1.0)


def test_a_directory_is_not_made_before_the_run(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path / "not" / "yet")
    assert runner.checkpoints == ()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="launched"):
        runner.run(train, lr=1.0)
    assert list((tmp_path / "not" / "yet").iterdir()) == []


@pytest.mark.parametrize("np", [-1, 1])
def test_a_timeline_that_cannot_be_written_is_refused_before_anything_is_launched(
    np: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOROVOD_TIMELINE", str(tmp_path / "no" / "t.json"))
    with pytest.raises(ConfigurationError, match=r"HOROVOD_TIMELINE=.*there is no directory"):
        HorovodRunner(np=np).run(train, lr=1.0)


def test_calling_main_instead_of_passing_it_is_explained() -> None:
    with pytest.raises(TypeError, match=r"run\(train\), not run\(train\(\)\)"):
        HorovodRunner(np=-1).run(train(0.1))  # type: ignore[func-returns-value, arg-type]


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"learning_rate": 0.1}, "learning_rate"),
        ({}, "missing a required argument: 'lr'"),
        ({"lr": 1, "batch": 2}, "unexpected keyword argument 'batch'"),
        ({"batch": 2}, "missing a required argument: 'lr'; it has no argument 'batch'"),
    ],
)
def test_arguments_main_does_not_take_are_refused(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text) as caught:
        HorovodRunner(np=-2).run(train, **kwargs)
    assert "train(lr" in str(caught.value)


def test_a_large_call_is_warned_about_with_the_culprit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(payload, "WARN_BYTES", 1000)
    with (
        pytest.warns(UserWarning, match=r"Largest: the argument 'lr' \(9\.8 KiB\)"),
        pytest.raises(AssertionError, match="launched"),
    ):
        HorovodRunner(np=-1).run(train, lr=bytes(10_000))


def test_the_public_names_are_exported_and_documented() -> None:
    assert sorted(horovodrunner.__all__) == horovodrunner.__all__
    for name in horovodrunner.__all__:
        assert getattr(horovodrunner, name).__doc__


@pytest.mark.parametrize("resources", [{"gpu": 1}, {"cpus": 4, "gpu": 0.25}, {"gpu": 2.0}])
def test_resources_are_amounts_by_name(resources: Any) -> None:
    HorovodRunner(np=2, resources=resources)


@pytest.mark.parametrize(
    ("resources", "error"),
    [
        ("gpu", "give amounts by name"),
        ({1: 1}, "give amounts by name"),
        ({}, "must not be empty"),
        ({"gpus": 1}, "Spark's name for GPUs is 'gpu'"),
        ({"gpu": "1"}, "the amount of 'gpu' is no number"),
        ({"gpu": True}, "the amount of 'gpu' is no number"),
        ({"gpu": 0}, "must be a whole number, or less than 1"),
        ({"gpu": 1.5}, "must be a whole number, or less than 1"),
        ({"gpu": float("nan")}, "must be a whole number, or less than 1"),
        ({"cpus": 0.5}, "the amount of 'cpus' must be a whole number$"),
        ({"cpus": -1}, "the amount of 'cpus' must be a whole number$"),
    ],
)
def test_resources_that_cannot_work_are_refused(resources: Any, error: str) -> None:
    with pytest.raises(ConfigurationError, match=f"resources=.*{error}"):
        HorovodRunner(np=2, resources=resources)
