"""From a plain tree to a frozen object, and back; all problems of a file in one error."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lmray.config.base import Config, Member, MemberConfig
from lmray.config.reader import Document, Path_, merge, parse_value
from lmray.errors import ConfigError, Problem, did_you_mean

T = TypeVar("T", bound=Config)
BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "greater than or equal to"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "less than or equal to"),
}
"""By Pydantic's type of an error: the end of a range as metadata calls it, and in words."""


def decode(cls: type[T], document: Document) -> T:
    """`document` as a `cls`. Raises ConfigError with every problem: line, dotted path, found, allowed, hint."""
    try:
        return cls.model_validate(document.tree)
    except ValidationError as error:
        problems = [_problem(cls, document, one) for one in error.errors(include_url=False) if not _is_secondary(one)]
        raise ConfigError.of(problems) from None


def dump(config: Config) -> dict[str, Any]:
    """The plain tree of `config`: JSON types only, every default written out; `decode` gives the same object back."""
    return config.model_dump(mode="json")


def with_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """`document` with `a.b=value` laid over it. Raises ConfigError for text without `=` or an empty key."""
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = tuple(key.strip().split("."))
        if not equals or not all(parts):
            raise ConfigError(
                f"override `{override}`", "is not `key=value`", hint="write it like `train.learning_rate=2e-4`"
            )
        origin = f"override `{override}`"
        document = set_value(document, parts, parse_value(text, origin), origin)
    return document


def set_value(document: Document, path: Sequence[str], value: Any, origin: str) -> Document:
    """A copy of `document` in which dotted `path` holds `value`; `origin` stands for its line in messages."""
    leaf: Any = value
    for depth in range(len(path) - 1, -1, -1):
        key = path[depth]
        parent = _at(document.tree, path[:depth])
        if isinstance(parent, list):
            leaf = _with_item(parent, key, leaf, origin)
        else:
            member = {"name": parent} if isinstance(parent, str) else {}  # `adapter: lora`, then `adapter.r=4`
            laid = leaf if depth < len(path) - 1 else _laid(parent, key, leaf)
            leaf = {**(parent if isinstance(parent, dict) else member), key: laid}
    lines = {where: line for where, line in document.lines.items() if where[: len(path)] != tuple(path)}
    return Document(document.source, leaf, {**lines, tuple(path): origin})


def _laid(parent: Any, key: str, value: Any) -> Any:
    return merge(parent[key], value) if isinstance(parent, dict) and key in parent else value


def _at(tree: Any, path: Sequence[str]) -> Any:
    for key in path:
        if isinstance(tree, list):
            tree = tree[int(key)] if key.isdigit() and int(key) < len(tree) else None
        else:
            tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _with_item(items: list, key: str, value: Any, origin: str) -> list:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(origin, f"`{key}` is no place in a list of {len(items)}", allowed=f"0 to {len(items) - 1}")
    return [value if index == int(key) else item for index, item in enumerate(items)]


def _is_secondary(error: Any) -> bool:
    """Pydantic counts valid items only, so it calls a list too short when one of its items is wrong."""
    context = error.get("ctx") or {}
    return error["type"] == "too_short" and len(error["input"]) >= context["min_length"]


def _problem(cls: type[BaseModel], document: Document, error: Any) -> Problem:
    path: Path_ = tuple(error["loc"])
    where = f"{document.where(path)}: {'.'.join(map(str, path))}" if path else document.source
    context = error.get("ctx") or {}
    if error["type"] == "extra_forbidden":
        owner = _class_at(cls, document.tree, path[:-1])
        known = _keys(owner) if owner else ()
        return Problem(where, "unknown key", ", ".join(known) or None, did_you_mean(str(path[-1]), known))
    if error["type"] == "missing":
        return Problem(where, "is missing", None, f"add `{path[-1]}:`")
    if error["type"] == "value_error":
        found, _, hint = str(context.get("error", error["msg"])).partition("; hint: ")
        return Problem(where, found, None, hint or None)
    if error["type"] in ("member", "name"):
        found = error["msg"] if error["type"] == "member" else f"{error['input']!r} is {error['msg']}"
        return Problem(where, found, context.get("allowed") or None, context.get("hint") or None)
    allowed = error["msg"].removeprefix("Input should be ")
    if error["type"] == "model_type" and (owner := _class_at(cls, document.tree, path)) is not None:
        allowed = f"a mapping with {', '.join(_keys(owner))}"
    if error["type"] in BOUNDS and path and (owner := _class_at(cls, document.tree, path[:-1])) is not None:
        field = owner.model_fields.get(str(path[-1]))
        ends = _bounds([field.annotation, *field.metadata]) if field else []
        allowed = " and ".join(dict.fromkeys(ends)) or allowed
    return Problem(where, f"found {_shown(error['input'])}", allowed)


def _bounds(parts: Sequence[Any]) -> list[str]:
    """Both ends of what numbers may be, in words, where there are two."""
    found = []
    for part in parts:
        ends = [(words, getattr(part, sign, None)) for sign, words in BOUNDS.values()]
        found += [f"{words} {end:g}" for words, end in ends if isinstance(end, float)]
        found += [f"{words} {end}" for words, end in ends if isinstance(end, int)]
        found += _bounds([*typing.get_args(part), *getattr(part, "__metadata__", ()), *getattr(part, "metadata", ())])
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _keys(cls: type[BaseModel]) -> tuple[str, ...]:
    return (("name",) if issubclass(cls, MemberConfig) else ()) + tuple(cls.model_fields)


def _class_at(cls: type[BaseModel] | None, tree: Any, path: Path_) -> type[BaseModel] | None:
    """The config class that decodes the mapping at `path` of `tree`."""
    for depth, key in enumerate(path):
        if isinstance(key, int):
            continue  # the item's class was found when the list's field was
        field = cls.model_fields.get(key) if cls is not None else None
        if field is None:
            return None
        here = _at(tree, [str(part) for part in path[: depth + 1]])
        index = path[depth + 1] if depth + 1 < len(path) and isinstance(path[depth + 1], int) else None
        value = here[index] if isinstance(here, list) and isinstance(index, int) and index < len(here) else here
        cls = _field_class([field.annotation, *field.metadata], value)
    return cls


def _field_class(parts: Sequence[Any], value: Any) -> type[BaseModel] | None:
    for part in parts:
        if isinstance(part, Member):
            return part.member_class(value)
    for part in parts:
        if isinstance(part, type) and not isinstance(part, types.GenericAlias) and issubclass(part, BaseModel):
            return part
        inner = [*typing.get_args(part), *getattr(part, "__metadata__", ())]
        if inner and (found := _field_class(inner, value)) is not None:
            return found
    return None
