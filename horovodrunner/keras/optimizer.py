"""An optimizer that reduces its gradients over the ranks. Runs in: the worker."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import keras

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.keras.backend import collectives, hvd
from horovodrunner.keras.options import Options, key
from horovodrunner.processes.worker.context import log_to_driver

__all__ = ["DistributedOptimizer", "is_distributed", "load_model"]

_ordinals = count()
_done_once: set[str] = set()


def DistributedOptimizer(  # noqa: N802, PLR0917 - Horovod's name and signature
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = hvd.Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = hvd.Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[Any]] | None = None,
    process_set: Any = hvd.global_process_set,
    scale_local_gradients: bool = True,
) -> Any:
    """Make an optimizer reduce its gradients over the ranks before it applies them.

    The same object comes back, with all it has learnt so far; it stays an instance of its class,
    and models are saved with it as with the plain optimizer. The signature is Horovod's.

    Parameters
    ----------
    optimizer
        A Keras 3 optimizer. A ``LossScaleOptimizer`` may be wrapped, or wrap the result.
    name
        Prefix of the collectives' names; ``Distributed`` and the optimizer's class by default.
    device_dense, device_sparse
        Where dense and sparse gradients are reduced, as in ``tf.device``; not with torch.
    compression
        One of ``hvd.Compression``.
    sparse_as_dense
        Reduce sparse gradients as dense ones; with torch they always are.
    gradient_predivide_factor
        With Average: gradients are divided by it before the sum and multiplied after.
    op
        ``hvd.Average`` or ``hvd.Sum``.
    backward_passes_per_step
        Gradients of so many batches are added up on each rank before they are reduced and applied.
        ``optimizer.iterations`` counts what is applied, or Adam would correct its bias wrongly.
    average_aggregated_gradients
        Divide that sum by `backward_passes_per_step`.
    num_groups
        Older name of `groups`.
    groups
        Number of groups in which gradients are reduced, or lists of variables, a group each.
    process_set
        The ranks that take part.
    scale_local_gradients
        Divide gradients of variables given to ``register_local_var`` by the number of ranks.

    Raises
    ------
    ArgumentTypeError
        If `optimizer` is no Keras 3 optimizer.
    ArgumentValueError
        If an argument has a value that cannot work, or the optimizer is distributed already.

    Examples
    --------
    >>> optimizer = DistributedOptimizer(keras.optimizers.SGD(0.1))  # doctest: +SKIP
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ArgumentTypeError(
            f"DistributedOptimizer() got {optimizer!r:.80}: it takes an optimizer of Keras "
            f"{keras.__version__}, such as keras.optimizers.SGD(0.1)"
        )
    if is_distributed(optimizer):
        raise ArgumentValueError(
            f"this {type(optimizer).__name__} is distributed already: wrap an optimizer once"
        )
    if op not in (hvd.Average, hvd.Sum):
        raise ArgumentValueError(
            f"op={op!r}: Horovod's optimizer for Keras takes Average and Sum only"
        )
    backward_passes_per_step = checked.integer(
        "backward_passes_per_step", backward_passes_per_step, at_least=1
    )
    gradient_predivide_factor = checked.number(
        "gradient_predivide_factor", gradient_predivide_factor
    )
    if gradient_predivide_factor != 1.0 and op != hvd.Average:
        raise ArgumentValueError(
            f"gradient_predivide_factor={gradient_predivide_factor}: it is for op=Average"
        )
    if num_groups:
        warnings.warn("num_groups is now called groups", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    if groups is not None and not isinstance(groups, (list, tuple)):
        groups = checked.integer("groups", groups, at_least=1)
    options = Options(
        name=name or f"Distributed{type(optimizer).__name__}",
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        op=op,
        passes_per_step=backward_passes_per_step,
        averages_passes=average_aggregated_gradients,
        groups=groups,
        process_set=process_set,
        scales_local_gradients=scale_local_gradients,
    )
    return _distribute(optimizer, options)


def is_distributed(optimizer: Any) -> bool:
    """Return whether an optimizer, or the one in a ``LossScaleOptimizer``, is distributed."""
    inner = getattr(optimizer, "inner_optimizer", None)
    return isinstance(optimizer, _Distributed) or isinstance(inner, _Distributed)


class _Distributed:
    """What a distributed optimizer's class has on top of the wrapped one's."""

    _horovod_options: Options

    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> None:
        """Reduce the gradients over the ranks, then apply them as the wrapped class does."""
        collectives.refuse_compiled_graph()
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is None:
            variables = list(self._trainable_variables)
        else:
            variables = list(trainable_variables)
            if not self.built:  # before a branch of the graph would do it
                self.build(variables)
        apply_plainly = super().apply  # type: ignore[misc]
        options = self._named_options()
        local: set[Hashable] = self.__dict__.get("_horovod_local", set())
        if options.passes_per_step == 1:
            apply_plainly(collectives.reduce(options, grads, variables, local), variables)
            return
        if "_horovod_passes" not in self.__dict__:
            self.__dict__["_horovod_passes"] = collectives.Passes()
        passes = self.__dict__["_horovod_passes"]
        totals = passes.add(grads, variables)

        def step() -> None:
            divisor = options.passes_per_step if options.averages_passes else 1
            sums = [None if total is None else total / divisor for total in totals]
            apply_plainly(collectives.reduce(options, sums, variables, local), variables)
            passes.clear()

        collectives.do_if(passes.is_last_of(options.passes_per_step), step)

    def register_local_var(self: Any, variable: Any) -> None:
        """Leave the gradient of a variable of the model out of the reduction."""
        self.__dict__.setdefault("_horovod_local", set()).add(key(variable))

    def _named_options(self: Any) -> Options:
        """Return the options with a name that no other optimizer's collectives have.

        Optimizers get their number when they are first used, which all ranks do in the same order.
        """
        if "_horovod_named" not in self.__dict__:
            options = self._horovod_options
            named = replace(options, name=f"{options.name}.{next(_ordinals)}")
            self.__dict__["_horovod_named"] = named
        found: Options = self.__dict__["_horovod_named"]
        return found

    def __reduce__(self) -> Any:
        """Copy and pickle it as Keras does with the plain optimizer, which it is not to become."""
        reduced: Any = super().__reduce__()
        plain = type(self).__bases__[1]
        return _distribute_copy, (plain, reduced[1], self._horovod_options)


def _distribute_copy(plain: Any, arguments: tuple[Any, ...], options: Options) -> Any:
    return _distribute(plain._unpickle_model(*arguments), options)


def _distribute(optimizer: Any, options: Options) -> Any:
    _teach_keras()
    optimizer.__class__ = _distributed_class(type(optimizer), options)
    return optimizer


def _distributed_class(plain: type, options: Options) -> type:
    from keras.src import api_export
    from keras.src.saving import object_registration

    # Name and module are the plain class's, so that a saved model needs nothing from here.
    distributed = type(
        plain.__name__,
        (_Distributed, plain),
        {
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            "_horovod_options": options,
        },
    )
    for names in (api_export.REGISTERED_OBJS_TO_NAMES, object_registration.GLOBAL_CUSTOM_NAMES):
        if plain in names:
            names[distributed] = names[plain]
    return distributed


def _teach_keras() -> None:
    """Change two answers that Keras gives about distributed optimizers: jit and finiteness."""
    if "taught" in _done_once:
        return
    _done_once.add("taught")
    from keras.src.trainers import trainer

    supports_jit: Callable[[Any], bool] = trainer.model_supports_jit

    def model_supports_jit(model: Any) -> bool:
        if is_distributed(getattr(model, "optimizer", None)):
            _note_not_compiled()
            return False
        return supports_jit(model)

    trainer.model_supports_jit = model_supports_jit

    loss_scale_class = keras.optimizers.LossScaleOptimizer
    check_finite_here = loss_scale_class.check_finite

    def check_finite(self: Any, grads: Any) -> Any:
        finite = check_finite_here(self, grads)
        inner = self.inner_optimizer
        if not isinstance(inner, _Distributed):
            return finite
        # One rank must not skip a step while the others wait for its gradients.
        return collectives.is_finite_everywhere(inner._named_options(), finite)

    loss_scale_class.check_finite = check_finite


def _note_not_compiled() -> None:
    if "compiled" in _done_once or not hvd.is_initialized() or hvd.rank() != 0:
        return
    _done_once.add("compiled")
    log_to_driver(
        "HorovodRunner: models with a DistributedOptimizer are trained without jit_compile, "
        "because what it compiles cannot contain Horovod's collectives"
    )


def load_model(
    filepath: Any,
    custom_optimizers: Iterable[type] | None = None,
    custom_objects: dict[str, Any] | None = None,
    compression: Any = hvd.Compression.none,
    legacy_opts: bool = False,
) -> Any:
    """Load a saved model and make its optimizer, if it has one, distributed, state included.

    Parameters
    ----------
    filepath
        As for ``keras.models.load_model``.
    custom_optimizers
        Optimizer classes of your own.
    custom_objects
        Other classes and functions, by name.
    compression
        One of ``hvd.Compression``.
    legacy_opts
        Not for Keras 3: an ArgumentValueError if true.
    """
    if legacy_opts:
        raise ArgumentValueError("legacy_opts=True: Keras 3 has no legacy optimizers")
    objects = {each.__name__: each for each in custom_optimizers or ()}
    model = keras.models.load_model(filepath, custom_objects={**objects, **(custom_objects or {})})
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not is_distributed(optimizer):
        DistributedOptimizer(optimizer, compression=compression)
    return model
