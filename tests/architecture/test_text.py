"""What no file of the repository may hold: another encoding, a path of one machine, a package index, a pickle."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", python_files("lmray", "jobs"), ids=name_of)
def test_nothing_is_loaded_that_can_run_code(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not UNSAFE_LOADS.search(called), f"line {node.lineno}: {called}; hint: safetensors, JSON"
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
            off = isinstance(node.value, ast.Constant) and not node.value.value
            assert off, f"{name_of(path)}:{node.value.lineno}: {node.arg} must be off"
        if isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not any(UNSAFE_LOADS.search(name) for name in imported), f"{name_of(path)}:{node.lineno}: {imported}"
