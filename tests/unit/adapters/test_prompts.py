"""Virtual tokens: what they cannot be combined with, and that a run with them is measured as it was trained."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from lmray.adapters.ia3 import Ia3
from lmray.data.batch import collate
from lmray.errors import ConfigError
from lmray.methods.sft import sft_loss
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.train.plan import make_plan
from lmray.train.prepare import prepare


@pytest.fixture(params=["prompt_tuning", "prefix_tuning"])
def job(request, tiny_model, tiny_data, tmp_path):
    settings = {"name": request.param, "num_virtual_tokens": 4}
    return lambda **changes: tiny_job(tiny_model, tiny_data, tmp_path / "store", adapter=settings, **changes)


def test_packing_and_answers_are_refused_by_the_plan(job):
    with pytest.raises(ConfigError, match="before the first example of a row only") as caught:
        make_plan(job(data__packing=True))
    assert caught.value.where == "data.packing"
    with pytest.raises(ConfigError, match="before the first example of a row only") as caught:
        make_plan(job(method={"name": "pretrain", "cross_document_attention": False}))
    assert caught.value.where == "method.cross_document_attention"
    with pytest.raises(ConfigError, match="`json_match` needs answers") as caught:
        make_plan(job(evaluate={"tasks": ["loss", "json_match"]}))
    assert caught.value.where == "evaluate.tasks"


def test_the_plan_has_room_for_the_virtual_tokens(job):
    plan = make_plan(job())
    wider = make_plan(job(adapter__num_virtual_tokens=40))
    assert wider.memory_bytes["activations"] > plan.memory_bytes["activations"]
    assert plan.reasons["kernels"] == "an adapter of another kind than LoRA"
    assert plan.model["trainable_parameters"] in (4 * 32, 4 * 2 * 2 * 16)


def test_its_loss_falls_and_is_that_of_plain_peft(job, tmp_path, tiny_model):
    one = job(evaluate={"tasks": ["loss"]}, train__learning_rate=0.1)
    result = run_here(one, tmp_path / "scratch")
    assert curve(one)[-1] < curve(one)[0] - 0.1
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    batches = [collate([row], pad_token_id=0) for row in prepare(one).eval_rows]
    count = sum(batch.num_supervised for batch in batches)
    with torch.no_grad():
        untouched = sum(sft_loss(base, batch).item() for batch in batches)
        kept = PeftModel.from_pretrained(base, result.details["adapter"])
        tuned = sum(sft_loss(kept, batch).item() for batch in batches)
    assert result.metrics["base.loss"] == pytest.approx(untouched / count, abs=1e-5)
    assert result.metrics["eval.loss"] == pytest.approx(tuned / count, abs=1e-5)


def test_ia3_scales_inputs_of_its_own_layers_only():
    with pytest.raises(ValidationError, match="name it in `target_modules` as well"):
        Ia3(target_modules=("k_proj",), feedforward_modules=("down_proj",))
