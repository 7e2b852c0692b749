"""The optimizer and the schedule that a job names: planned, run, resumed."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmray.artifacts.store import run_folder
from lmray.data.batch import collate
from lmray.errors import ConfigError
from lmray.methods.sft import sft_loss
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.train.plan import make_plan
from lmray.train.prepare import prepare


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    return lambda **changes: tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)


def test_the_plan_counts_the_optimizers_memory_and_refuses_what_cannot_run(job):
    trained = make_plan(job()).model["trainable_parameters"]
    sizes = {
        name: make_plan(job(train__optim=name)).memory_bytes["optimizer"] for name in ("adamw_torch", "sgd", "muon")
    }
    assert sizes == {"adamw_torch": 8 * trained, "sgd": 0, "muon": 4 * trained}
    with pytest.raises(ConfigError, match=r"train\.optim: `paged_adamw_8bit` runs on GPUs only"):
        make_plan(job(train__optim="paged_adamw_8bit"))
    with pytest.raises(ConfigError, match="wider than its rank"):
        make_plan(job(train__optim={"name": "galore_adamw", "rank": 64}))
    with pytest.raises(ConfigError, match="adamw_torch"):
        job(train__optim="adamw_troch")


def test_an_average_beside_a_falling_rate_is_warned_of(job):
    def averaging(schedule):
        return make_plan(job(train__optim="schedule_free_adamw", train__lr_scheduler_type=schedule)).warnings

    assert any("lr_scheduler_type: constant" in warning for warning in averaging("cosine"))
    assert not averaging("constant")


def test_an_average_is_what_is_measured_kept_and_resumed(job, tmp_path):
    def made(name):
        return job(
            name=name,
            train__optim="schedule_free_adamw",
            train__lr_scheduler_type="constant",
            train__eval_steps=2,
            evaluate={"tasks": ["loss"]},
        )

    straight, broken = made("straight"), made("broken")
    result = run_here(straight, tmp_path / "scratch")
    run_here(broken, tmp_path / "scratch", stop_at=3)
    assert run_here(broken, tmp_path / "scratch").status == "succeeded"
    assert curve(broken) == curve(straight) and curve(broken, "eval.loss") == curve(straight, "eval.loss")
    kept, again = (load_file(run_folder(one) / "adapter" / "adapter_model.safetensors") for one in (straight, broken))
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    base = AutoModelForCausalLM.from_pretrained(straight.model.source)
    batch = collate(prepare(straight).eval_rows, pad_token_id=0)
    with torch.no_grad():
        loss = sft_loss(PeftModel.from_pretrained(base, result.details["adapter"]), batch).item() / batch.num_supervised
    assert result.metrics["eval.loss"] == pytest.approx(loss, abs=1e-5)


def test_a_schedule_is_set_by_name_or_with_its_fields(job, tmp_path):
    stays = job(name="stays", train__lr_scheduler_type="constant", train__warmup_ratio=0.0)
    ends = job(
        name="ends",
        train__lr_scheduler_type={"name": "cosine_with_min_lr", "min_lr_rate": 0.5},
        train__warmup_ratio=0.0,
    )
    for one in (stays, ends):
        run_here(one, tmp_path / "scratch")
    assert curve(stays, "train.learning_rate") == [0.01] * 6
    assert curve(ends, "train.learning_rate")[-1] > 0.005
