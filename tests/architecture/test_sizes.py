"""Ceilings: a function of 60 lines, a file of 400, five positional parameters, a config of twelve fields.

The parameters of a command in lmray/cli are its options and are not counted.
"""

from __future__ import annotations

import ast
import re

import pytest

from lmray import job
from lmray.config import Config
from lmray.registry import FAMILIES
from tests.architecture.source import name_of, python_files, tree_of

FUNCTION_LINES, FILE_LINES, PARAMETERS, FIELDS = 60, 400, 5, 12

EXCEPTIONS: dict[str, str] = {}
"""`path` or `path: function` -> `YYYY-MM-DD why`. An entry that is no longer needed fails the test as well."""

FIELD_EXCEPTIONS = {
    "Lora": "2026-11-22 flat, as PEFT's LoraConfig is, whose names these are",
    "TrainArgs": "2026-11-21 flat, so that what people know from Hugging Face's TrainingArguments holds",
    "TrainJob": "2026-11-21 one section a concern, and the trackers are none of the other sections'",
}
"""The same for configs with more fields."""


def too_large(path) -> dict[str, str]:
    """What in `path` is over a ceiling: `path` or `path: function` -> how much."""
    found, name = {}, name_of(path)
    counts_parameters = not name.startswith(("lmray/cli/", "tests/"))
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    if num_lines > FILE_LINES:
        found[name] = f"{num_lines} lines, allowed: {FILE_LINES}"
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        positional = [arg for arg in (*node.args.posonlyargs, *node.args.args) if arg.arg not in ("self", "cls")]
        if lines > FUNCTION_LINES:
            found[f"{name}: {node.name}"] = f"{lines} lines, allowed: {FUNCTION_LINES}"
        elif len(positional) > PARAMETERS and counts_parameters:
            found[f"{name}: {node.name}"] = f"{len(positional)} positional parameters, allowed: {PARAMETERS}"
    return found


def test_nothing_is_over_a_ceiling():
    found = {key: much for path in python_files("lmray", "jobs", "tests") for key, much in too_large(path).items()}
    assert {key: much for key, much in found.items() if key not in EXCEPTIONS} == {}
    assert set(EXCEPTIONS) <= set(found), "exceptions that are no longer needed"


def test_exceptions_carry_a_date_and_a_reason():
    assert all(
        re.fullmatch(r"\d{4}-\d{2}-\d{2} \w.+", reason) for reason in [*EXCEPTIONS.values(), *FIELD_EXCEPTIONS.values()]
    )


def config_classes(cls: type[Config] = Config) -> list[type[Config]]:
    """Every config class there is, members of families included."""
    return [one for child in cls.__subclasses__() for one in (child, *config_classes(child))]


@pytest.fixture(scope="module", autouse=True)
def _everything_is_imported():
    assert job.KINDS
    for family in FAMILIES.values():
        for name in family.names():
            family.load(name)


def test_no_config_has_more_than_twelve_fields():
    found = {cls.__qualname__: len(cls.model_fields) for cls in config_classes() if cls.__module__.startswith("lmray.")}
    assert found
    assert {name: count for name, count in found.items() if count > FIELDS and name not in FIELD_EXCEPTIONS} == {}
    assert all(found[name] > FIELDS for name in FIELD_EXCEPTIONS), "exceptions that are no longer needed"
