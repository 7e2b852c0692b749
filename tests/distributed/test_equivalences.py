"""Same job, same curve, however many ranks share it and however the model lies on them: float32, tiny model."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from lmray.artifacts.files import MANIFEST, read_sealed
from lmray.artifacts.store import run_folder
from lmray.metrics.events import read_events
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.ranks import train_ranks

CHANGES = {"train__max_steps": 4, "train__save_steps": 2, "train__eval_steps": 2, "evaluate": {"tasks": ["loss"]}}


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    """A job of 8 rows a step, whatever the number of workers."""

    def make(name: str, workers: int = 1, sharding="auto", **changes):
        rows = {"train__per_device_train_batch_size": 8 // workers, **CHANGES, **changes}
        resources = {"workers": workers}
        return tiny_job(tiny_model, tiny_data, tmp_path / name, sharding=sharding, resources=resources, **rows)

    return make


def weights(job) -> dict:
    (path,) = (run_folder(job) / job.adapter.kept).glob("*model.safetensors")
    return load_file(path)


def assert_same(one, expected, *, atol: float = 1e-5) -> None:
    for name in ("train.loss", "eval.loss"):
        assert curve(one, name) == pytest.approx(curve(expected, name), abs=atol)
    for name, tensor in weights(expected).items():
        assert (weights(one)[name] - tensor).abs().max() < 10 * atol


ADAPTERS = {
    "lora": {},
    "full": {"adapter": "full", "train__learning_rate": 1e-3},
    "partial": {"adapter": {"name": "partial", "last_n": 1}},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_same_is_learnt_on_two_ranks(job, tmp_path, adapter):
    changes = ADAPTERS[adapter]
    alone = job("alone", **changes)
    result = run_here(alone, tmp_path / "scratch")
    assert curve(alone)[-1] < curve(alone)[0] - 0.05, "the curve must move, else equality says nothing"
    for sharding in ("ddp", "fsdp2"):
        both = job(sharding, 2, sharding, **changes)
        found = train_ranks(both)
        assert_same(both, alone)
        for name in ("eval.loss", "base.loss"):
            assert found.metrics[name] == pytest.approx(result.metrics[name], abs=1e-5)
        assert len(found.details["peak_memory_bytes_by_worker"]) == 2
        assert not list(run_folder(both).glob(".*.tmp"))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_how_steps_are_cut_and_how_rows_fall_on_the_ranks_changes_nothing(job, tmp_path, sharding):
    """One row is left for the last step of the epoch: two of the three ranks have none."""
    changes = {"train__max_steps": None, "train__num_train_epochs": 1.0, "train__save_steps": 100}
    alone = job("alone", train__per_device_train_batch_size=15, **changes)
    run_here(alone, tmp_path / "scratch")
    cut = {"train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": 5}
    one = job("cut", 3, sharding, **changes, **cut)
    train_ranks(one)
    assert json.loads((run_folder(one) / "plan.json").read_text())["samples"] % 15 == 1
    assert_same(one, alone)


def test_what_one_held_whole_goes_on_shared_by_two(job, tmp_path):
    changes = {"adapter": "full", "train__learning_rate": 1e-3}
    straight, broken = job("straight", **changes), job("broken", **changes)
    run_here(straight, tmp_path / "scratch")
    assert run_here(broken, tmp_path / "scratch", stop_at=2).status == "stopped"
    again = broken.changed({"resources.workers": 2})
    assert train_ranks(again).status == "succeeded"
    plan = json.loads((run_folder(again) / "plan.json").read_text(encoding="utf-8"))
    assert plan["sharding"]["name"] == "fsdp2" and plan["rows_per_step"] == 8
    assert_same(again, straight)


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_two_ranks_saved_goes_on_at_any_other_number(job, tmp_path, ranks):
    straight, broken = job("straight"), job("broken", 2, "fsdp2", train__gradient_accumulation_steps=1)
    run_here(straight, tmp_path / "scratch")
    assert train_ranks(broken, stop_at=2).status == "stopped"
    (checkpoint,) = run_folder(broken).glob("checkpoint-*")
    files = set(read_sealed(checkpoint)["files"])
    assert {"shards/.metadata", "shards/__0_0.distcp", "shards/__1_0.distcp", "rng-00001.safetensors"} <= files
    assert {path.name for path in checkpoint.iterdir()} == {name.partition("/")[0] for name in files} | {MANIFEST}
    sharding = "auto" if ranks == 1 else "fsdp2"
    again = broken.changed({"resources.workers": ranks, "sharding": sharding})
    assert train_ranks(again).status == "succeeded"
    assert_same(again, straight)
    assert [event["step"] for event in read_events(run_folder(again) / "events.jsonl")] == [1, 2, 3, 4]
