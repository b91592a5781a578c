"""What is to run on every rank, as the driver knows it. Runs in: the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from horovodrunner.flows.call.called import name_of
from horovodrunner.flows.call.early_imports import early_imports
from horovodrunner.flows.call.record import RunRecord
from horovodrunner.formatting import format_bytes
from horovodrunner.pickling import payload
from horovodrunner.processes.driver.interactive import program_arguments

if TYPE_CHECKING:
    from horovodrunner.data.unshared import UnsharedDataSet

__all__ = ["Call", "FunctionCall", "PickledCall"]


class PickledCall(NamedTuple):
    """What travels to every rank."""

    content: bytes
    early_imports: tuple[str, ...]
    """Modules that workers may import before they have the content."""
    data: tuple[UnsharedDataSet, ...] = ()
    """Data sets that the content names; their rows travel beside it."""


class Call(Protocol):
    """A function or a script, with its arguments."""

    @property
    def name(self) -> str: ...

    @property
    def named_arguments(self) -> Mapping[str, Any]: ...

    @property
    def what(self) -> str:
        """What its pickle's size is the size of, with the verb."""

    def pickle(self) -> PickledCall: ...

    def advice(self) -> str:
        """Name what is large in it, and say what to do where it is too large."""

    def record(self, run_id: str, size: int, *, exactly: bool = False) -> RunRecord: ...


class FunctionCall:
    """A training function, and the keyword arguments that it was checked to take."""

    what = "the pickled main and its arguments have"

    def __init__(self, main: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        self._main = main
        self.name = name_of(main)
        self.named_arguments = arguments

    def pickle(self) -> PickledCall:
        """Pickle both; a PayloadError names what cannot be."""
        with payload.attachments() as data:
            content = payload.dump_call(self._main, self.named_arguments, program_arguments())
        return PickledCall(content, early_imports(self._main, content), tuple(data.values()))

    def advice(self) -> str:
        """Name the largest variables and arguments."""
        least = payload.WARN_BYTES // 10
        parts = payload.largest_parts(self._main, self.named_arguments, at_least_bytes=least)
        named = "; ".join(f"{where} ({format_bytes(size)})" for where, size in parts)
        return (f". Largest: {named}" if named else "") + ". Load large data inside main instead"

    def record(self, run_id: str, size: int, *, exactly: bool = False) -> RunRecord:
        """Record what a run calls; `exactly` leaves no difference out."""
        from horovodrunner.flows.call.recording import record_call

        return record_call(run_id, size, self._main, self.named_arguments, exactly=exactly)
