"""From a record's JSON to a frozen dataclass: what is missing, unknown or of another type is a RecordError."""

from __future__ import annotations

import json
import math
import reprlib
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from laser.checkpoint.headers import is_deep
from laser.errors import RecordError

T = TypeVar("T")
LARGEST = sys.float_info.max
DEEPEST = 32  # objects and lists inside one another; our deepest record has 6, and writing stops at some hundreds
WORDS = {
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def parse(data: bytes | str) -> Any:
    """The document in a record's JSON. Raises ValueError for what is no JSON, or twice in it, or nested too deep."""
    try:
        document = json.loads(data, object_pairs_hook=each_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if is_deep(document, DEEPEST):
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    return document


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that is there twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        of = f"the entry of {found['name']}" if isinstance(found.get("name"), str) else "an object"
        raise ValueError(f"the key {named(twice)} is twice in {of[:200]}")
    return found


def decode(cls: type[T], found: Any, where: str, remedy: str, optional: Sequence[str] = ()) -> T:
    """The dataclass `cls` from a JSON object, whose keys must be its fields and whose values of their types.

    optional: fields that an earlier version did not write and that have a default. where: begins the error, as
    `plan.json: line 3 (NAME)`; remedy: ends it. Raises RecordError.
    """
    if not isinstance(found, dict):
        raise RecordError(f"{where} is {shown(found)}, expected an object; {remedy}")
    hints, names = get_type_hints(cls), [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType]
    require_keys(found, [name for name in names if name not in optional], optional, where, remedy)
    return cls(**{name: value_of(hints[name], found[name], name, where, remedy) for name in names if name in found})


def require_keys(
    found: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str], where: str, rest: str
) -> None:
    """Raises RecordError unless the object has the `needed` keys and no others than these and the `optional` ones."""
    if missing := [name for name in needed if name not in found]:
        raise RecordError(f"{where} has no key {missing[0]!r}, expected {', '.join(needed)}; {rest}")
    if unknown := next((name for name in found if name not in needed and name not in optional), None):
        expected = ", ".join([*needed, *optional])
        raise RecordError(f"{where} has a key {named(unknown)}, expected only {expected}; {rest}")


def has_shape(found: Mapping[str, Any], shape: Mapping[str, Any]) -> bool:
    """Whether an object has the keys of `shape` and no others, and values of its types."""
    if found.keys() != shape.keys():
        return False
    try:
        for name, hint in shape.items():
            _as(hint, found[name])
    except TypeError:
        return False
    return True


def value_of(hint: Any, found: Any, name: str, where: str, remedy: str) -> Any:
    """`found` as `hint` has it (a list for a tuple). Raises RecordError."""
    try:
        return _as(hint, found)
    except TypeError:
        told = f"{where}: {name} is {shown(found)}, expected {words(hint)}; {remedy}"
        raise RecordError(told) from None


def _as(hint: Any, found: Any) -> Any:
    """Raises TypeError. A whole number will do for a number, true and false for none; NaN and Infinity never do."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for one in inside:
            try:
                return _as(one, found)
            except TypeError:
                continue
        raise TypeError
    if hint is Any or (hint is dict and isinstance(found, dict)):
        return found
    if origin is tuple and isinstance(found, (list, tuple)):
        each = inside[:1] * len(found) if inside[-1] is Ellipsis else inside
        if len(each) != len(found):
            raise TypeError
        return tuple(map(_as, each, found))
    if origin is not None and isinstance(found, dict) and issubclass(origin, Mapping):
        return {_as(inside[0], key): _as(inside[1], x) for key, x in found.items()}
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(found, dict):
        hints = get_type_hints(hint)
        if found.keys() != hints.keys():
            raise TypeError
        return hint(**{key: _as(one, found[key]) for key, one in hints.items()})
    if isinstance(hint, type) and issubclass(hint, StrEnum) and found in list(hint):
        return hint(found)
    if hint is float and isinstance(found, int | float) and type(found) is not bool and abs(found) <= LARGEST:
        return found
    if isinstance(hint, type) and type(found) is hint and hint is not float:
        return found
    raise TypeError


def words(hint: Any) -> str:
    """A type, for people."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(words(one) for one in inside)
    if origin is tuple:
        return f"a list, each {words(inside[0])}" if inside[-1] is Ellipsis else "a list"
    if is_dataclass(hint):
        return f"an object of {' and '.join(field.name for field in fields(hint))}, each as laser writes it"
    return WORDS.get(hint, "an object")


WIDEST = 60  # characters of a value that a message repeats
_short = reprlib.Repr()  # looks no further into a value than it tells of it
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 3, 8, 16, 16
_short.maxstring = _short.maxlong = _short.maxother = WIDEST


def shown(found: Any, quote: str = '"') -> str:
    """A value as its file has it, shortened."""
    text = {None: "null", True: "true", False: "false"}.get(found) if type(found) in (bool, type(None)) else None
    text = text or (f"{quote}{found[:WIDEST]}{quote}" if isinstance(found, str) else _short.repr(found))
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."


def named(found: Any) -> str:
    """A value as its file has it, shortened, in the quotes of a name."""
    return shown(found, "'")


def require_finite(found: Any, where: str, remedy: str) -> None:
    """Raises RecordError for NaN or Infinity anywhere in a JSON value."""
    todo = [found]
    while todo:
        value = todo.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise RecordError(f"{where} holds {value}, expected a finite number; {remedy}")
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
