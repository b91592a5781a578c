"""Settings of libraries that main is to find as the notebook left them. Runs in: every process.

A setting travels when it means the same in another process on another machine, and only if it was
changed. Seeds, devices and threads do not: docs/how-it-works.md has the whole list. No library is
imported for its settings: they wait until main imports it.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

from horovodrunner.flows.call import log_settings

__all__ = ["changed_settings", "take_over"]

_DEFAULT_RECURSION_LIMIT = 1000


class _Setting(NamedTuple):
    """`read` returns a setting of the library whose module it gets, and `write` sets it."""

    default: Any
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], object]


def _attribute(path: str, default: Any) -> _Setting:
    owner, _, name = path.rpartition(".")
    return _Setting(
        default,
        attrgetter(path),
        lambda module, value: setattr(attrgetter(owner)(module), name, value),
    )


def _functions(default: Any, read: str, write: str) -> _Setting:
    """Return a setting that two functions of the library read and write."""
    return _Setting(
        default,
        lambda module: attrgetter(read)(module)(),
        lambda module, value: attrgetter(write)(module)(value),
    )


def _keras_switch(name: str) -> _Setting:
    def write(keras: Any, value: bool) -> None:
        getattr(keras.config, f"{'enable' if value else 'disable'}_{name}")()

    return _Setting(True, lambda keras: getattr(keras.config, f"is_{name}_enabled")(), write)


def _decimal_context(decimal: Any) -> Any:
    context, default = decimal.getcontext().copy(), decimal.DefaultContext.copy()
    context.clear_flags()
    default.clear_flags()
    return None if repr(context) == repr(default) else context


_NUMPY_PRINTS = {
    "edgeitems": 3,
    "threshold": 1000,
    "floatmode": "maxprec",
    "precision": 8,
    "suppress": False,
    "linewidth": 75,
    "nanstr": "nan",
    "infstr": "inf",
    "sign": "-",
    "formatter": None,
    "legacy": False,
}


def _numpy_print_options(numpy: Any) -> dict[str, Any]:
    options = numpy.get_printoptions().items()
    return {name: value for name, value in options if value != _NUMPY_PRINTS.get(name, value)}


def _pandas_options(pandas: Any) -> dict[str, Any]:
    options = sys.modules["pandas._config.config"]
    changed = {}
    for name, option in options._registered_options.items():
        if name in options._deprecated_options:
            continue
        value = pandas.get_option(name)
        if value is not option.defval and value != option.defval:
            changed[name] = value
    return changed


def _set_pandas_options(pandas: Any, changed: dict[str, Any]) -> None:
    for name, value in changed.items():
        with contextlib.suppress(pandas.errors.OptionError):  # of another version
            pandas.set_option(name, value)


def _keras_policy(keras: Any) -> str | None:
    """Name the policy of all layers, unless it follows from the type of floating-point numbers."""
    name = keras.mixed_precision.global_policy().name
    return None if name in {"_infer", keras.backend.floatx()} else str(name)


_KERAS: dict[str, _Setting] = {
    "floatx": _functions("float32", "backend.floatx", "backend.set_floatx"),
    "epsilon": _functions(1e-7, "backend.epsilon", "backend.set_epsilon"),
    "image_data_format": _functions(
        "channels_last", "backend.image_data_format", "backend.set_image_data_format"
    ),
    "dtype_policy": _Setting(
        None, _keras_policy, lambda keras, name: keras.mixed_precision.set_global_policy(name)
    ),
}


def _legacy_tensorflow(tf: Any) -> str:
    if not tf.__internal__.tf2.enabled():
        return "disable_v2_behavior"
    eager = tf.compat.v1.executing_eagerly_outside_functions()
    return "" if eager else "disable_eager_execution"


_SETTINGS: dict[str, dict[str, _Setting]] = {
    "sys": {
        "recursion limit": _Setting(
            _DEFAULT_RECURSION_LIMIT,
            lambda module: max(_DEFAULT_RECURSION_LIMIT, module.getrecursionlimit()),
            lambda module, value: module.setrecursionlimit(max(value, module.getrecursionlimit())),
        ),
    },
    "logging": {"logging": _Setting({}, log_settings.changed, log_settings.take_over)},
    "decimal": {
        "context": _Setting(None, _decimal_context, lambda module, value: module.setcontext(value))
    },
    "numpy": {
        "seterr": _Setting(
            {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"},
            lambda np: np.geterr(),
            lambda np, value: np.seterr(**value),
        ),
        "seterrcall": _functions(None, "geterrcall", "seterrcall"),
        "printoptions": _Setting(
            {}, _numpy_print_options, lambda np, value: np.set_printoptions(**value)
        ),
    },
    "pandas": {"options": _Setting({}, _pandas_options, _set_pandas_options)},
    "torch": {
        "default_dtype": _Setting(
            "float32",
            lambda torch: str(torch.get_default_dtype()).removeprefix("torch."),
            lambda torch, name: torch.set_default_dtype(getattr(torch, name)),
        ),
        "float32_matmul_precision": _functions(
            "highest", "get_float32_matmul_precision", "set_float32_matmul_precision"
        ),
        "deterministic_algorithms": _Setting(
            (False, False),
            lambda torch: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda torch, value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        ),
        "cudnn.benchmark": _attribute("backends.cudnn.benchmark", False),
        "cudnn.deterministic": _attribute("backends.cudnn.deterministic", False),
        "cudnn.enabled": _attribute("backends.cudnn.enabled", True),
        "cudnn.allow_tf32": _attribute("backends.cudnn.allow_tf32", True),
        "cuda.matmul.allow_tf32": _attribute("backends.cuda.matmul.allow_tf32", False),
        "detect_anomaly": _functions(False, "is_anomaly_enabled", "autograd.set_detect_anomaly"),
        "printoptions": _Setting(
            {
                "precision": 4,
                "threshold": 1000,
                "edgeitems": 3,
                "linewidth": 80,
                "sci_mode": None,
            },
            lambda torch: dict(vars(torch._tensor_str.PRINT_OPTS)),
            lambda torch, value: torch.set_printoptions(**value),
        ),
        "sharing_strategy": _functions(
            "file_descriptor",
            "multiprocessing.get_sharing_strategy",
            "multiprocessing.set_sharing_strategy",
        ),
    },
    "keras": {
        **_KERAS,
        "traceback_filtering": _keras_switch("traceback_filtering"),
        "interactive_logging": _keras_switch("interactive_logging"),
    },
    "tf_keras": _KERAS,
    "tensorflow": {
        "TensorFlow 1": _Setting(
            "", _legacy_tensorflow, lambda tf, name: getattr(tf.compat.v1, name)()
        ),
        "run_functions_eagerly": _functions(
            False, "config.functions_run_eagerly", "config.run_functions_eagerly"
        ),
        "tensor_float_32_execution": _functions(
            True,
            "config.experimental.tensor_float_32_execution_enabled",
            "config.experimental.enable_tensor_float_32_execution",
        ),
    },
}
"""By library; those of one library are set in this order."""


def changed_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the libraries that are imported with their settings that were changed here."""
    for library, settings in _SETTINGS.items():
        module = sys.modules.get(library)
        if module is None:
            continue
        changed = {}
        for name, setting in settings.items():
            with contextlib.suppress(Exception):  # another version of the library
                value = setting.read(module)
                if value != setting.default:
                    changed[name] = value
        if changed:
            yield library, changed


def take_over(library: str, changed: dict[str, Any]) -> None:
    """Set what :func:`changed_settings` found in another process."""
    for name, value in changed.items():
        try:
            _SETTINGS[library][name].write(sys.modules[library], value)
        except Exception as error:  # noqa: BLE001 - another version of the library
            warnings.warn(
                f"the driver's setting of {library}, {name}={value!r:.100}, does not work "
                f"here: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
