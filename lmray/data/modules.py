"""Texts in modules of Python's standard library, `python:MODULE`: data that every machine has.

The module's source is parsed, never imported or run: what it assigns at its top level as a literal mapping of names to
texts (`pydoc_data.topics` holds the language reference so) becomes rows.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmray.data.base import Row
from lmray.errors import DataError, did_you_mean

PREFIX = "python:"
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def module_file(source: str) -> Path:
    """The source of the module that `source` names. Raises DataError where it is none of the standard library."""
    where, name = f"data source `{source}`", source.removeprefix(PREFIX)
    allowed = "modules of the standard library, like `python:pydoc_data.topics`"
    if not _MODULE.fullmatch(name) or name.partition(".")[0] not in sys.stdlib_module_names:
        hint = did_you_mean(name.partition(".")[0], sys.stdlib_module_names)
        raise DataError(where, f"`{name}` is no module of the standard library", allowed=allowed, hint=hint)
    place = Path(sysconfig.get_path("stdlib"), *name.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    raise DataError(where, f"`{name}` has no source in this Python's library", allowed=allowed)


def module_texts(source: str, path: Path) -> Iterator[Row]:
    """One row a text of the module in `path`, with the columns `name` and `text`, in the order they are written.
    Raises DataError where it holds no mapping of texts."""
    texts = _texts(ast.parse(path.read_bytes()))
    if not texts:
        where = f"data source `{source}`"
        raise DataError(where, "assigns no mapping of names to texts", hint="only what is written out literally counts")
    yield from (
        Row(f"{source}:{number}", {"name": key, "text": text}) for number, (key, text) in enumerate(texts.items(), 1)
    )


def _texts(tree: ast.Module) -> dict[str, str]:
    """All `{"name": "text"}` that the module assigns, merged."""
    found: dict[str, str] = {}
    for node in tree.body:
        value = _literal(node.value) if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if isinstance(value, dict) and all(isinstance(one, str) for pair in value.items() for one in pair):
            found |= value
    return found


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if isinstance(node, ast.Dict) else None
    except (ValueError, TypeError):  # a name or a call in it, or a key that cannot be one
        return None
