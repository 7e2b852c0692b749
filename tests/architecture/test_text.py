"""What no file of the repository may hold: another encoding, a path of one machine, a package index, a pickle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmray.models.spec import ModelSpec
from tests.architecture.source import ROOT, files, name_of, python_files, text_files, tree_of

MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|home|root|Users|tmp/bash_jobs)/")
PACKAGE_INDEX = re.compile(
    r"pypi\.org|pythonhosted\.org|artifactory|devpi|--?(?:extra-)?index-url|--find-links|file://|git\+https?", re.I
)
UNSAFE_LOADS = re.compile(
    r"^(?:torch|pickle|cPickle|cloudpickle|dill|joblib|marshal|shelve)\.(?:loads?|open|Unpickler)$"
    r"|\.unsafe_load$|^(?:eval|exec)$"
)
TOP_LEVEL = """
    pyproject.toml cluster lmray jobs configs tests dashboards
    README.md CHANGELOG.md CONTRIBUTING.md LICENSE Makefile constraints.txt .ci .github .gitignore .gitattributes
"""
TEXTS = [path for path in text_files() if path != Path(__file__)]


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_text_is_utf8_and_names_no_machine_and_no_package_index(path):
    text = path.read_bytes().decode("utf-8")
    assert "\r" not in text
    assert text == "" or text.endswith("\n"), "ends without a line break"
    for pattern in (MACHINE_PATH, PACKAGE_INDEX):
        found = pattern.search(text)
        line = text[: found.start()].count("\n") + 1 if found else 0
        assert not found, f"{name_of(path)}:{line}: `{found.group()}`"


def test_the_top_level_is_fixed():
    assert {path.relative_to(ROOT).parts[0] for path in files()} - set(TOP_LEVEL.split()) == set()


def test_files_of_the_repository_are_small():
    assert [name_of(path) for path in files() if path.stat().st_size > 1_000_000] == []


JOB_SAYS = ("trust_remote_code", "job.model.trust_remote_code")
"""A model's own code is off unless a job asks for it: what is passed on is the job's word, never a literal."""


def switches(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """What `node` sets of the switches that let code in: as a keyword, a key, or a parameter's default."""
    names = ("trust_remote_code", "allow_pickle", "shell")
    if isinstance(node, ast.keyword) and node.arg in names:
        yield node.arg, node.value
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        yield from ((key.value, value) for key, value in pairs if isinstance(key, ast.Constant) and key.value in names)
    if isinstance(node, ast.arguments):
        pairs = zip(node.kwonlyargs, node.kw_defaults, strict=True)
        yield from ((arg.arg, default) for arg, default in pairs if arg.arg in names and default is not None)


def test_the_switches_that_let_code_in_are_seen_wherever_they_are_set():
    code = "f(trust_remote_code=True); g(**{'allow_pickle': True})\ndef h(*, trust_remote_code=True): ..."
    found = [pair for node in ast.walk(ast.parse(code)) for pair in switches(node)]
    assert sorted(name for name, _ in found) == ["allow_pickle", "trust_remote_code", "trust_remote_code"]
    assert ModelSpec.model_fields["trust_remote_code"].default is False


@pytest.mark.parametrize("path", python_files("lmray", "jobs"), ids=name_of)
def test_nothing_is_loaded_that_can_run_code(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not UNSAFE_LOADS.search(called), f"line {node.lineno}: {called}; hint: safetensors, JSON"
        for name, value in switches(node):
            off = isinstance(value, ast.Constant) and not value.value
            asked = name == "trust_remote_code" and ast.unparse(value) in JOB_SAYS
            assert off or asked, f"{name_of(path)}:{value.lineno}: {name} must be off"
        if isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not any(UNSAFE_LOADS.search(name) for name in imported), f"{name_of(path)}:{node.lineno}: {imported}"
