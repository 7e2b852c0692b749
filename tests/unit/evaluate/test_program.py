"""The evaluation program in this process: what it leaves in the run folder."""

from __future__ import annotations

import json

import pytest

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store, run_folder
from lmray.config import Document, decode
from lmray.context import LocalContext
from lmray.errors import ArtifactError, ConfigError, DataError
from lmray.evaluate import measure as measuring
from lmray.evaluate.kept import Kept
from lmray.evaluate.program import evaluate, prepare
from lmray.job import EvaluateJob
from lmray.testing.jobs import write_jsonl
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    """An evaluation of `base` and an adapter with a dot in its label."""
    adapter = tiny_adapter_folder(tiny_model, tmp_path / "adapter", seed=3)

    def make(**changes) -> EvaluateJob:
        tree = {
            "kind": "evaluate",
            "name": "比較",
            "storage": str(tmp_path / "store"),
            "model": {"source": str(tiny_model), "dtype": "float32"},
            "data": {"train": [{"source": str(tiny_data)}], "eval": {"split": 0.25}, "max_length": 256},
            "targets": [{"label": "base"}, {"label": "v1.0", "adapter": str(adapter)}],
            "evaluate": {"tasks": ["loss", "f1", "chrf"], "max_examples": 3, "max_new_tokens": 4},
        }
        return decode(EvaluateJob, Document("test", tree | changes))

    return make


def run(job, tmp_path):
    return evaluate(job, LocalContext(run_folder(job), scratch=tmp_path / "scratch"))


def test_a_run_leaves_answers_a_comparison_and_its_result(job, tmp_path):
    result = run(job(), tmp_path)
    folder = run_folder(job())
    names = {path.name for path in folder.iterdir()}
    assert {"job.yaml", "answers-base.jsonl", "answers-v1.0.jsonl", "comparison.html", "result.json"} <= names
    kept = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert kept["details"] == json.loads(json.dumps(result.details))
    targets, deltas = result.details["targets"], result.details["deltas"]
    assert result.details["reference"] == "base" and set(deltas) == {"v1.0"}
    assert set(deltas["v1.0"]) == {"eval.loss", "eval.perplexity", "eval.f1", "eval.chrf"}
    loss = deltas["v1.0"]["eval.loss"]
    assert loss["delta"] == pytest.approx(targets["v1.0"]["eval.loss"] - targets["base"]["eval.loss"])
    assert loss["low"] <= loss["delta"] <= loss["high"] and loss["num_examples"] == 6
    assert deltas["v1.0"]["eval.f1"]["num_examples"] == 3
    assert result.metrics["eval.loss"] == targets["v1.0"]["eval.loss"]


def test_the_job_is_kept_as_it_was_decoded(job, tmp_path):
    run(job(), tmp_path)
    text = (run_folder(job()) / "job.yaml").read_text(encoding="utf-8")
    assert "name: 比較" in text and "v1.0" in text


def test_the_base_is_measured_without_the_adapter_beside_it(job, tmp_path):
    both = run(job(), tmp_path).details["targets"]
    alone = run(job(targets=[{"label": "base"}]), tmp_path)
    assert alone.metrics["eval.loss"] == pytest.approx(both["base"]["eval.loss"], abs=1e-6)
    assert alone.details["deltas"] == {}
    assert not (run_folder(job()) / "answers-v1.0.jsonl").exists(), "an earlier run's answers are gone"


def test_a_whole_model_is_measured_beside_the_jobs(job, tiny_model, tmp_path):
    kept = Artifacts(open_store(str(tmp_path / "store")))
    other = tiny_model_folder(tmp_path / "other", seed=5)
    kept.keep("whole", other, base={"source": str(tiny_model), "digest": "d"}, kind="model")
    targets = [{"label": "base"}, {"label": "whole", "model": "artifact:whole"}, {"label": "again"}]
    measured = run(job(targets=targets), tmp_path).details["targets"]
    assert list(measured) == ["base", "whole", "again"]
    assert measured["again"] == measured["base"] != measured["whole"]
    alone = run(job(model={"source": str(other), "dtype": "float32"}, targets=[{"label": "one"}]), tmp_path)
    assert alone.details["targets"]["one"] == measured["whole"]


def test_a_model_of_another_tokenizer_is_refused(job, tmp_path):
    folder = tiny_model_folder(tmp_path / "other")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="has another tokenizer") as caught:
        prepare(job(targets=[{"label": "other", "model": str(folder)}]))
    assert "as `model.source`" in str(caught.value.hint)


def test_an_adapter_without_whole_safetensors_is_refused_and_never_unpickled(job, tmp_path):
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-9])
    with pytest.raises(ArtifactError, match="no whole safetensors file"):
        prepare(job())
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ArtifactError, match=r"has no adapter_model.safetensors, found .*adapter_model\.bin"):
        prepare(job())


def test_more_workers_than_it_would_use_are_refused(job):
    with pytest.raises(ConfigError, match="measures on one worker, not 2"):
        job(resources={"workers": 2})


def test_an_adapter_of_another_model_is_told(job, tmp_path):
    other = tiny_model_folder(tmp_path / "wide", hidden_size=64)
    with pytest.raises(ArtifactError, match="does not fit the model") as caught:
        run(job(model={"source": str(other), "dtype": "float32"}), tmp_path)
    assert "--model" in str(caught.value.hint)


def test_the_page_is_self_contained_and_escapes(job, tmp_path):
    rows = [{"prompt": f"<script>{n}</script> & 赤", "completion": f"<b>{n}</b>"} for n in range(8)]
    data = write_jsonl(tmp_path / "odd.jsonl", rows)
    run(job(data={"train": [{"source": str(data)}], "eval": {"split": 0.5}, "max_length": 256}), tmp_path)
    page = (run_folder(job()) / "comparison.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;" in page and "赤" in page
    assert "http" not in page and "src=" not in page
    assert "比較" in page and "v1.0" in page and "95 % interval" in page


def test_where_it_stands_is_written_while_it_runs(job, tmp_path):
    run(job(), tmp_path)
    last = json.loads((run_folder(job()) / "progress.json").read_text(encoding="utf-8"))
    assert (last["what"], last["done"], last["total"]) == ("v1.0: answers", 3, 3)


def test_an_interrupted_run_goes_on_with_what_it_had_not_asked(job, tmp_path, monkeypatch):
    asked, generate, interrupted = [], measuring.generate_answers, [True]

    def once_interrupted(*args, adapter, **options):
        if adapter is not None and interrupted.pop():
            raise KeyboardInterrupt
        asked.append(adapter)
        return generate(*args, adapter=adapter, **options)

    monkeypatch.setattr(measuring, "generate_answers", once_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(job(), tmp_path)
    kept = {path.name for path in run_folder(job()).glob("measured-*")}
    assert kept == {"measured-base.json", "measured-v1.0.json"}
    interrupted.append(False)
    halved = run(job(), tmp_path)
    assert asked == [None, "target_1"], "the base is not asked again"
    assert not [*run_folder(job()).glob("measured-*")]
    interrupted.append(False)
    whole = run(job(), tmp_path)
    assert asked[2:] == [None, "target_1"], "a run that was done is run again as a whole"
    assert whole.details == halved.details


def test_an_interrupted_runs_answers_are_not_anothers(job, tmp_path):
    kept = Kept(tmp_path / "measured-a.json", ["one"])
    assert kept.once("answers", lambda: ["赤"]) == ["赤"]
    assert Kept(tmp_path / "measured-a.json", ["one"]).once("answers", lambda: ["other"]) == ["赤"]
    assert Kept(tmp_path / "measured-a.json", ["two"]).once("answers", lambda: ["other"]) == ["other"]


def test_a_task_that_the_data_does_not_fit_leaves_the_earlier_result(job, tmp_path):
    run(job(), tmp_path)
    with pytest.raises(DataError, match="column `choices`: is missing"):
        run(job(evaluate={"tasks": ["multiple_choice"]}), tmp_path)
    assert (run_folder(job()) / "result.json").is_file()


def test_two_targets_of_one_label_are_refused(job):
    with pytest.raises(ConfigError, match="two targets are labelled `a`"):
        job(targets=[{"label": "a"}, {"label": "a", "num_fewshot": 1}])


def test_weights_that_were_saved_quantised_are_refused(job, quantised_model):
    with pytest.raises(ConfigError, match=r"saved \(gptq\)"):
        prepare(job(model={"source": str(quantised_model), "dtype": "float32"}, targets=[{"label": "base"}]))
