"""One file, one member, one name; and names of modules that say something."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from lmray.config import Member
from lmray.registry import FAMILIES, class_name
from tests.architecture.source import ROOT, name_of, python_files, tree_of

BASES = {
    "methods": "lmray.methods.base.Method",
    "adapters": "lmray.adapters.base.Adapter",
    "sharding": "lmray.sharding.base.Sharding",
    "tasks": "lmray.tasks.base.Task",
    "trackers": "lmray.trackers.base.Tracker",
    "engines": "lmray.engines.base.EngineConfig",
    "speculation": "lmray.engines._speculation.base.Speculation",
    "optim": "lmray.optim.base.OptimizerConfig",
    "schedules": "lmray.schedules.base.Schedule",
    "mappings": "lmray.data.base.Mapping",
    "filters": "lmray.data.filters.base.TextFilter",
}
SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "handler"}
MEMBERS = [(family, name) for family, members in FAMILIES.items() for name in members.names()]


def base_of(family: str) -> type:
    module, _, name = BASES[family].rpartition(".")
    return getattr(import_module(module), name)


def file_of(family: str, name: str) -> Path:
    folder = ROOT / FAMILIES[family].package.replace(".", "/")
    return folder / f"{name}.py" if (folder / f"{name}.py").is_file() else folder / name / "__init__.py"


def test_every_family_has_a_base_and_members():
    assert set(BASES) == set(FAMILIES)
    for family, members in FAMILIES.items():
        assert members.names(), f"{family} is empty: an empty folder is not a design"
        assert (base_of(family).__doc__ or "").strip(), f"the base of {family} has no docstring"


@pytest.mark.parametrize(("family", "name"), MEMBERS)
def test_a_member_is_the_one_public_class_of_its_file(family, name):
    path = file_of(family, name)
    tree = tree_of(path)
    public = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    assert [node.name for node in public] == [class_name(name)], name_of(path)
    assert snake_case(public[0].name) == name
    assert len(ast.get_docstring(tree) or "") > 10, f"{name_of(path)}: the module says nothing about itself"
    assert len(ast.get_docstring(public[0]) or "") > 10, f"{name_of(path)}: the class says nothing about itself"


@pytest.mark.parametrize(("family", "name"), MEMBERS)
def test_a_member_is_of_its_family_and_decodes_from_its_name(family, name):
    cls = FAMILIES[family].load(name)
    assert issubclass(cls, base_of(family))
    if any(field.is_required() for field in cls.model_fields.values()):
        return
    member = Member(FAMILIES[family])
    made = member.decode(name)
    assert type(made) is cls
    assert made.name == name
    dumped = made.model_dump(mode="json")
    assert dumped["name"] == name
    assert member.decode(dumped) == made


def snake_case(word: str) -> str:
    """A word begins at a capital letter, and at a number that letters follow: `Adamw8bit` is `adamw_8bit`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[a-z])(?=[0-9]+[a-z])", "_", word).lower()


@pytest.mark.parametrize("path", python_files("lmray", "jobs"), ids=name_of)
def test_names_of_modules_say_something(path):
    words = {part for name in (path.stem, path.parent.name) for part in name.split("_")}
    assert not words & SAY_NOTHING, f"{name_of(path)}: name it after what it holds"


@pytest.mark.parametrize("path", python_files("lmray", "jobs"), ids=name_of)
def test_every_module_says_what_it_is_for(path):
    assert len(ast.get_docstring(tree_of(path)) or "") > 20, f"{name_of(path)}: begin with one sentence of purpose"
