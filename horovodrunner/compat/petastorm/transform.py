"""What is done to rows before they become batches. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from horovodrunner.compat.absent import PETASTORM, refuse_names
from horovodrunner.errors import ArgumentValueError

__all__ = ["TransformSpec", "edit_field"]

__getattr__ = refuse_names("petastorm.transform", PETASTORM)

EditedField = tuple[str, Any, tuple[int | None, ...], bool]


def edit_field(
    name: str, numpy_dtype: Any, shape: tuple[int | None, ...], nullable: bool = False
) -> EditedField:
    """Describe a column that a function adds or changes, for :class:`TransformSpec`.

    Examples
    --------
    >>> edit_field("image", "float32", (3, 224, 224))
    ('image', 'float32', (3, 224, 224), False)
    """
    return name, numpy_dtype, shape, nullable


class TransformSpec:
    """A function on pandas DataFrames, and which columns there are after it.

    Parameters
    ----------
    func
        Gets the rows of a batch as a pandas DataFrame and returns as many rows in one; arrays are
        objects in its columns.
    edit_fields
        Tuples of name, NumPy type, shape and nullability of each column that it adds or changes.
    removed_fields
        Names of the columns that are not there afterwards.
    selected_fields
        Instead: names of those that are, in their order.

    Raises
    ------
    ArgumentValueError
        If both, `removed_fields` and `selected_fields`, are given.
    """

    def __init__(
        self,
        func: Callable[[Any], Any] | None = None,
        edit_fields: Sequence[EditedField] | None = None,
        removed_fields: Sequence[str] | None = None,
        selected_fields: Sequence[str] | None = None,
    ) -> None:
        if removed_fields is not None and selected_fields is not None:
            raise ArgumentValueError(
                f"removed_fields={removed_fields!r} and selected_fields={selected_fields!r}: "
                "give one of them"
            )
        self.func = func
        self.edit_fields = edit_fields or []
        self.removed_fields = removed_fields or []
        self.selected_fields = selected_fields
