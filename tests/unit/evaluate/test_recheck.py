"""Evaluating again: what is kept of each evaluation, what counts as worse, and how the run ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.evaluations import Evaluations
from lmray.artifacts.store import open_store, run_folder
from lmray.cli.run import EXIT_CODES
from lmray.config import Document, decode
from lmray.context import LocalContext
from lmray.errors import ArtifactError, ConfigError
from lmray.evaluate import program
from lmray.evaluate.recheck import recheck, standings, versions
from lmray.job import EvaluateJob, load
from lmray.models.source import find_model
from lmray.testing.tiny import tiny_adapter_folder

PRODUCTION = Path(__file__).parents[3] / "configs/evaluate/production.yaml"


@pytest.fixture
def kept(tiny_model, tmp_path):
    """Keeps a version of `helper` and promotes it."""
    artifacts = Artifacts(open_store(str(tmp_path / "store")))
    base = {"source": str(tiny_model), "digest": find_model(str(tiny_model)).digest}

    def keep(seed: int) -> str:
        folder = tiny_adapter_folder(tiny_model, tmp_path / f"adapter-{seed}", seed=seed)
        return artifacts.promote(artifacts.keep("helper", folder, base=base).ref, "production").ref

    return keep


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    def make(**changes) -> EvaluateJob:
        tree = {
            "kind": "evaluate",
            "name": "again",
            "storage": str(tmp_path / "store"),
            "model": {"source": str(tiny_model), "dtype": "float32"},
            "data": {"train": [{"source": str(tiny_data)}], "eval": {"split": 0.25}, "max_length": 256},
            "targets": [{"label": "production", "adapter": "helper@production"}],
            "evaluate": {"tasks": ["loss", "f1"], "base": False, "max_examples": 2, "max_new_tokens": 2},
            "tolerances": {"eval.loss": 0.1},
        }
        return decode(EvaluateJob, Document("test", tree | changes))

    return make


def again(job: EvaluateJob, loss: float, *, f1: float = 0.5) -> list[str]:
    """What an evaluation with these metrics is told."""
    return recheck(job, {"production": {"eval.loss": loss, "eval.f1": f1}}, versions(job), run="run")


def test_an_evaluation_that_is_as_good_as_before_succeeds_and_a_worse_one_fails(job, kept, tmp_path, monkeypatch):
    version = kept(1)

    def run():
        return program.evaluate(job(), LocalContext(run_folder(job()), scratch=tmp_path / "scratch"))

    first, second = run(), run()
    assert (first.status, second.status, second.details["worse"]) == ("succeeded", "succeeded", [])
    measure = program._measure

    def worse(*told):
        found = measure(*told)
        found["production"].metrics["eval.loss"] += 0.2
        return found

    monkeypatch.setattr(program, "_measure", worse)
    third = run()
    loss = first.metrics["eval.loss"]
    assert third.status == "failed"
    assert third.details["worse"] == [f"{version}: eval.loss is {loss + 0.2:.4g}, was {loss:.4g}"]
    assert json.loads((run_folder(job()) / "result.json").read_text())["status"] == "failed"
    found = Evaluations(open_store(str(tmp_path / "store"))).of("helper")
    assert [one.version for one in found] == [version] * 3
    assert [dict(one.worse) for one in found] == [{}, {}, {"eval.loss": pytest.approx(loss)}]
    assert found[0].metrics["eval.loss"] == pytest.approx(loss) and found[0].time > 0


def test_the_job_that_is_shipped_for_it_runs_and_a_regression_ends_it_with_1(
    kept, tiny_model, tiny_data, tmp_path, monkeypatch
):
    kept(1)
    told = {
        "model": {"source": str(tiny_model), "dtype": "float32"},
        "data": {"train": [{"source": str(tiny_data)}], "max_length": 256},
        "targets": [{"label": "production", "adapter": "helper@production"}],
        "data.eval.by": "topic",
        "evaluate.max_examples": 2,
        "evaluate.max_new_tokens": 2,
        "storage": str(tmp_path / "store"),
    }
    job = load(PRODUCTION).changed(told)
    first = program.evaluate(job, LocalContext(run_folder(job), scratch=tmp_path / "scratch"))
    assert (first.status, EXIT_CODES[first.status]) == ("succeeded", 0)
    monkeypatch.setattr(program, "recheck", lambda *args, **told: ["helper: eval.loss is 3, was 2"])
    again = program.evaluate(job, LocalContext(run_folder(job), scratch=tmp_path / "scratch"))
    assert (again.status, EXIT_CODES[again.status]) == ("failed", 1)


def test_a_version_is_compared_with_its_first_evaluation_so_that_it_cannot_creep(job, kept):
    kept(1)
    assert again(job(), 2.0) == [] == again(job(), 2.08)
    assert len(again(job(), 2.16)) == 1
    assert again(job(), 1.0) == [], "better is fine"
    assert len(again(job(), float("nan"))) == 1


def test_a_new_version_is_compared_with_the_one_before_it_and_then_with_itself(job, kept):
    first = kept(1)
    again(job(), 2.0)
    kept(2)
    [told] = again(job(), 2.5)
    assert "eval.loss is 2.5, was 2" in told and f"with {first}" in told
    assert again(job(), 2.5) == [], "it was said once; from now on this is what it is"


def test_it_is_due_for_a_version_that_was_not_measured_lately(job, kept, monkeypatch):
    kept(1)

    def due(now: float, **changes) -> bool:
        return any(one.is_due(every_s=100.0, now=now) for one in standings(job(**changes), now=now))

    monkeypatch.setattr("lmray.artifacts.evaluations.time.time", lambda: 1000.0)
    assert due(1000.0), "never measured"
    again(job(), 2.0)
    assert [due(now) for now in (1000.0, 1099.9, 1100.0)] == [False, False, True]
    assert due(1000.0, targets=[{"label": "p", "adapter": "helper@production", "num_fewshot": 2}])
    assert not due(1000.0, name="other", tolerances={"eval.loss": 9.0}), "it would measure the same"
    assert due(1000.0, evaluate={"tasks": ["loss"]}), "it would not"
    kept(2)
    assert due(1000.0), "another version"
    again(job(), 2.0)
    kept(1)
    assert not due(1099.0), "rolled back to one that was measured"


def test_a_record_of_a_wrong_clock_does_not_count(job, kept, monkeypatch):
    kept(1)
    for made in (1e6, 1000.0):
        monkeypatch.setattr("lmray.artifacts.evaluations.time.time", lambda made=made: made)
        again(job(), 2.0)
        (one,) = standings(job(), now=1000.0)
        assert (one.last and one.last.time) == (1000.0 if made == 1000.0 else None)


def test_a_promotion_while_it_measures_changes_nothing_of_what_it_measures(job, kept, tmp_path, monkeypatch):
    first, measure = kept(1), program._measure

    def promoted_meanwhile(asked, *told):
        kept(2)
        assert [target.adapter for target in asked.targets] == [first]
        return measure(asked, *told)

    monkeypatch.setattr(program, "_measure", promoted_meanwhile)
    program.evaluate(job(), LocalContext(run_folder(job()), scratch=tmp_path / "scratch"))
    assert [one.version for one in Evaluations(open_store(str(tmp_path / "store"))).of("helper")] == [first]


def test_more_is_better_where_the_list_of_metrics_says_so(job, kept):
    kept(1)
    asks = job(tolerances={"eval.f1": 0.1})
    assert again(asks, 2.0, f1=0.5) == [] == again(asks, 9.0, f1=0.9)
    assert again(asks, 2.0, f1=0.45) == [] and len(again(asks, 2.0, f1=0.3)) == 1


def test_only_evaluations_that_asked_the_same_are_compared(job, kept, tiny_data):
    kept(1)
    again(job(), 2.0)
    other = job(data={"train": [{"source": str(tiny_data)}], "eval": {"split": 0.5}, "max_length": 256})
    assert again(other, 5.0) == []
    assert len(again(job(name="other", tolerances={"eval.loss": 0.5}), 5.0)) == 1


def test_targets_that_are_no_artifacts_are_measured_beside_but_not_kept(job, kept, tmp_path):
    version = kept(1)
    targets = [{"label": "base"}, {"label": "production", "adapter": "helper@production"}]
    assert versions(job(targets=targets)) == {"production": version}
    assert versions(job(targets=targets, tolerances={})) == {}
    for only in ({"label": "base"}, {"label": "folder", "adapter": str(tmp_path / "adapter-1")}):
        with pytest.raises(ConfigError, match="no target is an artifact"):
            program.prepare(job(targets=[only]))


@pytest.mark.parametrize("name", ["eval.los", "eval.seconds", "train.samples"])
def test_a_tolerance_of_what_cannot_be_worse_is_refused(job, name):
    with pytest.raises(ConfigError, match="is no metric of which more or less is better"):
        job(tolerances={name: 0.1})


def test_a_tolerance_of_what_is_not_measured_is_refused(job, kept):
    kept(1)
    with pytest.raises(ConfigError, match=r"tolerances\.eval\.accuracy.* is not measured") as caught:
        again(job(tolerances={"eval.accuracy": 0.1}), 2.0)
    assert "eval.loss, eval.f1" in str(caught.value)


def test_a_spoilt_record_is_named(job, kept):
    kept(1)
    store = open_store(job().storage)
    store.put("artifacts/helper/evaluations/1.json", b"{")
    with pytest.raises(ArtifactError, match="is no record of an evaluation"):
        again(job(), 2.0)
