"""Same job, same curve, however many ranks share it and however the model lies on them: float32, tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lmray.artifacts.files import MANIFEST, read_sealed
from lmray.artifacts.store import run_folder
from lmray.metrics.events import read_events
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.matrix import ADAPTERS, sharding, shared_by
from lmray.testing.ranks import train_ranks

CHANGES = {"train__max_steps": 4, "train__save_steps": 2, "train__eval_steps": 2, "evaluate": {"tasks": ["loss"]}}


@pytest.fixture
def job(matrix_model, tiny_data, tmp_path):
    """A job of 8 rows a step, whatever the number of workers."""

    def make(name: str, workers: int = 1, strategy: str = "auto", *, adapter: str = "lora", **changes):
        changes = {"sharding": sharding(strategy, tmp_path), **CHANGES, **ADAPTERS[adapter], **changes}
        return tiny_job(matrix_model(adapter), tiny_data, tmp_path / name, **{**shared_by(workers), **changes})

    return make


def weights(job) -> dict:
    (path,) = (run_folder(job) / job.adapter.kept).glob("*model.safetensors")
    return load_file(path)


def assert_same(one, expected, *, atol: float = 1e-5) -> None:
    for name in ("train.loss", "eval.loss"):
        assert curve(one, name) == pytest.approx(curve(expected, name), abs=atol)
    for name, tensor in weights(expected).items():
        assert (weights(one)[name] - tensor).abs().max() < 10 * atol


ZERO = ["zero 1", "zero 2", "zero 3"]
CELLS = {"lora": ["ddp", "fsdp2"], "full": ["ddp", "fsdp2"], "partial": ["ddp", "fsdp2"], "qlora": ["ddp"]}


@pytest.mark.parametrize(
    ("adapter", "strategies"),
    [
        *CELLS.items(),
        # Six worlds whose ranks import deepspeed each.
        pytest.param("lora", ZERO, marks=pytest.mark.slow),
        pytest.param("full", ZERO, marks=pytest.mark.slow),
        pytest.param("qlora", ZERO[:2], marks=pytest.mark.slow),
    ],
)
def test_the_same_is_learnt_on_two_ranks(job, tmp_path, adapter, strategies):
    alone = job("alone", adapter=adapter)
    result = run_here(alone, tmp_path / "scratch")
    assert curve(alone)[-1] < curve(alone)[0] - 0.05, "the curve must move, else equality says nothing"
    for strategy in strategies:
        both = job(strategy, 2, strategy, adapter=adapter)
        found = train_ranks(both)
        assert_same(both, alone)
        for name in ("eval.loss", "base.loss"):
            assert found.metrics[name] == pytest.approx(result.metrics[name], abs=1e-5)
        assert len(found.details["peak_memory_bytes_by_worker"]) == 2
        assert not list(run_folder(both).glob(".*.tmp"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_how_steps_are_cut_and_how_rows_fall_on_the_ranks_changes_nothing(job, tmp_path, strategy):
    """One row is left for the last step of the epoch: two of the three ranks have none."""
    changes = {"train__max_steps": None, "train__num_train_epochs": 1.0, "train__save_steps": 100}
    alone = job("alone", train__per_device_train_batch_size=15, **changes)
    run_here(alone, tmp_path / "scratch")
    cut = {"train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": 5}
    one = job("cut", 3, strategy, **changes, **cut)
    train_ranks(one)
    assert json.loads((run_folder(one) / "plan.json").read_text())["samples"] % 15 == 1
    assert_same(one, alone)


def test_what_one_held_whole_goes_on_shared_by_two(job, tmp_path):
    straight, broken = job("straight", adapter="full"), job("broken", adapter="full")
    run_here(straight, tmp_path / "scratch")
    assert run_here(broken, tmp_path / "scratch", stop_at=2).status == "stopped"
    again = broken.changed({"resources.workers": 2})
    assert train_ranks(again).status == "succeeded"
    plan = json.loads((run_folder(again) / "plan.json").read_text(encoding="utf-8"))
    assert plan["sharding"]["name"] == "fsdp2" and plan["rows_per_step"] == 8
    assert_same(again, straight)


PARTS = {
    "fsdp2": {"shards/.metadata", "shards/__0_0.distcp", "shards/__1_0.distcp"},
    "zero 2": {"deepspeed-00000.safetensors", "deepspeed-00001.safetensors"},
    "zero 3": {"deepspeed-00000.safetensors", "deepspeed-00001.safetensors"},
}
"""What two ranks write into a checkpoint of each strategy."""


@pytest.mark.parametrize(
    ("strategy", "adapter", "others"),
    [
        ("fsdp2", "lora", (1, 4)),
        ("fsdp2", "full", (1, 4)),
        ("zero 2", "lora", (1,)),
        pytest.param("zero 3", "lora", (1, 4), marks=pytest.mark.slow),
        pytest.param("zero 3", "full", (1, 4), marks=pytest.mark.slow),
    ],
)
def test_what_two_ranks_saved_goes_on_at_any_other_number(job, tmp_path, strategy, adapter, others):
    straight, broken = job("straight", adapter=adapter), job("broken", 2, strategy, adapter=adapter)
    result = run_here(straight, tmp_path / "scratch")
    assert train_ranks(broken, stop_at=2).status == "stopped"
    (checkpoint,) = run_folder(broken).glob("checkpoint-*")
    files = set(read_sealed(checkpoint)["files"])
    assert PARTS[strategy] | {"rng-00001.safetensors"} <= files
    assert {path.name for path in checkpoint.iterdir()} == {name.partition("/")[0] for name in files} | {MANIFEST}
    assert strategy == "fsdp2" or {Path(name).suffix for name in files} == {".safetensors", ".json"}
    for ranks in others:
        storage = shutil.copytree(broken.storage, tmp_path / f"at {ranks}")
        again = broken.changed({"resources.workers": ranks, "storage": str(storage)})
        if strategy == "fsdp2" and ranks == 1:
            again = again.changed({"sharding": "auto"})  # one rank holds whole what two had shared
        assert train_ranks(again).metrics["eval.loss"] == pytest.approx(result.metrics["eval.loss"], abs=1e-5)
        assert_same(again, straight)
        assert [event["step"] for event in read_events(run_folder(again) / "events.jsonl")] == [1, 2, 3, 4]
