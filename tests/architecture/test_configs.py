"""Every file in configs/ is a job that decodes, and needs nothing that the repository does not name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

import lmray
from lmray.config import Document, decode, dump, read_document
from lmray.job import KINDS
from lmray.models.catalogue import CATALOGUE
from tests.architecture.source import ROOT, files, name_of

CONFIGS = [path for path in files() if ROOT / "configs" in path.parents and path.name != "README.md"]


def test_every_kind_has_a_demo_in_its_folder():
    missing = [kind for kind in KINDS if not (ROOT / "configs" / kind / "demo.yaml").is_file()]
    assert not missing


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_is_a_job_of_its_folders_kind(path):
    assert path.suffix == ".yaml"
    job = lmray.load(path)
    assert job.kind == path.parent.name


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_what_dump_gives_decodes_to_the_same_job(path):
    job = lmray.load(path)
    assert decode(type(job), Document("dumped", dump(job))) == job


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_starts_with_a_comment_saying_what_it_is_for(path):
    assert re.match(r"# \w.{20,}", path.read_text(encoding="utf-8")), "begin with `# What it does. ...`"


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_refers_to_catalogue_names_packages_and_files_of_the_repository_only(path):
    for where, value in strings(read_document(path).tree):
        assert "://" not in value, f"{where}: a URL"
        assert not value.startswith(("/", "~")), f"{where}: a path of one machine"
        if where.endswith("model.source"):
            assert value in CATALOGUE, f"{where}: `{value}`, allowed: {', '.join(CATALOGUE)}"
        elif where.endswith("source"):
            assert value.startswith(("pypi:", "python:")) or (ROOT / value).exists(), f"{where}: `{value}` is not here"


def strings(tree: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a plain tree with its dotted path."""
    if isinstance(tree, str):
        yield where, tree
    elif isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from strings(value, f"{where}.{key}".lstrip("."))


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_of_a_kind_accepts_its_configs_and_refuses_an_unknown_key(kind):
    schema = KINDS[kind].model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    for path in CONFIGS:
        if path.parent.name == kind:
            tree = read_document(path).tree
            assert [error.message for error in check.iter_errors(tree)] == [], name_of(path)
            assert not check.is_valid({**tree, "nmae": "x"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_of_a_kind_resolves_all_its_references(kind):
    schema = KINDS[kind].model_json_schema()
    for where, value in strings(schema):
        if where.endswith("$ref"):
            target: Any = schema
            for part in value.removeprefix("#/").split("/"):
                assert part in target, f"{where}: {value} leads nowhere"
                target = target[part]
