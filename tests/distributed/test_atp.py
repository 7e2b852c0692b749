"""Tuning and pruning over several ranks: one curve, one set of masks, wherever the weights lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmray.artifacts.store import run_folder
from lmray.job import TrainJob
from lmray.metrics.events import read_events
from lmray.testing.jobs import curve, run_here, tiny_job, tiny_rows, write_jsonl
from lmray.testing.matrix import STEP_ROWS, shared_by
from lmray.testing.pruned import TINY_ATP
from lmray.testing.ranks import train_ranks


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path):
    common = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(40))

    def make(strategy: str, workers: int, rows: Path = common, **changes: Any) -> TrainJob:
        storage = tmp_path / f"{strategy}-{workers}"
        settings = {"train__max_steps": 8, "train__eval_steps": 4, "resources__step_timeout_s": None}
        return tiny_job(
            tiny_model,
            rows,
            storage,
            **{**settings, "method": TINY_ATP, "sharding": strategy, **shared_by(workers), **changes},
        )

    return make


def masks(one: TrainJob) -> list[dict[str, Any]]:
    return read_events(run_folder(one) / "masks.jsonl")


def same(found: TrainJob, alone: TrainJob) -> None:
    for name in ("train.loss", "prune.search_loss", "prune.remaining", "prune.budget_loss", "eval.loss"):
        assert curve(found, name) == pytest.approx(curve(alone, name), rel=1e-5, abs=1e-5), name
    assert masks(found) == masks(alone)
    expected = AutoModelForCausalLM.from_pretrained(run_folder(alone) / "model").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(run_folder(found) / "model").state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-4), name


FEWER = {"method": {**TINY_ATP, "layers": 1, "remaining": 0.4}}


@pytest.mark.parametrize(
    ("strategy", "stop_at", "changes"),
    [("ddp", 6, {}), ("fsdp2", 3, {}), ("fsdp2", None, FEWER)],
    ids=["frozen", "searching", "fewer layers"],
)
def test_two_ranks_give_the_curve_and_the_masks_of_one(job, strategy, stop_at, changes, tmp_path):
    alone, shared = job("single", 1, **changes), job(strategy, 2, **changes)
    run_here(alone, tmp_path / "scratch")
    if stop_at is not None:
        assert train_ranks(shared, stop_at=stop_at).status == "stopped"
    assert train_ranks(shared).status == "succeeded"
    assert curve(alone)[0] != curve(alone)[-1]
    same(shared, alone)


def test_what_a_rank_reads_again_says_nothing_of_what_units_are_worth(job, tmp_path):
    apart = [row | {"prompt": f"{number}", "topic": f"{number}"} for number, row in enumerate(tiny_rows(40))]
    rows = write_jsonl(tmp_path / "apart.jsonl", apart)
    few = {"rows": rows, "method": {**TINY_ATP, "search_fraction": 0.1}, "train__max_steps": 4}
    one_by_one = {"train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": STEP_ROWS // 2}
    alone, shared = job("single", 1, **few), job("ddp", 2, **few, **one_by_one)
    run_here(alone, tmp_path / "scratch")
    assert json.loads((run_folder(alone) / "data.json").read_text())["search"]["examples"] == 3
    assert train_ranks(shared).status == "succeeded"
    same(shared, alone)
