"""From words on a command line to the job they describe."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store
from lmray.errors import ArtifactError, ConfigError
from lmray.evaluate.command import Words, make_job
from lmray.testing.tiny import tiny_adapter_folder


@pytest.fixture
def adapter(tiny_model, tmp_path):
    return tiny_adapter_folder(tiny_model, tmp_path / "run-7" / "adapter", seed=1)


def made(said: Words) -> Any:
    """The job, of whatever members it has."""
    return make_job(said)


def words(*targets, tasks="f1", data=("rows.jsonl",), **changes) -> Words:
    return Words(targets, tasks, data, **changes)


def test_all_of_the_data_is_measured_on_where_nothing_is_split_off():
    job = made(words("base", model="smollm2-135m", data=["a.jsonl", "b.jsonl"], max_examples=60, max_new_tokens=96))
    assert job.name == "evaluate-base" and job.model.source == "smollm2-135m"
    assert [one.label for one in job.targets] == ["base"] and job.targets[0].adapter is None
    assert [one.source for one in job.data.eval.sources] == ["a.jsonl", "b.jsonl"] and job.data.eval.split is None
    assert (job.evaluate.max_examples, job.evaluate.max_new_tokens) == (60, 96)


def test_a_split_by_a_column_and_a_mapping_of_columns():
    job = made(words("base", model="m", split=0.2, by="topic", mapping="prompt=question,completion=答え", name="質問"))
    assert (job.data.eval.split, job.data.eval.by, job.name) == (0.2, "topic", "質問")
    mapping = job.data.train[0].mapping
    assert (mapping.prompt, mapping.completion) == ("question", "答え")
    assert made(words("base", model="m", mapping="bfcl")).data.train[0].mapping.name == "bfcl"


def test_tasks_with_fields():
    job = made(words("base", model="m", tasks="loss, bleu:tokenize=char:lowercase=true"))
    loss, bleu = job.evaluate.tasks
    assert loss.name == "loss" and (bleu.tokenize, bleu.lowercase) == ("char", True)


def test_benchmarks_need_no_data_and_are_listed_in_brackets():
    job = made(words("base", model="m", data=(), tasks="lm_eval:tasks=[arc_easy,hellaswag]:limit=10"))
    assert job.data is None
    (benchmarks,) = job.evaluate.tasks
    assert (benchmarks.tasks, benchmarks.limit) == (("arc_easy", "hellaswag"), 10)
    both = made(words("base", model="m", tasks="loss,lm_eval:tasks=arc_easy"))
    assert [task.name for task in both.evaluate.tasks] == ["loss", "lm_eval"] and both.data is not None


def test_the_base_model_is_the_artifacts(adapter, tiny_model):
    kept = Artifacts(open_store()).keep(
        "関数", adapter, base={"source": str(tiny_model), "revision": "r1", "digest": "d"}
    )
    job = made(words("base", "関数", kept.ref))
    assert (job.model.source, job.model.revision) == (str(tiny_model), "r1")
    assert [one.label for one in job.targets] == ["base", "関数", kept.ref.replace("@", "-")]
    assert [one.adapter for one in job.targets] == [None, "関数", kept.ref]
    assert made(words("関数", model="other")).model.source == "other"


def test_the_base_model_is_the_adapter_folders_and_a_runs_folder_gives_the_label(adapter, tiny_model):
    job = made(words(str(adapter), str(adapter)))
    assert job.model.source == str(tiny_model)
    assert [one.label for one in job.targets] == ["run-7", "run-7-again-1"]
    assert job.targets[0].adapter == str(adapter)


def test_any_folder_gives_a_label_and_is_named_by_its_whole_path(tiny_model, tmp_path, monkeypatch):
    folder = tiny_adapter_folder(tiny_model, tmp_path / "私の adapter (2)", seed=1)
    monkeypatch.chdir(tmp_path)
    (target,) = made(words(folder.name)).targets
    assert (target.label, target.adapter) == ("私の-adapter-2", str(folder))


def test_whole_models_are_targets_beside_the_model_they_came_from_or_alone(tiny_model):
    base = {"source": "smollm2-135m", "revision": None, "digest": "d"}
    Artifacts(open_store()).keep("whole", tiny_model, base=base, kind="model")
    job = made(words("base", "artifact:whole"))
    assert job.model.source == "smollm2-135m"
    assert [(one.label, one.model) for one in job.targets] == [("base", None), ("whole", "artifact:whole")]
    assert made(words("whole")).model.source == "artifact:whole"
    (target,) = made(words(str(tiny_model))).targets
    assert (target.model, target.adapter) == (str(tiny_model), None)
    assert made(words(str(tiny_model))).model.source == str(tiny_model)
    with pytest.raises(ConfigError, match="--model: none given"):
        make_job(words("base", str(tiny_model)))


def test_an_adapter_that_names_no_base_model(adapter):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ArtifactError, match="does not say which base model"):
        make_job(words(str(adapter)))
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ArtifactError, match="does not say which base model"):
        make_job(words(str(adapter)))
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="is spoilt"):
        make_job(words(str(adapter)))


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (words(), "TARGET: none given"),
        (words("base"), "--model: none given"),
        (words("base", model="m", by="topic"), "--by: `topic` groups a split"),
        (words("base", model="m", tasks=" ,"), "--tasks: names no task"),
        (words("base", model="m", tasks="f2"), "unknown evaluation task `f2`"),
        (words("base", model="m", tasks="bleu:tokenize"), "`tokenize` is no `field=value`"),
        (words("base", model="m", mapping="prompt=q,completion"), "`completion` is no `field=value`"),
        (words("base", model="m", mapping="prompt=[,completion=a"), "--mapping: malformed YAML"),
        (words("base", model="m", data=()), "measures on data but has no `data`"),
        (words("base", model="m", data=(), tasks="lm_eval:tasks=[]"), "evaluate.tasks"),
        (words("base", model="m", split=1.5), "data.eval.split"),
        (words("base", "base", model="m", tasks="f1,f1"), "lists `f1` more than once"),
    ],
)
def test_words_that_make_no_job(said, found):
    with pytest.raises(ConfigError, match=found):
        make_job(said)


def test_an_unknown_artifact_is_named():
    with pytest.raises(ArtifactError, match="artifact `nothing`"):
        make_job(words("nothing"))
