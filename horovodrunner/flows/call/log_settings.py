"""What the notebook has set up of logging, for main. Runs in: every process.

Levels become those of main's loggers. The console handlers become main's last resort: a record is
shown as it would be in the notebook as long as main sets up nothing itself.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from horovodrunner.flows.call.import_hook import after_import

__all__ = ["changed", "take_over"]

_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG", "NOTSET")


_OF_TORCH = ("torch.__", "strobelight_", "c10d-")
"""Loggers that torch sets up when it is imported."""


def changed(module: Any) -> dict[str, Any]:
    """Describe how logging is set up in this process, as far as it is not the default."""
    root, manager = module.root, module.Logger.manager
    loggers = {"": root, **manager.loggerDict}
    levels = {
        name: (logger.level, logger.propagate, logger.disabled)
        for name, logger in loggers.items()
        if _is_changed(name, logger)
    }
    found: dict[str, Any] = {
        "levels": {name: state for name, state in levels.items() if not _is_of_a_library(name)},
        "libraries": {name: state for name, state in levels.items() if _is_of_a_library(name)},
        "handlers": {
            name: handlers
            for name, logger in loggers.items()
            if type(logger) in (logging.Logger, logging.RootLogger)  # not of a library's own class
            and not _is_of_a_library(name)
            and (handlers := [each for each in map(_described, logger.handlers) if each])
        },
        "names": {
            level: name for level, name in module._levelToName.items() if name not in _LEVELS
        },
        "disabled": manager.disable,
        "warnings": module._warnings_showwarning is not None,
    }
    return {name: value for name, value in found.items() if value}


def _is_changed(name: str, logger: Any) -> bool:
    if name == "":
        return bool(logger.level != logging.WARNING or logger.disabled)
    if type(logger) is not logging.Logger or name.startswith(_OF_TORCH):
        return False  # a placeholder, or of a class that a library makes
    if name.partition(".")[0] == "torch" and logger.level in {logging.NOTSET, logging.WARNING}:
        return False  # it sets hundreds when it is imported
    return bool(logger.level or logger.disabled or not (logger.propagate or _is_of_a_library(name)))


def _is_of_a_library(name: str) -> bool:
    """Whether a module that is imported here has that name, which sets its logger up itself."""
    top = name.partition(".")[0]
    return name.startswith(_OF_TORCH) or (top != "__main__" and top in sys.modules)


def _described(handler: logging.Handler) -> tuple[bool, int, Any, list[Any]] | None:
    """Describe a handler that writes to the console; files are the driver's."""
    if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
        return None
    name = str(getattr(handler.stream, "name", "")).strip("<>")
    if handler.stream in (sys.stdout, sys.__stdout__) or name == "stdout":
        to_stdout = True
    elif handler.stream in (sys.stderr, sys.__stderr__) or name == "stderr":
        to_stdout = False
    else:
        return None
    return to_stdout, handler.level, handler.formatter, handler.filters


def take_over(module: Any, settings: dict[str, Any]) -> None:
    """Set logging up as another process has it."""
    for level, name in settings.get("names", {}).items():
        module.addLevelName(level, name)
    module.disable(settings.get("disabled", 0))
    for name, state in settings.get("levels", {}).items():
        _set(name, *state)
    for name, state in settings.get("libraries", {}).items():
        # not before: the library may want a class of its own for its loggers
        after_import(name.partition(".")[0], functools.partial(_set_later, name, state))
    if settings.get("warnings"):
        module.captureWarnings(True)
    if handlers := settings.get("handlers"):
        module.lastResort = _AsInTheNotebook(handlers, module.lastResort)
        if "" in handlers:
            module.basicConfig = _with_arguments_only(module.basicConfig)


def _set_later(name: str, state: tuple[int, bool, bool], _: Any) -> None:
    _set(name, *state)


def _set(name: str, level: int, propagate: bool, disabled: bool) -> None:
    logger = logging.getLogger(name or None)
    logger.setLevel(level)
    logger.propagate, logger.disabled = propagate, disabled


class _AsInTheNotebook(logging.Handler):
    """Shows records as the console handlers of the notebook's loggers do."""

    def __init__(self, described: dict[str, list[Any]], otherwise: logging.Handler | None) -> None:
        super().__init__()
        self._handlers = {
            name: [_handler(*each) for each in handlers] for name, handlers in described.items()
        }
        self._otherwise = otherwise

    def handle(self, record: logging.LogRecord) -> bool:
        """Hand a record to the handlers of its logger and of those above."""
        found: list[logging.Handler] = []
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            found += self._handlers.get("" if logger.parent is None else logger.name, ())
            logger = logger.parent if logger.propagate else None
        if not found and self._otherwise is not None:
            found.append(self._otherwise)
        for handler in found:
            if record.levelno >= handler.level:
                handler.handle(record)
        return True


def _handler(to_stdout: bool, level: int, formatter: Any, filters: list[Any]) -> logging.Handler:
    handler = logging.StreamHandler(sys.stdout if to_stdout else sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(formatter)
    for each in filters:
        handler.addFilter(each)
    return handler


def _with_arguments_only(basic_config: Any) -> Any:
    """Keep ``logging.info()`` from adding a handler of its own; main may still add one."""

    @functools.wraps(basic_config)
    def configure(**kwargs: Any) -> None:
        if kwargs:
            basic_config(**kwargs)

    return configure
