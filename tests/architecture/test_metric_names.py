"""Whatever is reported under a name is in the one list of names.

A string in lmray/ that looks like a metric's name (`train.loss`) must be one, or else a dotted key of a job. `model.X`
is also how transformers names its parameters, so there only keys of mappings count.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

import lmray
from lmray.config import dump, read_document
from lmray.metrics.names import METRICS
from lmray.registry import TASKS
from tests.architecture.source import ROOT, docstrings, files, name_of, python_files, tree_of

PREFIXES = sorted({name.partition(".")[0] for name in METRICS} | {"base"})
LOOKS_LIKE_ONE = re.compile(rf"({'|'.join(PREFIXES)})\.[A-Za-z]\w*")
FILE_ENDINGS = {"safetensors", "json", "jsonl", "gguf", "yaml", "txt", "py", "bin", "html", "png", "model"}


def is_known(name: str) -> bool:
    return name in METRICS or (name.startswith("base.") and "eval." + name.removeprefix("base.") in METRICS)


@cache
def job_keys() -> set[str]:
    """Dotted keys of all jobs in configs/, defaults included."""
    keys: set[str] = set()
    for path in files():
        if ROOT / "configs" in path.parents and path.suffix == ".yaml":
            keys |= set(dotted(dump(lmray.load(path))))
    return keys


def dotted(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield prefix + key
            yield from dotted(value, f"{prefix}{key}.")


def keys_of_mappings(tree: ast.Module) -> Iterator[ast.expr]:
    """Expressions that stand as a key: in a literal, a comprehension, a subscript, or a `.get(...)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (key for key in node.keys if key is not None)
        elif isinstance(node, ast.DictComp):
            yield node.key
        elif isinstance(node, ast.Subscript):
            yield node.slice
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("get", "pop", "setdefault"):
            yield from node.args[:1]


def unknown_names(tree: ast.Module, allowed: set[str]) -> list[str]:
    """`line N: name` of what looks like a metric's name and is neither a metric nor in `allowed`."""
    keys = list(keys_of_mappings(tree))
    prose = docstrings(tree)
    odd = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            name = node.value
            if not LOOKS_LIKE_ONE.fullmatch(name) or name.rpartition(".")[2] in FILE_ENDINGS:
                continue
            if name.startswith("model.") and node not in keys:
                continue
            if not is_known(name) and name not in allowed:
                odd.append(f"line {node.lineno}: {name}")
        elif isinstance(node, ast.JoinedStr) and node in keys and isinstance(node.values[0], ast.Constant):
            start = str(node.values[0].value)
            if start.partition(".")[0] in PREFIXES and "." in start and start not in ("eval.", "base."):
                odd.append(f"line {node.lineno}: {start}... is put together while running; hint: write the names out")
    return odd


@pytest.mark.parametrize("path", python_files("lmray", "jobs"), ids=name_of)
def test_every_name_reported_is_in_the_list(path):
    odd = unknown_names(tree_of(path), job_keys())
    assert not odd, f"{name_of(path)}: {odd}; hint: add them to lmray/metrics/names.py with unit and help"


@pytest.mark.parametrize("task", TASKS.names())
def test_every_score_of_a_task_is_in_the_list(task):
    tree = tree_of(ROOT / "lmray" / "tasks" / f"{task}.py")
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "score"]
    returned = [node.value for one in functions for node in ast.walk(one) if isinstance(node, ast.Return)]
    literals = [key for value in returned if isinstance(value, ast.Dict) for key in value.keys]
    names = [key.value for key in literals if isinstance(key, ast.Constant)]
    assert [name for name in names if f"eval.{name}" not in METRICS] == []


def test_names_in_configs_are_in_the_list():
    for path in files():
        if ROOT / "configs" in path.parents and path.suffix == ".yaml":
            tree = read_document(path).tree
            for key in tree.get("objectives", {}):
                assert is_known(key), f"{name_of(path)}: {key}"


def test_every_metric_says_what_it_is():
    for name, metric in METRICS.items():
        assert LOOKS_LIKE_ONE.fullmatch(name), name
        assert metric.help.endswith("."), name
        assert metric.better in ("", "min", "max"), name


def test_the_rule_sees_an_unknown_name():
    code = 'def f(ctx):\n    "train.prose"\n    ctx.report(1, {"train.loss": 1.0, "train.los": 2.0, f"run.{x}": 1.0})\n'
    odd = unknown_names(ast.parse(code), set())
    assert any(one == "line 3: train.los" for one in odd)
    assert any(one.startswith("line 3: run....") for one in odd)
    assert any(one == "line 2: train.prose" for one in odd) is False, "a docstring reports nothing"
    assert len(odd) == 2
