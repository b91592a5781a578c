"""Enumerations that travel by value, with all that their members have. Runs in: every process.

cloudpickle makes members of their values alone: without aliases, without what ``__init__`` or
``__new__`` gave them, and not at all where a value is no argument of the mixed-in type.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from cloudpickle import cloudpickle

__all__ = ["make_enum", "with_members"]

_OF_THE_METACLASS = frozenset({"__objclass__", "_name_", "_sort_order_", "_value_"})

_Member = tuple[str, tuple[Any, ...], Any]
"""Its name, the arguments for the mixed-in type, and its value."""


def with_members(kind: enum.EnumMeta, reduced: Any) -> Any:
    """Make an enumeration's members travel as they are."""
    make, args, (attributes, slots), items, pairs, set_state = reduced
    if make is not cloudpickle._make_skeleton_enum:
        return reduced
    bases, name, qualname, _, module, tracker, _ = args
    all_: dict[str, Any] = dict(kind.__members__)
    members = [(each, _arguments(kind, of), of.value) for each, of in all_.items()]
    attributes = {key: value for key, value in attributes.items() if key not in all_}
    if "_generate_next_value_" in vars(kind):
        attributes["_generate_next_value_"] = vars(kind)["_generate_next_value_"]
    given = {
        each: {k: v for k, v in vars(of).items() if k not in _OF_THE_METACLASS}
        for each, of in all_.items()
    }
    boundary = getattr(kind, "_boundary_", None)
    made = (bases, name, qualname, members, boundary, module, tracker)
    state = ((attributes, slots), given, set_state)
    return make_enum, made, state, items, pairs, _set_state


def _arguments(kind: Any, member: Any) -> tuple[Any, ...]:
    mixed_in = kind._member_type_
    if mixed_in is object:
        return ()
    if hasattr(mixed_in, "__getnewargs__"):
        return tuple(mixed_in.__getnewargs__(member))
    if mixed_in.__new__ is object.__new__:  # its attributes are all there is of it
        return ()
    value = member._value_
    return value if isinstance(value, tuple) else (value,)


def make_enum(  # noqa: PLR0917 - unpickling passes them by position
    bases: tuple[Any, ...],
    name: str,
    qualname: str,
    members: Sequence[_Member],
    boundary: Any,
    module: str,
    tracker: str,
) -> Any:
    """Make an enumeration, unless it is one of this process that comes back."""
    known = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker)
    if known is not None:
        return known
    metaclass: Any = type(bases[-1])
    namespace = metaclass.__prepare__(name, bases)
    namespace["__new__"], namespace["__init__"] = _new_member, _init_member
    for each, arguments, value in members:
        namespace[each] = (arguments, value)
    options = {} if boundary is None else {"boundary": boundary}
    kind = metaclass.__new__(metaclass, name, bases, namespace, **options)
    type.__delattr__(kind, "__init__")
    kind.__module__, kind.__qualname__ = module, qualname
    return cloudpickle._lookup_class_or_track(tracker, kind)


def _new_member(kind: Any, *given: Any) -> Any:
    arguments, value = given if len(given) == 2 else given[0]  # one more tuple around, for tuples
    member = kind._member_type_.__new__(kind, *arguments)
    member._value_ = value
    return member


def _init_member(self: Any, *given: Any) -> None:
    pass


def _set_state(kind: Any, state: Any) -> None:
    own, given, set_state = state
    set_state(kind, own)
    if "__new_member__" not in own[0] and vars(kind).get("__new_member__") is _new_member:
        type.__delattr__(kind, "__new_member__")
    for name, attributes in given.items():
        vars(kind[name]).update(attributes)
