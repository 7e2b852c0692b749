"""What an import costs, and where one may stand inside a function. Cost is counted in modules: clocks differ."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from tests.architecture.source import floors, imported, name_of, project, python, python_files, tree_of

HEAVY = {"torch", "ray", "transformers", "peft", "numpy", "pandas", "pyarrow", "scipy", "fastapi", "matplotlib"}


def modules_after(statement: str) -> set[str]:
    """Modules that a fresh interpreter holds after `statement` and did not hold before."""
    done = python(f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_lmray_costs_next_to_nothing():
    found = modules_after("import lmray")
    assert sorted(found & {*HEAVY, "pydantic", "yaml", "typer"}) == []
    assert {name for name in found if name.startswith("lmray.")} == set()
    assert len(found) < 50, sorted(found)


def test_every_public_name_is_bound_lazily_and_exists():
    done = python("import lmray; print(*[name for name in lmray.__all__ if getattr(lmray, name) is None])")
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip()


@pytest.mark.parametrize("module", [name for layer in floors()[-3:] for name in layer])
def test_floor_0_imports_nothing_heavy(module):
    found = modules_after(f"import lmray.{module}")
    assert sorted(found & HEAVY) == []
    assert len(found) < (400 if module == "config" else 120), f"{len(found)} modules for lmray.{module}"


def test_the_help_of_the_command_line_brings_in_neither_torch_nor_ray():
    code = (
        "import sys, contextlib, io; sys.argv = ['lmray', '--help']\n"
        "from lmray.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()\n"
        "print(*sorted(sys.modules))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert sorted(set(done.stdout.split()) & HEAVY) == []


def test_training_brings_in_no_library_that_only_some_jobs_need():
    assert modules_after("import lmray.train.program") & {"datasets", "deepspeed", "lm_eval", "wandb"} == set()


def lazy_imports(tree: ast.Module) -> list[tuple[int, str]]:
    """`(line, module)` of every import inside a function."""
    found = []
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found += [(node.lineno, name) for node in ast.walk(function) for name in imported(node)]
    return sorted(set(found))


@pytest.mark.parametrize("path", python_files("lmray", "jobs"), ids=name_of)
def test_imports_inside_functions_are_for_the_command_line_and_optional_extras(path):
    if name_of(path).startswith("lmray/cli/") or name_of(path) == "lmray/__init__.py":
        return
    extras = project()["project"]["optional-dependencies"]
    optional = {
        line.partition(">")[0].replace("-", "_") for extra, lines in extras.items() if extra != "dev" for line in lines
    }
    odd = [
        f"line {line}: {name}"
        for line, name in lazy_imports(tree_of(path))
        if not optional
        & {one.replace("-", "_") for one in (name.split(".")[0], *providers().get(name.split(".")[0], []))}
    ]
    assert not odd, f"{name_of(path)}: hint: import at the top, or move what both need down a floor"


@pytest.mark.parametrize("path", python_files("lmray/policies"), ids=name_of)
def test_policies_are_standard_library_only(path):
    """Ray pickles a policy by value, so whatever it imports must be on every node's Python."""
    for node in ast.walk(tree_of(path)):
        for name in imported(node):
            allowed = name.partition(".")[0] in sys.stdlib_module_names or name.startswith("lmray.policies")
            assert allowed, f"{name_of(path)}:{node.lineno}: imports {name}"


providers = cache(metadata.packages_distributions)


@cache
def declared() -> set[str]:
    """Distributions that installing lmray brings: its dependencies and extras, and theirs."""
    extras = project()["project"]["optional-dependencies"]
    waiting = [
        *project()["project"]["dependencies"],
        *(line for extra, lines in extras.items() if extra != "dev" for line in lines),
    ]
    found: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        key = f"{name}[{','.join(sorted(requirement.extras))}]"
        if key in found:
            continue
        found |= {key, name}
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # an extra that is not installed here
            continue
        for need in map(Requirement, needs):
            wanted = (
                [need.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)]
                if need.marker
                else [True]
            )
            if any(wanted):
                waiting.append(str(Requirement(f"{need.name}[{','.join(need.extras)}]" if need.extras else need.name)))
    return found


@pytest.mark.parametrize("path", python_files("lmray", "jobs"), ids=name_of)
def test_every_library_that_is_imported_comes_with_lmray(path):
    """What happens to be installed here, for development or by hand, does not count."""
    for node in ast.walk(tree_of(path)):
        for name in imported(node):
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or top == "lmray":
                continue
            homes = {re.sub(r"[-_.]+", "-", home).lower() for home in providers().get(top, [top])}
            assert homes & declared(), f"line {node.lineno}: {name} is not among the dependencies in pyproject.toml"
