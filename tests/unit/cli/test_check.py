"""`lmray check`, `show` and `schema`."""

from __future__ import annotations

import json

import yaml

from lmray.job import load


def test_check_prints_the_plan(cli, train_file):
    said = cli("check", train_file, "train.max_steps=5")
    assert said.code == 0 and "run        実験" in said.out and "steps      5 of 8 rows" in said.out
    assert json.loads(cli("check", train_file, "--json").out)["steps"] == 4


def test_check_finds_what_is_missing(cli, train_file):
    said = cli("check", train_file, "data.train.0.source=nowhere.jsonl")
    assert said.code == 2 and "nowhere.jsonl" in said.err and said.out == ""


def test_check_of_another_kind_prints_the_job(cli, tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("kind: serve\nname: s\nmodel: {source: smollm2-135m}\nengine: native\n")
    said = cli("check", path)
    assert said.code == 0 and "has no plan" in said.err
    assert yaml.safe_load(said.out)["engine"]["name"] == "native"


def test_show_prints_a_job_that_decodes_to_itself(cli, train_file, tmp_path):
    said = cli("show", train_file, "adapter.r=3")
    again = tmp_path / "again.yaml"
    again.write_text(said.out, encoding="utf-8")
    assert load(again) == load(train_file, "adapter.r=3")
    assert json.loads(cli("show", train_file, "adapter.r=3", "--json").out)["adapter"]["r"] == 3


def test_show_prints_a_family(cli):
    said = cli("show", "adapters")
    assert said.code == 0 and said.out.startswith("lora: ") and "lora_alpha" in said.out
    members = json.loads(cli("show", "adapters", "--json").out)["members"]
    assert members["lora"]["fields"]["r"] == {"type": "int", "default": 8, "help": "Rank of the update."}


def test_show_of_neither_file_nor_family(cli):
    said = cli("show", "adaptrs")
    assert said.code == 2 and "adaptrs: cannot be read" in said.err


def test_schema_lets_a_file_name_its_parent(cli):
    body = json.loads(cli("schema", "sweep").out)
    assert "extends" in body["properties"] and "extends" in body["$defs"]["TrainJob"]["properties"]
    assert {"required": ["extends"]} in body["anyOf"]
    assert "required" not in body


def test_schema_of_an_unknown_kind(cli):
    said = cli("schema", "trian")
    assert said.code == 2 and "did you mean `train`?" in said.err
