"""Bad input is refused before anything starts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import types
from pathlib import Path
from typing import Any

import pytest
import sparkdl

import horovodrunner
from horovodrunner import ConfigurationError, HorovodRunner
from horovodrunner.flows.metrics.records import Point
from horovodrunner.pickling import payload
from horovodrunner.processes.driver.run import Run

IN_X = {"checkpoint_dir": "x"}


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was launched")

    monkeypatch.setattr(Run, "_launch", refuse)


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
@pytest.mark.parametrize("name", ["start_timeout", "sigterm_grace"])
def test_a_wrong_timeout_is_refused(name: str, timeout: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=name):
        HorovodRunner(np=-1, **{name: timeout})


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"stall_timeout": 0}, ValueError, r"stall_timeout=0: .* more than 0 seconds"),
        ({"stall_timeout": "60"}, TypeError, r"stall_timeout='60': .* number of seconds"),
        ({"stall_timeout": float("nan")}, ValueError, "stall_timeout=nan"),
        ({"checkpoint_dir": 3}, TypeError, "checkpoint_dir=3: .* path or a URL, got int"),
        ({"checkpoint_dir": b"/tmp"}, TypeError, "checkpoint_dir=.* got bytes"),
        ({"checkpoint_dir": ""}, ValueError, "checkpoint_dir='': .* not be empty"),
        ({"checkpoint_dir": Path("s3://b/x")}, TypeError, "is a URL in a path object"),
        ({"checkpoint_dir": "nosuch://x"}, ConfigurationError, "nosuch"),
        ({"keep_checkpoints": 0}, ValueError, "keep_checkpoints=0: .* at least 1"),
        ({"keep_checkpoints": None}, TypeError, "keep_checkpoints=None: .* int, got NoneType"),
        ({"keep_checkpoints": True}, TypeError, "keep_checkpoints=True: .* not a bool"),
        ({**IN_X, "keep_every": 0}, ValueError, "keep_every=0: .* at least 1"),
        ({**IN_X, "keep_every": 1.5}, TypeError, r"keep_every=1\.5: .* an int, got float"),
        ({"keep_every": 2}, ValueError, "keep_every=2 needs checkpoint_dir"),
        ({"keep_best": ("loss", "min")}, ValueError, r"keep_best=\('loss', 'min'\) needs check"),
        ({**IN_X, "keep_best": "loss"}, TypeError, "keep_best='loss': give a metric and which end"),
        ({**IN_X, "keep_best": ("loss",)}, TypeError, r"keep_best=\('loss',\): give a metric"),
        ({**IN_X, "keep_best": {"a", "min"}}, TypeError, "keep_best=.*: give a metric"),
        ({**IN_X, "keep_best": ("l", "min", 1, 2)}, TypeError, "keep_best=.*: give a metric"),
        ({**IN_X, "keep_best": (1, "min")}, TypeError, r"keep_best\[0\]=1: .* a str, got int"),
        ({**IN_X, "keep_best": ("", "min")}, ValueError, "metric's name must not be empty"),
        ({**IN_X, "keep_best": ("l", "low")}, ValueError, "'low': it must be 'min' or 'max'"),
        ({**IN_X, "keep_best": ("l", "max", 0)}, ValueError, r"keep_best\[2\]=0: .* at least 1"),
        ({**IN_X, "keep_best": ("l", "max", "2")}, TypeError, r"keep_best\[2\]='2': .* an int"),
        ({"on_checkpoint_error": "x"}, ValueError, "on_checkpoint_error='x': .*'warn' or 'raise'"),
        ({"on_checkpoint_error": None}, ValueError, "on_checkpoint_error=None"),
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
        ({"profile_launch": 1}, TypeError, "profile_launch=1: .* True or False, got int"),
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


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("checkpoint_errors", "on_checkpoint_error", "raise"),
        ("show_phases", "profile_launch", True),
    ],
)
def test_the_old_name_of_an_option_is_taken_with_a_warning(old: str, new: str, value: Any) -> None:
    with pytest.warns(DeprecationWarning, match=f"^{old}= is deprecated: .* {new}= now") as caught:
        runner = HorovodRunner(np=-1, **{old: value})
    assert caught[0].filename == __file__
    assert repr(runner) == repr(HorovodRunner(np=-1, **{new: value}))
    with pytest.raises(horovodrunner.ArgumentTypeError, match=f"give {new}= alone"):
        HorovodRunner(np=-1, **{old: value, new: value})


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


class Trainer:
    """Trains nothing, in many ways."""

    def fit(self, lr: float) -> float:
        """Train nothing."""
        return lr

    fit_slowly = functools.partialmethod(fit, 0.1)
    static = staticmethod(train)

    async def __call__(self) -> None:
        """Train nothing, later."""


@pytest.mark.parametrize(
    ("main", "text"),
    [
        (train(0.1), r"got NoneType \(None\): .*run\(train\), not run\(train\(\)\)"),  # type: ignore[func-returns-value]
        ("train", r"got str \('train'\): pass the function itself, run\(train\), not its name"),
        (inspect, r"got module .*: pass one of its functions, such as run\(inspect\.train\)"),
        (Path("train.py"), r"got PosixPath .*or a method: run\(trainer\.train\)"),
        (classmethod(lambda cls: cls), r"got classmethod .*such as run\(trainer\.train\)"),
        ([train, 0.1], r"got list .*run\(train\), not run\(train\(\)\)"),
    ],
    ids=["result", "name", "module", "object", "classmethod", "list"],
)
def test_what_is_no_function_is_told_by_its_type_and_what_to_pass(main: Any, text: str) -> None:
    with pytest.raises(TypeError, match=f"^main must be a function, {text}"):
        HorovodRunner(np=-1).run(main)


def supplies_lr(function: Any) -> Any:
    """Call something with a learning rate, as ``hydra.main`` calls it with a configuration."""

    @functools.wraps(function)
    def wrapper(**kwargs: Any) -> Any:
        return function(lr=0.1, **kwargs)

    return wrapper


def declared(function: Any) -> Any:
    """Let something declare another signature than it has."""
    function.__signature__ = inspect.signature(train)
    return function


class Context(contextlib.ContextDecorator):
    """Can decorate a function, and takes all arguments then."""

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


async def train_later(lr: float = 0.1) -> None:
    """Train nothing."""


def train_in_steps(lr: float = 0.1) -> Any:
    """Train nothing."""
    yield lr


async def train_in_later_steps() -> Any:
    """Train nothing."""
    yield 1


@functools.wraps(train_later)
def train_now() -> None:
    """Train nothing."""
    asyncio.run(train_later())


CALLED = [
    ("wraps", supplies_lr(train), {}),
    ("wraps of a method", supplies_lr(Trainer().fit), {}),
    ("partial of wraps", functools.partial(supplies_lr(train), epochs=2), {}),
    ("a signature that is only declared", declared(supplies_lr(train)), {"epochs": 2}),
    ("context", Context()(train), {"lr": 0.1}),
    ("partial", functools.partial(train, 0.1), {"epochs": 2}),
    ("partial, again", functools.partial(train, lr=0.1), {"lr": 0.2}),
    ("partialmethod", Trainer().fit_slowly, {}),
    ("method", Trainer().fit, {"lr": 0.1}),
    ("staticmethod", staticmethod(train), {"lr": 0.1}),
    ("cache", functools.lru_cache(train), {"lr": 0.1}),
    ("class", types.SimpleNamespace, {"lr": 0.1}),
    ("builtin that does not tell", dict, {"lr": 0.1}),
    ("wraps of async", train_now, {}),
    ("self", lambda self: self, {"self": 1}),
]


@pytest.mark.parametrize(
    ("main", "kwargs"), [each[1:] for each in CALLED], ids=[each[0] for each in CALLED]
)
def test_what_is_called_decides_which_arguments_fit(main: Any, kwargs: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="launched"):
        HorovodRunner(np=-1).run(main, **kwargs)


ANY: Any = train
REFUSED = [
    ("wraps", supplies_lr(train).__wrapped__, {}, "missing a required argument: 'lr'"),
    ("cache", functools.cache(train), {}, "missing a required argument: 'lr'"),
    ("method", Trainer().fit, {}, r"Trainer\.fit\(lr\) .*missing a required argument: 'lr'"),
    ("partial", functools.partial(train, 0.1), {"lr": 1}, "1 by position, 'lr': multiple values"),
    ("partial of too much", functools.partial(ANY, 1, 2), {}, "too many positional arguments"),
    ("partial of the wrong", functools.partial(ANY, 1, foo=2), {}, "has no argument 'foo'"),
    ("positional", eval("lambda lr, /: lr"), {"lr": 1}, "it has no argument|positional only"),
    ("class", Trainer, {"lr": 0.1}, r"Trainer\(\) cannot be called .*unexpected keyword"),
    ("of a class", Trainer.fit, {"lr": 1}, "argument: 'self'; give the method of an object$"),
    ("option", train, {"lr": 1, "np": 2}, r"'np'; np is an option of HorovodRunner\(np=\.\.\.\)$"),
    (
        "default",
        eval("lambda lr, table=range(9): 0"),
        {},
        r"<lambda>\(lr, table=\.\.\.\) cannot be",
    ),
]


@pytest.mark.parametrize(
    ("main", "kwargs", "text"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED]
)
def test_what_certainly_fails_is_refused(main: Any, kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        HorovodRunner(np=2).run(main, **kwargs)


LATER = [
    ("async", train_later, r"train_later only makes a coroutine .*asyncio\.run\(train_later\("),
    ("partial of async", functools.partial(train_later, 1), "train_later only makes a coroutine"),
    ("cache of async", functools.cache(train_later), "train_later only makes a coroutine"),
    ("object", Trainer(), "Trainer only makes a coroutine"),
    ("method", Trainer().__call__, r"Trainer\.__call__ only makes a coroutine"),
    (
        "generator",
        train_in_steps,
        r"train_in_steps only makes a generator .*list\(train_in_",
    ),
    ("static", staticmethod(train_in_steps), "train_in_steps only makes a generator"),
    ("old coroutine", types.coroutine(train_in_steps), "train_in_steps only makes a generator"),
    ("async generator", train_in_later_steps, "train_in_later_steps only makes an async generator"),
]


@pytest.mark.parametrize(
    ("main", "text"), [each[1:] for each in LATER], ids=[each[0] for each in LATER]
)
@pytest.mark.parametrize("np", [-1, 1])
def test_a_main_that_a_call_does_not_run_is_refused(main: Any, text: str, np: int) -> None:
    with pytest.raises(TypeError, match=f"^main must run when it is called, and {text}"):
        HorovodRunner(np=np).run(main)


@pytest.mark.parametrize("runner", [HorovodRunner, sparkdl.HorovodRunner], ids=["own", "sparkdl"])
@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("runner()", "lacks np, the number of ranks: np=2"),
        ("runner(2)", r"options are given by name, HorovodRunner\(np=2\)"),
        ("runner(2, driver_log_verbosity='all')", r"by name, HorovodRunner\(np=2\)"),
        (
            "runner(np=2, verbosity='all')",
            "no option 'verbosity': do you mean driver_log",
        ),
        ("runner(np=2, colour=1)", "no option 'colour': it has np, driver_log_verbosity"),
        ("runner(np=-1).run()", r"^run\(\) lacks main"),
        ("runner(np=-1).run(lr=3)", r"^run\(\) lacks main"),
        ("runner(np=-1).run(train, 3)", r"by name, run\(train, lr=3\)"),
        ("runner(np=-1).run(train, main=3)", r"^run\(train, main=\.\.\.\): .*functools\.partial"),
        ("runner(np=-1).run(train, self=3)", r"^train\(lr, \*, epochs=1\) .*no argument 'self'$"),
    ],
)
def test_a_call_that_does_not_fit_says_what_to_write(runner: Any, call: str, text: str) -> None:
    with pytest.raises(horovodrunner.ArgumentTypeError, match=text):
        eval(call, {"runner": runner, "train": train})


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


def test_a_runner_shows_how_it_was_made() -> None:
    assert repr(HorovodRunner(np=2)) == "HorovodRunner(np=2)"
    assert repr(sparkdl.HorovodRunner(np=-1)) == "HorovodRunner(np=-1)"
    runner = HorovodRunner(np=2, checkpoint_dir="memory://me:secret@host/x", max_restarts=1)
    assert "secret" not in repr(runner)
    assert repr(runner).startswith("HorovodRunner(np=2, checkpoint_dir='memory://")
    assert "max_restarts=1" in repr(runner)


def test_a_notebook_shows_what_was_reported() -> None:
    runner = HorovodRunner(np=2, run_dir="<runs>")
    assert "&lt;runs&gt;" in runner._repr_html_()
    assert "<table>" not in runner._repr_html_()
    runner.history._add(Point(3, {"loss": 0.5}))
    assert "<table>" in runner._repr_html_()
