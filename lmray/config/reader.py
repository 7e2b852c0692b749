"""Reads one YAML file (and its one `extends:` parent) into a plain tree that remembers on which line each key stood.

YAML as people write it in this field: `2e-4` is a number, `on`/`yes` are strings, a key given twice is an error.
No interpolation, no environment variables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from lmray.errors import ConfigError

Path_ = tuple[str | int, ...]


@dataclass
class Document:
    """A decoded YAML tree; `lines` maps a dotted path (as a tuple) to `file:line`."""

    source: str
    tree: dict[str, Any]
    lines: dict[Path_, str] = field(default_factory=dict)

    def where(self, path: Path_) -> str:
        """`file:line` of `path`, or of the closest parent that was written down."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return self.source


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars on PyYAML's safe loader."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def read_document(path: str | Path) -> Document:
    """Reads `path` and lays it over its parent, if it names one. Raises ConfigError for anything unreadable."""
    return _read(Path(path), children=())


def parse_value(text: str, origin: str) -> Any:
    """The value of a command-line override `key=TEXT`, read as YAML would read it. Raises ConfigError at `origin`."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        raise ConfigError(origin, f"malformed YAML: {reason}", hint="quote it as your shell and YAML need it") from None


def _read(path: Path, children: tuple[Path, ...]) -> Document:
    document = Document(str(path), {})
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"is not UTF-8 at byte {error.start}", hint="save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}", hint="give the path of a job file") from None
    loader = _loader(text, path)
    try:
        node = loader.get_single_node()
        document.tree = _plain(node, (), document, loader) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = str(error.problem)
        found = f"{error.context}, {problem}" if problem.startswith("but ") else problem
        raise ConfigError(where, f"malformed YAML: {found}", hint="check indentation, brackets and quotes") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(str(path), f"malformed YAML: {error}") from None
    except RecursionError:
        raise ConfigError(str(path), "malformed YAML: a value contains itself", hint="remove the alias") from None
    finally:
        loader.dispose()
    if not isinstance(document.tree, dict):
        raise ConfigError(str(path), "a job file is a mapping of keys to values", hint="start it with `kind: train`")
    return _over_parents(document, path, (*children, path.resolve()))


def _loader(text: str, path: Path) -> _Loader:
    try:
        return _Loader(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"malformed YAML: holds the control character {chr(error.character)!r}"
        raise ConfigError(f"{path}:{line}", found, hint="remove it") from None


def _plain(node: yaml.Node, path: Path_, document: Document, loader: _Loader) -> Any:
    document.lines.setdefault(path, f"{document.source}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, index), document, loader) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = str(loader.construct_object(key_node)), key_node.start_mark.line + 1
        if key in tree:
            first = document.lines[(*path, key)]
            raise ConfigError(
                f"{document.source}:{line}", f"`{key}` is given twice", hint=f"it stands at {first} already"
            )
        document.lines[(*path, key)] = f"{document.source}:{line}"
        tree[key] = _plain(value_node, (*path, key), document, loader)
    return tree


def _over_parents(document: Document, path: Path, children: tuple[Path, ...]) -> Document:
    """Resolves `extends:` at the top and in a nested `job:`; a child's value replaces its parent's, mappings merge."""
    for prefix in ((), ("job",)):
        holder = document.tree if not prefix else document.tree.get("job")
        if not isinstance(holder, dict) or "extends" not in holder:
            continue
        parent = path.parent / str(holder.pop("extends"))
        if parent.resolve() in children:
            raise ConfigError(document.where((*prefix, "extends")), f"`extends: {parent}` leads back to this file")
        if not parent.is_file():
            raise ConfigError(
                document.where((*prefix, "extends")), f"`extends` names a file that is not there: {parent}"
            )
        base = _read(parent, children)
        merged = merge(base.tree, holder)
        document.lines = {prefix + where: line for where, line in base.lines.items()} | document.lines
        if prefix:
            document.tree["job"] = merged
        else:
            document.tree = merged
    return document


def merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`. A mapping with another `name` is another member, so it replaces instead of merging."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "name" in over and "name" in base and over["name"] != base["name"] and not _is_job(base):
        return over
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in over.items()}}


def _is_job(tree: dict[str, Any]) -> bool:
    return "kind" in tree
