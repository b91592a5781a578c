"""Keras with Horovod: ranks on different data are one training on all of it.

A fixture is one run of two ranks that train many models, one after the other.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import ConfigurationError, HorovodRunner, WorkerFailedError
from tests.horovod import keras_cases
from tests.horovod.keras_cases import (
    CASES,
    EPOCHS,
    OF_HOROVOD_ITSELF,
    OF_LEGACY_KERAS,
    OF_TENSORFLOW,
)

# Importing them would bring TensorFlow into the process of all tests, where Triton, which torch's
# optimizers import if it is there, cannot be loaded any more.
if importlib.util.find_spec("keras") is None:
    pytest.skip("needs Keras", allow_module_level=True)
pytestmark = [pytest.mark.horovod, pytest.mark.timeout(600)]

ANNOUNCED = (
    "hvd.DistributedOptimizer, load_model and the callbacks are those of horovodrunner.keras"
)


def main(
    module: str,
    cases: dict[str, dict[str, Any]],
    directory: str,
    begin: Callable[[], Any] | None,
) -> dict[str, Any]:
    """Train every case, then use the rest of the module."""
    begun = begin() if begin is not None else None
    results = keras_cases.results_of_cases(module, cases)
    facts = keras_cases.facts_about(module, directory) if directory else {}
    return {"begun": begun, "cases": results, "facts": facts}


def run(
    module: str,
    cases: dict[str, dict[str, Any]],
    directory: Path | None = None,
    begin: Callable[[], Any] | None = None,
    **variables: str,
) -> dict[str, Any]:
    """Run main on two ranks; what the driver showed is added."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        for name, value in variables.items():
            patch.setenv(name, value)
        results = HorovodRunner(np=-2).run(
            main, module=module, cases=cases, directory=str(directory or ""), begin=begin
        )
    return {**results, "shown": shown.getvalue()}


def check(result: Any, tolerance: float = 1e-5) -> None:
    """Compare two ranks after every epoch, with each other and with a training alone."""
    assert isinstance(result, dict), result
    first, second = result["ranks"]
    assert len(first) == EPOCHS
    assert first == second
    if result["alone"] is not None:
        for ours, alone in zip(first, result["alone"], strict=True):
            assert ours == pytest.approx(alone, rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def keras_3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what came out on each backend; each takes another one of Horovod's two modules."""
    of_tensorflow = run(
        "horovod.tensorflow.keras",
        {**CASES, **OF_TENSORFLOW},
        tmp_path_factory.mktemp("saved"),
        HOROVOD_DYNAMIC_PROCESS_SETS="1",
    )
    of_torch = run(
        "horovod.keras",
        CASES,
        tmp_path_factory.mktemp("saved"),
        HOROVOD_DYNAMIC_PROCESS_SETS="1",
        KERAS_BACKEND="torch",
    )
    return {"tensorflow": of_tensorflow, "torch": of_torch}


@pytest.fixture(scope="module", params=["tensorflow", "torch"])
def facts(request: pytest.FixtureRequest, keras_3: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what is known of everything beside plain training, on each backend."""
    found: dict[str, Any] = keras_3[request.param]["facts"]
    errors = [value for value in found.values() if str(value).startswith("Traceback")]
    assert errors == []
    return found


@pytest.mark.parametrize(
    ("backend", "name"),
    [("tensorflow", name) for name in (*CASES, *OF_TENSORFLOW)]
    + [("torch", name) for name in CASES],
)
def test_two_ranks_are_one_training_on_the_combined_batch(
    keras_3: dict[str, dict[str, Any]], backend: str, name: str
) -> None:
    case = {**CASES, **OF_TENSORFLOW}[name]
    check(keras_3[backend]["cases"].get(name, "not reached"), case.get("tolerance", 1e-5))


def test_a_gradient_that_overflows_on_one_rank_is_skipped_by_both(
    keras_3: dict[str, dict[str, Any]],
) -> None:
    for name in ("overflow on one rank", "overflow, loss scale inside"):
        first, _ = keras_3["tensorflow"]["cases"][name]["ranks"]
        assert all(abs(weight) < 10 for weight in first[-1])


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_the_driver_is_told_once_what_was_replaced_and_what_is_not_compiled(
    keras_3: dict[str, dict[str, Any]], backend: str
) -> None:
    shown = keras_3[backend]["shown"]
    assert shown.count(ANNOUNCED) == 1
    assert f" on {backend}, {ANNOUNCED}" in shown
    assert "HOROVODRUNNER_KERAS=horovod brings them back" in shown
    assert shown.count("are trained without jit_compile") == 1


def test_metrics_are_averaged(facts: dict[str, Any]) -> None:
    (before, after), (before_there, after_there) = facts["averaged_metrics"]
    assert before != before_there
    assert after == after_there
    means = [(one + other) / 2 for one, other in zip(before, before_there, strict=True)]
    assert after == pytest.approx(means, rel=1e-6)


def test_the_learning_rate_warms_up_and_follows_its_schedule(facts: dict[str, Any]) -> None:
    found = facts["learning_rates"]
    # two batches an epoch, from 0.08 / 2 ranks to 0.08 in two epochs
    warmup = [0.05, 0.06, 0.07, 0.08]
    assert found["rates"] == pytest.approx([*warmup, 0.08, 0.08, 0.04, 0.04])
    assert found["logged"] == pytest.approx([0.06, 0.08, 0.08, 0.04])
    assert found["velocity"] == pytest.approx(0.5)


def test_a_model_that_was_saved_trains_on_as_if_it_had_not_been(facts: dict[str, Any]) -> None:
    found = facts["saved_models"]
    here, there = found["weights"]
    assert here == there == [here[0]] * 3  # trained on, loaded, and loaded before it was wrapped
    # Keras alone loads a plain optimizer of the same class.
    assert found["classes"] == ["Adam"] * 4
    assert found["distributed"] == [True, True, True, False]
    assert "set its filepath before fit()" in found["errors"][0]


def test_the_states_of_all_optimizers_are_broadcast(facts: dict[str, Any]) -> None:
    (states, weights), (states_there, weights_there) = facts["state_of_two_optimizers"]
    assert states == states_there == [12.0, 4.0, 4.0, 2.0]  # twos, as on the root
    assert weights == weights_there


def test_copies_are_distributed_too(facts: dict[str, Any]) -> None:
    assert facts["copies"] == [(True, 0.9)] * 4


def test_a_local_variable_stays_local(facts: dict[str, Any]) -> None:
    here, there = facts["a_local_variable"]
    assert here[0] != there[0]
    assert here[1:] == there[1:]


def test_ranks_outside_the_process_set_do_not_count(facts: dict[str, Any]) -> None:
    here, there = facts["a_process_set_of_one"]
    assert here != there


def test_what_cannot_work_is_refused(facts: dict[str, Any]) -> None:
    expected = {
        "adasum": "takes Average and Sum only",
        "twice": "this SGD is distributed already",
        "scaled twice": "this LossScaleOptimizer is distributed already",
        "no groups": "groups=0: it must be at least 1",
        "half a group": "groups=2.5: it must be an int, got float",
        "no passes": "backward_passes_per_step=0: it must be at least 1",
        "predivided sum": "gradient_predivide_factor=2.0: it is for op=Average",
        "a name": "got 'sgd': it takes an optimizer of Keras 3.",
        "legacy": "Keras 3 has no legacy optimizers",
        "no rate": "LearningRateWarmupCallback has no initial_lr: give it",
        "no model": "MetricAverageCallback is for models of Keras 3.",
    }
    texts = facts["refusals"]
    assert texts.keys() == expected.keys()
    assert [name for name, text in expected.items() if text not in texts[name]] == []


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_an_optimizer_that_was_not_wrapped_is_warned_of(
    keras_3: dict[str, dict[str, Any]], backend: str
) -> None:
    shown = keras_3[backend]["shown"]
    assert shown.count("the model's optimizer (SGD) is not distributed: ") == 1


def settings_that_are_ignored() -> list[Any]:
    """Give what these releases ignore; the strategy has to come before any collective."""
    import keras
    import tensorflow as tf
    import tf_keras

    sgd = keras.optimizers.SGD(0.1, decay=0.5)
    sgd.lr = 3
    fresh = keras.optimizers.SGD(0.1)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    adadelta = tf_keras.optimizers.Adadelta(lr=0.5)
    legacy = tf_keras.optimizers.legacy.SGD(lr=0.5)
    rates = [float(each.learning_rate.numpy()) for each in (adadelta, legacy)]
    return [sgd.lr, hasattr(fresh, "lr"), strategy.num_replicas_in_sync, *rates]


@pytest.fixture(scope="module")
def of_horovod_itself() -> dict[str, Any]:
    return run(
        "horovod.tensorflow.keras",
        OF_HOROVOD_ITSELF,
        begin=settings_that_are_ignored,
        HOROVODRUNNER_KERAS="horovod",
    )


def test_horovods_own_optimizer_does_not_average(of_horovod_itself: dict[str, Any]) -> None:
    """Shows that the comparison above fails when it should; and that the switch works."""
    [result] = of_horovod_itself["cases"].values()
    with pytest.raises(AssertionError, match="=="):
        check(result)
    assert ANNOUNCED not in of_horovod_itself["shown"]


def test_what_tensorflow_and_keras_ignore_is_said_once(of_horovod_itself: dict[str, Any]) -> None:
    assert of_horovod_itself["begun"] == [3, False, 1, pytest.approx(0.001), 0.5]
    out = of_horovod_itself["shown"]
    for text in (
        "HorovodRunner: SGD of this Keras ignores decay=0.5 (",
        "HorovodRunner: SGD of this Keras ignores lr=3 (",
        "HorovodRunner: Adadelta of this Keras ignores lr=0.5 (",
        "HorovodRunner: MultiWorkerMirroredStrategy sees one worker on each of the 2 ranks (",
    ):
        assert out.count(text) == 1, text
    assert out.count("of this Keras ignores") == 3


@pytest.fixture(scope="module")
def keras_2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("tf_keras") is None:
        pytest.skip("needs tf_keras")
    directory = tmp_path_factory.mktemp("saved")
    return run("horovod.keras", OF_LEGACY_KERAS, directory, TF_USE_LEGACY_KERAS="1")


def test_legacy_keras_keeps_horovods_own_code(keras_2: dict[str, Any]) -> None:
    assert keras_2["cases"].keys() == OF_LEGACY_KERAS.keys()
    for result in keras_2["cases"].values():
        check(result)
    assert ANNOUNCED not in keras_2["shown"]


@pytest.mark.parametrize("name", ["SGD", "Adam", "decaying", "legacy SGD", "legacy Adam"])
def test_a_legacy_optimizer_keeps_the_state_it_was_loaded_with(
    keras_2: dict[str, Any], name: str
) -> None:
    here, there = keras_2["facts"]["state_of_legacy_optimizers"]
    assert here[name] == there[name]
    weights, alone, steps = here[name]
    assert weights == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert steps == 6


def test_sessions_of_tensorflow_1(keras_2: dict[str, Any]) -> None:
    # from rank 0's 1.0: a gradient of 5 on average, then 0.9 * 5 + 5
    here, there = keras_2["facts"]["a_session"]
    assert here == there == (pytest.approx(1.0 - 0.5 - 0.95), {"from": 1})


def test_a_backend_without_horovod_is_refused() -> None:
    def main() -> None:
        import sys
        import types

        keras = types.ModuleType("keras")  # that has a backend which is not installed here
        vars(keras).update(__version__="3.0", backend=types.SimpleNamespace(backend=lambda: "jax"))
        sys.modules["keras"] = keras
        import horovod.keras  # noqa: F401

    with pytest.raises(WorkerFailedError, match=r"backend 'jax'.*set KERAS_BACKEND to") as caught:
        HorovodRunner(np=-1).run(main)
    assert isinstance(caught.value.__cause__, ConfigurationError)
