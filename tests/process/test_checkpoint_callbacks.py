"""What CheckpointCallbacks do beside going on where a run was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import ArgumentTypeError, ArgumentValueError, CheckpointError, checkpoint


def fit(epochs: int, every_steps: int | None = None, stop_after: int = 0) -> list[int]:
    """Train with Keras, each rank by itself, and return the epochs of the history."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    import numpy as np

    from horovodrunner.callbacks.keras import CheckpointCallback

    class Stop(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch + 1 == stop_after:
                raise RuntimeError("enough")

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    callbacks: list[Any] = [CheckpointCallback(every_steps=every_steps)]
    if stop_after:
        callbacks.append(Stop())
    x = np.ones((32, 2), "float32")
    try:
        history = model.fit(x, x[:, :1], 4, epochs, verbose=0, callbacks=callbacks)
    except RuntimeError:
        return []
    assert model._initial_epoch is None
    return list(history.epoch)


@pytest.mark.heavy
def test_another_number_of_ranks(
    horovod_runner: Any, checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = horovod_runner(np=-2, checkpoint_dir=checkpoint_dir)
    assert two.run(fit, epochs=1) == [0]
    assert two.checkpoints[-1].step == 8
    one = horovod_runner(np=-1, checkpoint_dir=checkpoint_dir)
    assert one.run(fit, epochs=2, every_steps=2, stop_after=5) == []
    assert one.checkpoints[-1].step == 12
    capsys.readouterr()
    two = horovod_runner(np=-2, checkpoint_dir=checkpoint_dir)
    assert two.run(fit, epochs=2) == [0, 1]
    assert two.checkpoints[-1].step == 18  # 12, and those that were left of 8 after 4 // 2
    assert "the checkpoint is of 1 rank and this run has 2" in capsys.readouterr().out


def save_own() -> None:
    with checkpoint.save(step=3) as directory:
        (directory / "model.pt").write_text("")


@pytest.mark.heavy
def test_a_checkpoint_of_somebody_else_is_refused(
    horovod_runner: Any, checkpoint_dir: Path
) -> None:
    runner = horovod_runner(np=-1, checkpoint_dir=checkpoint_dir)
    runner.run(save_own)
    with pytest.raises(Exception, match=r"no model\.weights\.h5, only .*model\.pt") as caught:
        runner.run(fit, epochs=1)
    assert isinstance(caught.value.__cause__, CheckpointError)


def test_arguments_are_checked_at_once() -> None:
    from horovodrunner.callbacks.saving import Schedule

    with pytest.raises(ArgumentValueError, match="every_steps"):
        Schedule(1, 0)
    with pytest.raises(ArgumentTypeError, match="every_epochs"):
        Schedule("epoch", None)  # type: ignore[arg-type]
    schedule = Schedule(2, 10)
    assert [schedule.has_epoch(done) for done in (1, 2, 3, 4)] == [False, True, False, True]
    assert schedule.has_step(9, 10)
    assert schedule.has_step(18, 21)
    assert not schedule.has_step(10, 19)
