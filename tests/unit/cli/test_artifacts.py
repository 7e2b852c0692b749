"""`lmray artifacts`: what it shows and changes in a store."""

from __future__ import annotations

import json

import pytest
import yaml

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store


@pytest.fixture
def versions(tmp_path):
    """Two versions of 関数 in the test's store, oldest first."""
    kept, found = Artifacts(open_store()), []
    for rank in (4, 8):
        folder = tmp_path / f"r{rank}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
        found.append(kept.keep("関数", folder, base={"source": "tiny", "digest": "d"}, metrics={"eval.loss": 1 / rank}))
    return found


def test_list_of_an_empty_store(cli):
    said = cli("artifacts", "list")
    assert (said.code, said.out) == (0, "nothing is kept yet\n")
    assert json.loads(cli("artifacts", "list", "--json").out) == {"artifacts": []}


def test_list_promote_rollback(cli, versions):
    first, second = versions
    assert cli("artifacts", "promote", first.ref, "production").out == f"関数@production is now {first.ref}\n"
    assert json.loads(cli("artifacts", "promote", "関数", "production", "--json").out)["artifact"] == second.ref
    rows = json.loads(cli("artifacts", "list", "--json").out)["artifacts"]
    assert [(row["artifact"], row["stages"]) for row in rows] == [(first.ref, "-"), (second.ref, "production")]
    assert cli("artifacts", "rollback", "関数", "production").out == f"関数@production is {first.ref} again\n"
    assert first.ref in cli("artifacts", "list").out


def test_show_prints_lineage_and_history(cli, versions):
    cli("artifacts", "promote", versions[0].ref, "staging")
    shown = yaml.safe_load(cli("artifacts", "show", "関数@staging").out)
    assert shown["id"] == versions[0].id and shown["metrics"] == {"eval.loss": 0.25}
    assert [entry["action"] for entry in shown["log"]] == ["promote"]


def test_verify(cli, versions):
    assert "all as they were kept" in cli("artifacts", "verify", "関数").out
    (digest,) = [facts["sha256"] for facts in versions[1].files.values()]
    (open_store().root / "objects" / digest).write_text("{}")
    said = cli("artifacts", "verify", "関数")
    assert said.code == 2 and "missing or corrupted" in said.err


def test_wrong_names_are_told(cli, versions):
    assert "did you mean `関数`?" in cli("artifacts", "show", "関").err
    said = cli("artifacts", "promote", "関数", "prod")
    assert said.code == 2 and "candidate, staging, production" in said.err
    assert "no earlier version" in cli("artifacts", "rollback", "関数", "staging").err


def test_export_writes_the_adapter(cli, versions, tmp_path):
    target = tmp_path / "out"
    said = cli("artifacts", "export", versions[0].ref, target, "--format", "peft", "--json")
    assert json.loads(said.out) == {"artifact": versions[0].ref, "folder": str(target), "format": "peft"}
    assert json.loads((target / "adapter_config.json").read_text()) == {"r": 4}
    assert cli("artifacts", "export", versions[0].ref, target).code == 2, "the folder is there already"


def test_another_store_can_be_named(cli, versions, tmp_path):
    assert cli("artifacts", "list", "--store", tmp_path / "other").out == "nothing is kept yet\n"


def test_a_whole_model_is_listed_as_one_and_exported_whole(cli, versions, tiny_model, tmp_path):
    kept = Artifacts(open_store()).keep("whole", tiny_model, base=versions[0].base, kind="model")
    kinds = {row["artifact"]: row["kind"] for row in json.loads(cli("artifacts", "list", "--json").out)["artifacts"]}
    assert kinds == {versions[0].ref: "adapter", versions[1].ref: "adapter", kept.ref: "model"}
    said = cli("artifacts", "export", "whole", tmp_path / "out", "--format", "peft")
    assert said.code == 2 and "is a whole model" in said.err and "allowed: --format hf" in said.err
    assert cli("artifacts", "export", "whole", tmp_path / "out").code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(kept.files)


def test_a_whole_model_is_exported_as_gguf(cli, versions, tiny_model, tmp_path):
    Artifacts(open_store()).keep("模型", tiny_model, base=versions[0].base, kind="model")
    said = cli("artifacts", "export", "模型", tmp_path / "out", "--format", "gguf", "--gguf-type", "q8_0", "--json")
    assert said.code == 0 and json.loads(said.out)["format"] == "gguf"
    assert (tmp_path / "out" / "模型.gguf").read_bytes()[:4] == b"GGUF"
    said = cli("artifacts", "export", "模型", tmp_path / "x", "--format", "gguf", "--gguf-type", "q9")
    assert said.code == 2 and "allowed: auto, f32, f16, bf16, q8_0" in said.err
