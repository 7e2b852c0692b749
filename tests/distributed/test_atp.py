"""Tuning and pruning over several ranks: one curve, one set of masks, wherever the weights lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmray.artifacts.store import run_folder
from lmray.job import TrainJob
from lmray.methods._masking import Masking
from lmray.metrics.events import read_events
from lmray.pruning.generator import Generator
from lmray.pruning.structure import KINDS
from lmray.testing.jobs import curve, run_here, tiny_job, tiny_rows, write_jsonl
from lmray.testing.matrix import STEP_ROWS, shared_by
from lmray.testing.pruned import TINY_ATP
from lmray.testing.ranks import RankDiedError, run_ranks, train_ranks, train_until_killed
from lmray.train.group import torchrun_context
from lmray.train.program import train


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
    told, expected = masks(found), masks(alone)
    norms = [[line.pop("removed_norm") for line in lines] for lines in (told, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4, abs=1e-5)
    assert told == expected and all(len(line["masks"]) == 16 for line in told)
    weights = AutoModelForCausalLM.from_pretrained(run_folder(alone) / "model").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(run_folder(found) / "model").state_dict().items():
        assert torch.allclose(tensor, weights[name], atol=1e-4), name


FEWER = {"method": {**TINY_ATP, "layers": 1, "remaining": 0.4}}


@pytest.mark.parametrize(("strategy", "killed_at"), [("ddp", 3), ("fsdp2", 8)], ids=["searching", "frozen"])
def test_a_killed_rank_costs_nothing_in_either_phase(job, strategy, killed_at, tmp_path):
    alone, shared = job("single", 1), job(strategy, 2)
    run_here(alone, tmp_path / "scratch")
    survivor, dead = train_until_killed(shared, step=killed_at)
    assert isinstance(dead, RankDiedError) and isinstance(survivor, Exception)
    phases = [line["phase"] for line in masks(shared)]
    assert (phases[-1] == "frozen") == (killed_at == 8)
    assert train_ranks(shared).status == "succeeded"
    second = [event["step"] for event in read_events(run_folder(shared) / "events.jsonl") if event["attempt"] == 2]
    assert second[0] == killed_at - (killed_at - 1) % 2, "from the checkpoint before, two steps apart"
    same(shared, alone)


def _masks_of_each_step(rank: int, one: TrainJob) -> list[list[list[float]]]:
    """On this rank; the generator of the second starts elsewhere."""
    made, decided, found = Generator.__init__, Masking.before_step, []

    def elsewhere(self, sizes, *, seed):
        made(self, sizes, seed=seed + rank)

    def kept(self, step, gradients):
        decided(self, step, gradients)
        found.append([self.gates.masks[kind].tolist() for kind in KINDS])

    patched = patch.object(Generator, "__init__", elsewhere), patch.object(Masking, "before_step", kept)
    with patched[0], patched[1], torchrun_context(run_folder(one)) as ctx:
        train(one, ctx)
    return found


@pytest.mark.parametrize("gate", ["gumbel", "deterministic"])
def test_every_rank_has_the_masks_of_the_first(job, gate):
    first, second = run_ranks(2, _masks_of_each_step, job("ddp", 2, method={**TINY_ATP, "gate": gate}))
    assert len(first) == 8 and first[1] != first[-1]
    assert first == second


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
