"""MetricsCallback for Hugging Face's Trainer. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from horovodrunner.callbacks.bases import Reporter, WithFrameworkBase, base_classes

__all__ = ["MetricsCallback"]


class MetricsCallback(WithFrameworkBase):
    """Reports what Hugging Face's Trainer logs, and how many steps are done.

    For ``Trainer(..., callbacks=[MetricsCallback()])`` of ``transformers``; the step is the
    Trainer's global step. See :mod:`horovodrunner.metrics`.
    """

    def __new__(cls) -> MetricsCallback:
        """Make an instance whose class has the Trainer's own base class."""
        bases = base_classes(("transformers",), "TrainerCallback")
        instance: MetricsCallback = cls._with_bases(*bases)
        return instance

    def __init__(self) -> None:
        super().__init__()
        self._reporter = Reporter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a progress bar; the Trainer calls it."""
        self._reporter.open("step", state.max_steps or None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar; the Trainer calls it."""
        self._reporter.at(state.global_step)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report a point; the Trainer calls it."""
        self._reporter.report(state.global_step, logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the bar; the Trainer calls it."""
        self._reporter.close()
