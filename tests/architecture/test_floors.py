"""Imports go down only, and Ray lives on one floor."""

from __future__ import annotations

import ast

import pytest

from tests.architecture.source import ROOT, floors, imported, name_of, python, python_files, tree_of

RAY_MAY_BE_IMPORTED_IN = ("lmray/on_ray/", "jobs/", "tests/on_ray/", "tests/e2e/", "tests/bench/")


def test_the_contracts_of_pyproject_are_kept():
    code = "from importlinter.cli import lint_imports_command as run; run()"
    done = python(code, "--no-logo", "--no-cache", "--config", str(ROOT / "pyproject.toml"))
    assert done.returncode == 0, f"import-linter:\n{done.stdout}{done.stderr}"


def test_the_floors_stand_in_the_order_of_the_design():
    heights = {name: -height for height, layer in enumerate(floors()) for name in layer}
    order = "units errors registry config ops models data methods job evaluate train sweep on_ray cli __main__"
    found = [heights[name] for name in order.split()]
    assert found == sorted(found)
    assert heights["train"] == heights["serve"] == heights["generate"]
    assert heights["testing"] == heights["on_ray"]


@pytest.mark.parametrize("path", python_files("lmray", "jobs", "tests"), ids=name_of)
def test_ray_is_imported_on_its_floor_only(path):
    if name_of(path).startswith(RAY_MAY_BE_IMPORTED_IN):
        return
    for node in ast.walk(tree_of(path)):
        names = imported(node)
        if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):  # import_module("ray"), __import__("ray")
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in names:
            assert name.partition(".")[0] != "ray", f"line {node.lineno}: imports {name}; hint: ask the context"


def test_no_floor_below_on_ray_brings_ray_in_while_it_is_imported():
    """What a static graph cannot see: a library on a low floor that imports Ray itself."""
    below = [name for layer in floors() for name in layer if name not in ("__main__", "cli", "on_ray", "testing")]
    done = python(IMPORT_ALL, *below)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), f"imported by the floors below lmray/on_ray: {done.stdout}"


IMPORT_ALL = """
import importlib, pkgutil, sys
import lmray

def modules(name):
    yield name
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
        yield from modules(f"{name}.{module.name}")

EXTRAS = {"deepspeed", "bitsandbytes"}
there = {module.name for module in pkgutil.iter_modules(lmray.__path__)}
for floor in sys.argv[1:]:
    if floor in there:
        for name in modules(f"lmray.{floor}"):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name not in EXTRAS:
                    raise
            if "ray" in sys.modules:
                sys.exit(print(name))
"""
