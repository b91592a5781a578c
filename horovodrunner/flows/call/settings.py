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
from typing import Any, NamedTuple

from horovodrunner.flows.call import log_settings

__all__ = ["changed_settings", "take_over"]

_DEFAULT_RECURSION_LIMIT = 1000


class _Setting(NamedTuple):
    """One setting of a library, whose module `read` and `write` get."""

    default: Any
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], object]


def _attribute(path: str, default: Any) -> _Setting:
    *owners, name = path.split(".")

    def owner(module: Any) -> Any:
        for each in owners:
            module = getattr(module, each)
        return module

    return _Setting(
        default,
        lambda module: getattr(owner(module), name),
        lambda module, value: setattr(owner(module), name, value),
    )


def _print_options_of_numpy(numpy: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in numpy.get_printoptions().items()
        if value != _NUMPY_PRINTS.get(name, value)
    }


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

_TORCH_PRINTS = {
    "precision": 4,
    "threshold": 1000,
    "edgeitems": 3,
    "linewidth": 80,
    "sci_mode": None,
}


def _options_of_pandas(pandas: Any) -> dict[str, Any]:
    options = sys.modules["pandas._config.config"]
    changed = {}
    for name, option in options._registered_options.items():
        if name in options._deprecated_options:
            continue
        value = pandas.get_option(name)
        if value is not option.defval and value != option.defval:
            changed[name] = value
    return changed


def _set_options_of_pandas(pandas: Any, changed: dict[str, Any]) -> None:
    for name, value in changed.items():
        with contextlib.suppress(pandas.errors.OptionError):  # of another version
            pandas.set_option(name, value)


def _decimal_context(module: Any) -> dict[str, Any] | None:
    now, default = module.getcontext(), module.DefaultContext
    names = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp", "traps")
    if all(getattr(now, name) == getattr(default, name) for name in names):
        return None
    return {**{name: getattr(now, name) for name in names}, "traps": dict(now.traps)}


def _set_decimal_context(module: Any, changed: dict[str, Any]) -> None:
    for name, value in changed.items():
        setattr(module.getcontext(), name, value)


def _keras_policy(module: Any) -> str | None:
    """Name the policy of all layers, unless it follows from the type of floating-point numbers."""
    if hasattr(module, "config") and hasattr(module.config, "dtype_policy"):
        name = module.config.dtype_policy().name
    else:
        name = module.mixed_precision.global_policy().name
    return None if name in {"_infer", _floats(module).floatx()} else str(name)


def _set_keras_policy(module: Any, name: str) -> None:
    if hasattr(module, "config") and hasattr(module.config, "set_dtype_policy"):
        module.config.set_dtype_policy(name)
    else:
        module.mixed_precision.set_global_policy(name)


def _floats(module: Any) -> Any:
    """Return where a Keras keeps these settings: 3 in ``config``, 2 in ``backend``."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "floatx") else module.backend


def _switch(default: bool, read: str, on: str, off: str) -> _Setting:
    def write(module: Any, value: bool) -> None:
        getattr(module.config, on if value else off)()

    return _Setting(default, lambda module: getattr(module.config, read)(), write)


_KERAS: dict[str, _Setting] = {
    "floatx": _Setting(
        "float32", lambda k: _floats(k).floatx(), lambda k, v: _floats(k).set_floatx(v)
    ),
    "epsilon": _Setting(
        1e-7, lambda k: _floats(k).epsilon(), lambda k, v: _floats(k).set_epsilon(v)
    ),
    "image_data_format": _Setting(
        "channels_last",
        lambda k: _floats(k).image_data_format(),
        lambda k, v: _floats(k).set_image_data_format(v),
    ),
    "dtype_policy": _Setting(None, _keras_policy, _set_keras_policy),
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
        "context": _Setting(
            None,
            _decimal_context,
            _set_decimal_context,
        ),
    },
    "numpy": {
        "seterr": _Setting(
            {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"},
            lambda np: np.geterr(),
            lambda np, value: np.seterr(**value),
        ),
        "seterrcall": _Setting(None, lambda np: np.geterrcall(), lambda np, v: np.seterrcall(v)),
        "printoptions": _Setting(
            {}, _print_options_of_numpy, lambda np, value: np.set_printoptions(**value)
        ),
    },
    "pandas": {"options": _Setting({}, _options_of_pandas, _set_options_of_pandas)},
    "torch": {
        "default_dtype": _Setting(
            "float32",
            lambda torch: str(torch.get_default_dtype()).removeprefix("torch."),
            lambda torch, name: torch.set_default_dtype(getattr(torch, name)),
        ),
        "float32_matmul_precision": _Setting(
            "highest",
            lambda torch: torch.get_float32_matmul_precision(),
            lambda torch, value: torch.set_float32_matmul_precision(value),
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
        "detect_anomaly": _Setting(
            False,
            lambda torch: torch.is_anomaly_enabled(),
            lambda torch, value: torch.autograd.set_detect_anomaly(value),
        ),
        "printoptions": _Setting(
            _TORCH_PRINTS,
            lambda torch: dict(vars(torch._tensor_str.PRINT_OPTS)),
            lambda torch, value: torch.set_printoptions(**value),
        ),
        "sharing_strategy": _Setting(
            "file_descriptor",
            lambda torch: torch.multiprocessing.get_sharing_strategy(),
            lambda torch, value: torch.multiprocessing.set_sharing_strategy(value),
        ),
    },
    "keras": {
        **_KERAS,
        "traceback_filtering": _switch(
            True,
            "is_traceback_filtering_enabled",
            "enable_traceback_filtering",
            "disable_traceback_filtering",
        ),
        "interactive_logging": _switch(
            True,
            "is_interactive_logging_enabled",
            "enable_interactive_logging",
            "disable_interactive_logging",
        ),
    },
    "tf_keras": _KERAS,
    "tensorflow": {
        "TensorFlow 1": _Setting(
            "", _legacy_tensorflow, lambda tf, name: getattr(tf.compat.v1, name)()
        ),
        "run_functions_eagerly": _Setting(
            False,
            lambda tf: tf.config.functions_run_eagerly(),
            lambda tf, value: tf.config.run_functions_eagerly(value),
        ),
        "tensor_float_32_execution": _Setting(
            True,
            lambda tf: tf.config.experimental.tensor_float_32_execution_enabled(),
            lambda tf, value: tf.config.experimental.enable_tensor_float_32_execution(value),
        ),
    },
}
"""By library; those of one library are set in this order."""


def changed_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Look which settings were changed in this process."""
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
    for name, setting in _SETTINGS.get(library, {}).items():
        if name not in changed:
            continue
        try:
            setting.write(sys.modules[library], changed[name])
        except Exception as error:  # noqa: BLE001 - another version of the library
            warnings.warn(
                f"the driver's setting of {library}, {name}={changed[name]!r:.100}, does not work "
                f"here: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
