"""Trainings with Keras for test_keras.py, written as users write them. Runs in: the worker."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import traceback
from typing import Any

import numpy as np

EPOCHS = 2
SIZE = 2

TWO_PASSES = {"backward_passes_per_step": 2, "average_aggregated_gradients": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "eager": {"mode": "eager"},
    "jit_compile": {"mode": "compiled"},
    "momentum": {"settings": {"momentum": 0.9, "nesterov": True}},
    "adam": {"optimizer": "Adam"},
    "clipped": {"settings": {"clipnorm": 0.1}},
    "two passes": {"settings": {"momentum": 0.9}, "distributed": TWO_PASSES},
    "two passes of adam, eager": {
        "mode": "eager",
        "optimizer": "Adam",
        "distributed": TWO_PASSES,
    },
    "keras' own passes": {"settings": {"gradient_accumulation_steps": 2}},
    "three groups": {"distributed": {"groups": np.int64(3)}},
    "predivided": {"distributed": {"gradient_predivide_factor": 2.0}},
    "sum": {"distributed": {"op": "Sum"}, "rate_alone": 0.1},
    "fp16": {"distributed": {"compression": "fp16"}, "tolerance": 2e-3},
    "loss scale": {"loss_scale": "inside"},
    "in a loss scale": {"loss_scale": "outside"},
    "decay": {"decays": True},
    "sparse, eager": {"mode": "eager", "sparse": True, "settings": {"momentum": 0.9}},
    # Alone, Keras squares the parts of a row's gradient one by one if a row is in a batch twice.
    "sparse adam": {"optimizer": "Adam", "sparse": True, "distinct": True},
}
OF_TENSORFLOW: dict[str, dict[str, Any]] = {
    "several steps per execution": {"compile": {"steps_per_execution": 2}},
    "sparse as dense": {"sparse": True, "distributed": {"sparse_as_dense": True}},
    "sparse, fp16": {"sparse": True, "distributed": {"compression": "fp16"}, "tolerance": 2e-3},
    "float16": {"policy": "mixed_float16", "tolerance": 2e-3},
    "gradient tape": {"by": "tape"},
    "overflow on one rank": {"policy": "mixed_float16", "overflows": True, "alone": False},
    "overflow, loss scale inside": {
        "policy": "mixed_float16",
        "overflows": True,
        "loss_scale": "inside",
        "alone": False,
    },
}
OF_LEGACY_KERAS: dict[str, dict[str, Any]] = {
    "plain": {"legacy": True},
    "eager": {"legacy": True, "mode": "eager"},
    "adam": {"legacy": True, "optimizer": "Adam"},
}
OF_HOROVOD_ITSELF: dict[str, dict[str, Any]] = {"eager": {"by": "nobody", "mode": "eager"}}


def results_of_cases(module: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train each case on every rank together and on rank 0 alone.

    Parameters
    ----------
    module
        Horovod's module to use.
    cases
        What to train.

    Returns
    -------
    dict
        For each case a dict of ``ranks`` (each rank's weights after each epoch) and ``alone``, or
        the text of an error.
    """
    hvd = importlib.import_module(module)
    objects = _object_gatherer(hvd)
    hvd.init()
    results: dict[str, Any] = {}
    references: dict[str, list[list[float]]] = {}
    for name, case in cases.items():
        try:
            ranks = objects(weights_by_epoch(hvd, hvd.rank(), SIZE, case))
            alone = None
            if hvd.rank() == 0 and case.get("alone", True):
                same = reference_of(case)
                if repr(same) not in references:
                    references[repr(same)] = weights_by_epoch(hvd, 0, 1, same)
                alone = references[repr(same)]
            results[name] = {"ranks": ranks, "alone": alone}
        except Exception:
            results[name] = traceback.format_exc()
            break  # the ranks may be in different places now
    return results


def reference_of(case: dict[str, Any]) -> dict[str, Any]:
    """Return what one process trains to compare with: several cases have the same."""
    ignored = ("mode", "compile", "distributed", "tolerance")
    same = {name: value for name, value in case.items() if name not in ignored}
    return {**same, "mode": "eager", "distributed": {"backward_passes_per_step": _passes(case)}}


def _object_gatherer(hvd: Any) -> Any:
    if hasattr(hvd, "allgather_object"):
        return hvd.allgather_object
    return importlib.import_module("horovod.tensorflow").allgather_object


def weights_by_epoch(hvd: Any, rank: int, size: int, case: dict[str, Any]) -> list[list[float]]:
    """Train on this rank's share of each batch and give the weights after every epoch."""
    keras = _keras(case)

    gc.freeze()  # what is there by now, or the next line would search all of it for garbage
    keras.backend.clear_session()
    with contextlib.ExitStack() as put_back:
        if case.get("policy"):
            keras.config.set_dtype_policy(case["policy"])
            put_back.callback(keras.config.set_dtype_policy, "float32")
        # A broadcast makes the ranks start from the same weights; Horovod's own comes too late for
        # the first batch.
        starts_equal = case.get("by") == "nobody" or case.get("legacy")
        keras.utils.set_random_seed(7 if starts_equal else 7 + rank)
        if case.get("sparse"):
            inputs = np.random.default_rng(1).integers(0, 12, (16, 3))
            if case.get("distinct"):
                inputs = np.tile(np.arange(12).reshape(4, 3), (4, 1))
            layers = [keras.layers.Embedding(12, 4), keras.layers.Flatten()]
        else:
            inputs = np.random.default_rng(1).normal(size=(16, 3)).astype("float32")
            layers = [keras.layers.Dense(4, activation="tanh")]
        targets = np.random.default_rng(2).normal(size=(16, 1)).astype("float32")
        if case.get("overflows"):
            targets[1] *= 1e6  # its gradients, in float16 and on the second rank only
        model = keras.Sequential([keras.Input(inputs.shape[1:]), *layers, keras.layers.Dense(1)])
        optimizer = _optimizer(keras, hvd, size, case)
        if case.get("by") == "tape":
            return _loop(keras, model, optimizer, inputs[rank::size], targets[rank::size], size)
        return _fit(keras, hvd, model, optimizer, inputs, targets, rank, size, case)


def _keras(case: dict[str, Any]) -> Any:
    return importlib.import_module("tf_keras" if case.get("legacy") else "keras")


def _optimizer(keras: Any, hvd: Any, size: int, case: dict[str, Any]) -> Any:
    rate: Any = 0.05 if size > 1 else case.get("rate_alone", 0.05)
    if case.get("decays"):
        rate = keras.optimizers.schedules.ExponentialDecay(rate, 2, 0.5)
    optimizer = getattr(keras.optimizers, case.get("optimizer", "SGD"))(
        rate, **case.get("settings", {})
    )
    if case.get("loss_scale") == "inside":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    if size > 1 and case.get("by") != "tape":
        options = dict(case.get("distributed", {}))
        if "op" in options:
            options["op"] = getattr(hvd, options["op"])
        if "compression" in options:
            options["compression"] = getattr(hvd.Compression, options["compression"])
        optimizer = hvd.DistributedOptimizer(optimizer, **options)
    if case.get("loss_scale") == "outside":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def _weights(model: Any) -> list[float]:
    return [x for w in model.get_weights() for x in w.flatten().tolist()]


def _fit(
    keras: Any,
    hvd: Any,
    model: Any,
    optimizer: Any,
    inputs: Any,
    targets: Any,
    rank: int,
    size: int,
    case: dict[str, Any],
) -> list[list[float]]:
    mode = case.get("mode")
    compiled = {"run_eagerly": mode == "eager", **case.get("compile", {})}
    if mode == "compiled" and size > 1:
        compiled["jit_compile"] = True
    model.compile(optimizer, "mse", **compiled)
    if size == 1:
        return _fit_alone(model, inputs, targets, 4 * _passes(case))
    weights: list[list[float]] = []

    class Weights(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            weights.append(_weights(self.model))

    callbacks = [Weights()]
    if case.get("by") != "nobody":
        callbacks.insert(0, hvd.callbacks.BroadcastGlobalVariablesCallback(0))
    model.fit(
        inputs[rank::size],
        targets[rank::size],
        batch_size=2,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )
    return weights


def _passes(case: dict[str, Any]) -> int:
    return int(case.get("distributed", {}).get("backward_passes_per_step", 1))


def _fit_alone(model: Any, inputs: Any, targets: Any, batch: int) -> list[list[float]]:
    """Do as ``fit``, most of whose time TensorFlow takes to set up its input."""
    weights = []
    for _ in range(EPOCHS):
        for start in range(0, len(inputs), batch):
            model.train_on_batch(inputs[start : start + batch], targets[start : start + batch])
        weights.append(_weights(model))
    return weights


def _loop(
    keras: Any, model: Any, optimizer: Any, inputs: Any, targets: Any, size: int
) -> list[list[float]]:
    """Train with a loop of one's own, as TensorFlow 2 notebooks have it."""
    import horovod.tensorflow as of_tensorflow
    import tensorflow as tf

    is_alone = size == 1
    batch = 4 if is_alone else 2
    loss_function = keras.losses.MeanSquaredError()

    @tf.function  # type: ignore[untyped-decorator, unused-ignore]
    def step(x: Any, y: Any, first: bool) -> None:
        with tf.GradientTape() as tape:
            loss = loss_function(y, model(x, training=True))
        if not is_alone:
            tape = of_tensorflow.DistributedGradientTape(tape)
        grads = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        if first and not is_alone:
            of_tensorflow.broadcast_variables(model.variables, root_rank=0)
            of_tensorflow.broadcast_variables(optimizer.variables, root_rank=0)

    weights = []
    if not is_alone:  # so that the first step is of equal models, too
        of_tensorflow.broadcast_variables(model.variables, root_rank=0)
    for _ in range(EPOCHS):
        for start in range(0, len(inputs), batch):
            step(inputs[start : start + batch], targets[start : start + batch], start == 0)
        weights.append(_weights(model))
    return weights


def facts_about(module: str, directory: str) -> dict[str, Any]:
    """Use everything beside plain training.

    Parameters
    ----------
    module
        Horovod's module to use.
    directory
        Where models may be saved.

    Returns
    -------
    dict
        What each part returned, or the text of its error.
    """
    hvd = importlib.import_module(module)
    hvd.init()
    facts: dict[str, Any] = {}
    parts = (
        LEGACY_PARTS
        if os.environ.get("TF_USE_LEGACY_KERAS")
        else (
            averaged_metrics,
            learning_rates,
            saved_models,
            state_of_two_optimizers,
            copies,
            a_local_variable,
            a_process_set_of_one,
            refusals,
            plain_optimizer,
        )
    )
    for part in parts:
        try:
            facts[part.__name__] = part(hvd, directory)
        except Exception:
            facts[part.__name__] = traceback.format_exc()
            break
    return facts


def _model(keras: Any, hvd: Any, optimizer: Any) -> tuple[Any, Any, Any]:
    """Return a compiled model and this rank's 8 samples of its own."""

    keras.utils.set_random_seed(1)
    inputs = np.random.default_rng(hvd.rank()).normal(size=(8, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model, inputs, inputs.sum(axis=1, keepdims=True)


def averaged_metrics(hvd: Any, directory: str) -> Any:
    """Return each rank's losses, before and after they were averaged."""
    import keras

    before = []

    class Before(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            before.append(logs["loss"])

    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05))
    model, inputs, targets = _model(keras, hvd, optimizer)
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        Before(),
        hvd.callbacks.MetricAverageCallback(),
    ]
    history = model.fit(inputs, targets, epochs=2, verbose=0, callbacks=callbacks)
    return _object_gatherer(hvd)((before, history.history["loss"]))


def learning_rates(hvd: Any, directory: str) -> Any:
    """Return the rates of a warmup of two epochs and a schedule after it, batch by batch."""
    import keras

    rates, velocities = [], []

    class Rates(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            rates.append(float(self.model.optimizer.learning_rate))

    class Velocities(keras.callbacks.Callback):  # type: ignore[misc]
        """Remember them on both sides of the change of the rate in epoch 3."""

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            velocities.append(float(keras.ops.sum(self.model.optimizer.momentums[0])))

    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.08, momentum=0.9))
    model, inputs, targets = _model(keras, hvd, optimizer)
    schedule = hvd.callbacks.LearningRateScheduleCallback(
        initial_lr=0.08, multiplier=0.5, start_epoch=2, end_epoch=4
    )
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.LearningRateWarmupCallback(initial_lr=0.08, warmup_epochs=2, verbose=1),
        Velocities(),
        schedule,
        Velocities(),
        Rates(),
    ]
    history = model.fit(inputs, targets, batch_size=4, epochs=4, verbose=0, callbacks=callbacks)
    before, after = velocities[6 * 2], velocities[6 * 2 + 1]
    return {"rates": rates, "logged": history.history["lr"], "velocity": after / before}


def saved_models(hvd: Any, directory: str) -> Any:
    """Train on after saving and loading, and compare with training on without."""
    import keras

    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.05))
    model, inputs, targets = _model(keras, hvd, optimizer)
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    best = hvd.callbacks.BestModelCheckpoint(monitor="loss")
    errors = []
    try:
        model.fit(inputs, targets, verbose=0, callbacks=[best])
    except ValueError as error:
        errors.append(str(error))
    best.filepath = f"{directory}/best-{hvd.rank()}.keras"
    model.fit(inputs, targets, verbose=0, shuffle=False, callbacks=[broadcast, best])
    loaded = hvd.load_model(best.filepath)
    plain = keras.models.load_model(best.filepath)
    wrapped = keras.models.load_model(best.filepath)
    wrapped.compile(hvd.DistributedOptimizer(wrapped.optimizer), "mse")
    made = (model, loaded, wrapped, plain)
    for each in made[:3]:
        each.fit(inputs, targets, verbose=0, shuffle=False)
    weights = _object_gatherer(hvd)([_weights(each) for each in made[:3]])
    return {
        "errors": errors,
        "weights": weights,
        "classes": [type(each.optimizer).__mro__[0].__name__ for each in made],
        "distributed": [_is_distributed(each.optimizer) for each in made],
    }


def _is_distributed(optimizer: Any) -> bool:
    from horovodrunner.keras.optimizer import is_distributed

    return is_distributed(optimizer)


def state_of_two_optimizers(hvd: Any, directory: str) -> Any:
    """Return both optimizers' states on all ranks after a broadcast."""
    import keras

    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.05))
    model, inputs, targets = _model(keras, hvd, optimizer)
    model.second = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.5))
    model.second.build(model.trainable_variables)
    for each in (*model.second.momentums, *model.weights):
        each.assign(keras.ops.ones_like(each) * (hvd.rank() + 1))
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(1)
    model.fit(inputs, targets, verbose=0, callbacks=[broadcast])
    values = [float(keras.ops.sum(each)) for each in model.second.momentums]
    return _object_gatherer(hvd)((values, _weights(model)))


def copies(hvd: Any, directory: str) -> Any:
    """Return which copies of a distributed optimizer are distributed."""
    import copy
    import pickle

    import keras

    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9))
    made = [
        copy.deepcopy(optimizer),
        copy.copy(optimizer),
        pickle.loads(pickle.dumps(optimizer)),
        type(optimizer).from_config(optimizer.get_config()),
    ]
    return [(_is_distributed(each), each.momentum) for each in made]


def a_local_variable(hvd: Any, directory: str) -> Any:
    """Return all ranks' weights after a training that left the first one local."""
    import keras

    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    model, inputs, targets = _model(keras, hvd, optimizer)
    local = model.trainable_variables[0]
    optimizer.register_local_var(local)
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=local)
    model.fit(inputs, targets, verbose=0, batch_size=8, callbacks=[broadcast])
    return _object_gatherer(hvd)([w.flatten().tolist() for w in model.get_weights()])


def a_process_set_of_one(hvd: Any, directory: str) -> Any:
    """Return all ranks' weights after a training in which each was for itself."""
    import keras

    mine = None
    for rank in range(hvd.size()):
        process_set = hvd.add_process_set([rank])
        mine = process_set if rank == hvd.rank() else mine
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), process_set=mine)
    model, inputs, targets = _model(keras, hvd, optimizer)
    model.fit(inputs, targets, verbose=0, batch_size=8)
    return _object_gatherer(hvd)(_weights(model))


def refusals(hvd: Any, directory: str) -> Any:
    """Return the texts of the errors for what cannot work."""
    import keras

    def sgd() -> Any:
        return keras.optimizers.SGD(0.1)

    attempts = {
        "adasum": lambda: hvd.DistributedOptimizer(sgd(), op=getattr(hvd, "Adasum", 2)),
        "twice": lambda: hvd.DistributedOptimizer(hvd.DistributedOptimizer(sgd())),
        "scaled twice": lambda: hvd.DistributedOptimizer(
            keras.optimizers.LossScaleOptimizer(hvd.DistributedOptimizer(sgd()))
        ),
        "no groups": lambda: hvd.DistributedOptimizer(sgd(), groups=0),
        "half a group": lambda: hvd.DistributedOptimizer(sgd(), groups=2.5),
        "no passes": lambda: hvd.DistributedOptimizer(sgd(), backward_passes_per_step=0),
        "predivided sum": lambda: hvd.DistributedOptimizer(
            sgd(), op=hvd.Sum, gradient_predivide_factor=2.0
        ),
        "a name": lambda: hvd.DistributedOptimizer("sgd"),
        "legacy": lambda: hvd.load_model("model.h5", legacy_opts=True),
        "no rate": lambda: hvd.callbacks.LearningRateWarmupCallback(initial_lr=None),
        "no model": lambda: hvd.callbacks.MetricAverageCallback().set_model(object()),
    }
    texts = {}
    for name, attempt in attempts.items():
        try:
            texts[name] = f"nothing was raised: {attempt()!r}"  # type: ignore[no-untyped-call]
        except (TypeError, ValueError) as error:
            texts[name] = str(error)
    return texts


def plain_optimizer(hvd: Any, directory: str) -> Any:
    """Train with an optimizer that somebody forgot to wrap."""
    import keras

    model, inputs, targets = _model(keras, hvd, keras.optimizers.SGD(0.1))
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    model.fit(inputs, targets, verbose=0, callbacks=[broadcast])
    return "trained"


def state_of_legacy_optimizers(hvd: Any, directory: str) -> Any:
    """Train on after the optimizer was loaded and then wrapped, and compare with one process."""
    import tensorflow as tf

    keras = tf.keras
    made: dict[str, Any] = {
        "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        "Adam": lambda: keras.optimizers.Adam(0.05),
        "decaying": lambda: keras.optimizers.Adam(
            keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
        ),
        "legacy SGD": lambda: keras.optimizers.legacy.SGD(0.1, momentum=0.9),
        "legacy Adam": lambda: keras.optimizers.legacy.Adam(0.05),
    }
    random = np.random.default_rng(0)
    inputs = random.normal(size=(16, 3)).astype("float32")
    targets = inputs.sum(axis=1, keepdims=True)
    found = {}
    for name, make in made.items():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.layers.Dense(1, input_shape=(3,))])
        model.compile(make(), "mse")
        model.fit(inputs, targets, batch_size=16, epochs=3, verbose=0, shuffle=False)
        path = f"{directory}/{name.replace(' ', '-')}-{hvd.rank()}.h5"
        model.save(path)
        alone, plain = keras.models.load_model(path), keras.models.load_model(path)
        plain.compile(hvd.DistributedOptimizer(plain.optimizer), "mse")
        alone.fit(inputs, targets, batch_size=16, epochs=3, verbose=0, shuffle=False)
        mine = slice(hvd.rank() * 8, hvd.rank() * 8 + 8)
        plain.fit(inputs[mine], targets[mine], batch_size=8, epochs=3, verbose=0, shuffle=False)
        found[name] = (_weights(plain), _weights(alone), int(plain.optimizer.iterations.numpy()))
    return _object_gatherer(hvd)(found)


def a_session(hvd: Any, directory: str) -> Any:
    """Train in a session of TensorFlow 1, as notebooks of that time do."""
    import horovod.tensorflow as hvd_tensorflow
    import tensorflow as tf

    with tf.Graph().as_default():
        weight = tf.compat.v1.get_variable("w", initializer=float(hvd.rank() + 1))
        step = tf.compat.v1.train.get_or_create_global_step()
        optimizer = tf.compat.v1.train.MomentumOptimizer(0.1, 0.9)
        optimizer = hvd_tensorflow.DistributedOptimizer(optimizer)
        train = optimizer.minimize(weight * 10.0 * hvd.rank(), global_step=step)
        with tf.control_dependencies([train]):
            after = weight.read_value()
        hooks = [
            hvd_tensorflow.BroadcastGlobalVariablesHook(0),
            tf.compat.v1.train.StopAtStepHook(last_step=2),
        ]
        with tf.compat.v1.train.MonitoredTrainingSession(hooks=hooks) as session:
            while not session.should_stop():
                found = float(session.run(after))
    with tf.Graph().as_default(), tf.compat.v1.Session():
        sent = hvd_tensorflow.broadcast_object_fn(root_rank=1)({"from": hvd.rank()})
    return _object_gatherer(hvd)((found, sent))


LEGACY_PARTS = (state_of_legacy_optimizers, a_session)
