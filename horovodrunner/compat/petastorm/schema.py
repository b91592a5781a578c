"""Which columns rows have, before and after a TransformSpec. Runs in: every process."""

from __future__ import annotations

import keyword
import re
from collections import namedtuple
from collections.abc import Iterable, Sequence
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from horovodrunner.errors import ArgumentTypeError, ArgumentValueError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from horovodrunner.compat.petastorm.transform import TransformSpec

__all__ = ["Field", "Schema"]


class Field(NamedTuple):
    """One column."""

    name: str
    numpy_dtype: Any
    """What its values, or the elements of its arrays, are."""
    shape: tuple[int | None, ...]
    """Shape of one row's value; None where it differs or is not known."""
    codec: None = None
    nullable: bool = True
    is_edited: bool = False
    """Whether a TransformSpec says so."""


class Schema:
    """The columns of some rows, in their order."""

    def __init__(self, fields: Iterable[Field]) -> None:
        self.fields = {field.name: field for field in fields}

    @classmethod
    def of_arrow(cls, schema: pa.Schema) -> Schema:
        return cls(_field(each.name, each.type, each.nullable) for each in schema)

    def matching(self, patterns: Sequence[str] | None) -> Schema:
        """Choose the columns whose whole names a regular expression matches; None chooses all."""
        if patterns is None:
            return self
        if isinstance(patterns, str) or not all(isinstance(each, str) for each in patterns):
            raise ArgumentTypeError(
                f"schema_fields={patterns!r}: give a list of column names or regular expressions"
            )
        try:
            found = [
                field
                for name, field in self.fields.items()
                if any(
                    each == name if each in self.fields else re.fullmatch(each, name)
                    for each in patterns
                )
            ]
        except re.error as error:
            raise ArgumentValueError(
                f"schema_fields={patterns!r}: {error.pattern!r} is neither a column nor a regular "
                f"expression ({error}); there are {', '.join(self.fields)}"
            ) from None
        if not found:
            raise ArgumentValueError(
                f"schema_fields={patterns!r} matches no column; there are {', '.join(self.fields)}"
            )
        return Schema(found)

    def transformed(self, spec: TransformSpec) -> Schema:
        """Return the columns there are after a transformation.

        The others come unchanged, then those it edits; or its selected ones, in their order.
        """
        edited = [
            Field(name, dtype, tuple(shape), nullable=nullable, is_edited=True)
            for name, dtype, shape, nullable in spec.edit_fields
        ]
        names = {each.name for each in edited}
        fields = {each.name: each for each in self.fields.values() if each.name not in names}
        fields |= {each.name: each for each in edited}
        if spec.selected_fields is not None:
            unknown = [name for name in spec.selected_fields if name not in fields]
            if unknown:
                raise ArgumentValueError(
                    f"selected_fields has {', '.join(map(repr, unknown))}, and there is no such "
                    f"column: there are {', '.join(fields)}"
                )
            return Schema(fields[name] for name in spec.selected_fields)
        return Schema(each for name, each in fields.items() if name not in spec.removed_fields)

    @property
    def unfit_names(self) -> list[str]:
        """The columns that cannot be fields of a namedtuple."""
        return [
            name
            for name in self.fields
            if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_")
        ]

    @cached_property
    def row_class(self) -> Any:
        """The namedtuple that has these columns."""
        if unfit := self.unfit_names:
            raise DataError(
                f"the columns {', '.join(map(repr, unfit))} cannot be fields of Petastorm's rows, "
                "which are namedtuples: rename them in Spark (withColumnRenamed), or leave them "
                "out (schema_fields)"
            )
        return namedtuple("Row", self.fields)


def _field(name: str, arrow_type: pa.DataType, nullable: bool) -> Field:
    from pyarrow import types

    shape: list[int | None] = []
    while types.is_list(arrow_type) or types.is_fixed_size_list(arrow_type):
        shape.append(arrow_type.list_size if types.is_fixed_size_list(arrow_type) else None)
        arrow_type = arrow_type.value_type
    if types.is_string(arrow_type) or types.is_large_string(arrow_type):
        dtype: Any = np.str_
    elif types.is_binary(arrow_type) or types.is_large_binary(arrow_type):
        dtype = np.bytes_
    elif types.is_decimal(arrow_type):
        dtype = Decimal
    elif types.is_date(arrow_type) or types.is_timestamp(arrow_type):
        dtype = np.datetime64
    else:
        dtype = arrow_type.to_pandas_dtype()
    return Field(name, dtype, tuple(shape), nullable=nullable)
