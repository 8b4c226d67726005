"""Trees of JSON, and dataclasses as such trees."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache, partial
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


# Larger than the index or the record of any checkpoint; in memory each entry takes about a hundred bytes.
MOST_ENTRIES = 2_000_000


def parsed(raw: bytes) -> Any:
    """The tree that a JSON text is; raises ValueError for what is none, or would take gigabytes of memory.

    RecursionError is raised for one that is too deep.
    """
    entries = sum(map(raw.count, (b",", b"[", b"{")))
    if entries > MOST_ENTRIES:
        raise ValueError(f"more than {MOST_ENTRIES:,} entries")
    return json.loads(raw)


def finite(value: Any) -> Any:
    """The same tree for JSON, which has no NaN: a number that is none is null.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def encoded(value: Any) -> Any:
    """A dataclass, or whatever holds some, as a tree of JSON; the kind of a Tagged one is in its field `kind`.

    >>> encoded((1.0, {"a": None}))
    [1.0, {'a': None}]
    """
    if is_dataclass(value) and not isinstance(value, type):
        tag = {"kind": kind_of(type(value))} if isinstance(value, Tagged) else {}
        return {**tag, **{each.name: encoded(getattr(value, each.name)) for each in fields(value)}}
    if isinstance(value, Mapping):
        return {key: encoded(each) for key, each in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple | list):
        # Of checksums there are many.
        return list(value) if all(type(each) is str for each in value) else [encoded(each) for each in value]
    return value


class Tagged:
    """A dataclass that is one of several in the same place of a tree, which its field `kind` tells apart."""

    __slots__ = ()


def kind_of(kind: type) -> str:
    """What a Tagged class is called in JSON.

    >>> kind_of(Tagged)
    'tagged'
    """
    return kind.__name__.lower()


def decoded(kind: Any, tree: Any) -> Any:
    """The value of a type that a tree of JSON is, as `encoded` made it; fields that the type does not have are ignored.

    Types are dataclasses, tuples, sets, mappings from text, unions of Tagged dataclasses, StrEnums, text, numbers and
    None. Raises TypeError, ValueError or LookupError for a tree that is none of that type.

    >>> decoded(tuple[int | None, ...], [1, None])
    (1, None)
    """
    return _decoder(kind)(tree)


@cache
def _decoder(kind: Any) -> Callable[[Any], Any]:
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        parts = {each.name: _decoder(hints[each.name]) for each in fields(kind)}
        make: Any = kind
        return lambda tree: make(**{name: part(tree[name]) for name, part in parts.items()})
    if get_origin(kind) in {Union, UnionType}:
        return _union(get_args(kind))
    if get_origin(kind) is frozenset:
        members = _tuple((*get_args(kind), ...))
        return lambda tree: frozenset(members(tree))
    if get_origin(kind) is tuple:
        return _tuple(get_args(kind))
    if get_origin(kind) is not None and issubclass(get_origin(kind), Mapping):
        value = _decoder(get_args(kind)[1])
        return lambda tree: {_plain(str, name): value(each) for name, each in _plain(dict, tree).items()}
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return lambda tree: kind(_plain(str, tree))
    if kind is float:
        return lambda tree: float(_plain((int, float), tree))
    return partial(_plain, kind)


def _union(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    named = [each for each in kinds if isinstance(each, type) and issubclass(each, Tagged)]
    tagged = {kind_of(each): _decoder(each) for each in named}  # type: ignore[arg-type]
    others = [_decoder(each) for each in kinds if each is not type(None) and each not in named]
    if len(others) > (not tagged):
        raise TypeError(f"a union of {kinds}")

    def decode(tree: Any) -> Any:
        if tree is None and type(None) in kinds:
            return None
        return tagged[tree["kind"]](tree) if tagged else others[0](tree)

    return decode


def _tuple(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    if kinds[-1] is Ellipsis:
        if kinds[0] is str:
            return lambda tree: tuple(_plain(str, each) for each in _plain(list, tree))
        every = _decoder(kinds[0])
        return lambda tree: tuple(map(every, _plain(list, tree)))
    parts = [_decoder(each) for each in kinds]
    return lambda tree: tuple(part(each) for part, each in zip(parts, _plain(list, tree), strict=True))


_WORDS = {str: "text", int: "whole number", bool: "truth value", list: "list", dict: "tree"}


def _plain(kind: Any, tree: Any) -> Any:
    """The value itself; raises TypeError unless it is of the type: True is no number."""
    if not isinstance(tree, kind) or (isinstance(tree, bool) and kind is not bool):
        raise TypeError(f"{reprlib.repr(tree)} is no {_WORDS.get(kind, 'number')}")
    return tree
