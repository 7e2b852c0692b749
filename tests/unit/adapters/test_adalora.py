"""AdaLoRA's schedule: ranks fall to the target, survive an interruption, and are what is kept."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmray.adapters.adalora import Adalora
from lmray.artifacts.store import run_folder
from lmray.errors import ConfigError
from lmray.models.load import load_model
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.train.plan import make_plan

SETTINGS = {"name": "adalora", "init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 3, "deltaT": 1}
LAYERS = 14


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    return lambda name, **changes: tiny_job(
        tiny_model, tiny_data, tmp_path / "store", name=name, adapter=SETTINGS | changes, train__max_steps=12
    )


def ranks_left(checkpoint) -> int:
    weights = load_file(checkpoint / "weights.safetensors")
    return sum(int(tensor.count_nonzero()) for name, tensor in weights.items() if "lora_E" in name)


def test_ranks_shrink_to_the_target_and_a_resume_amid_is_exact(job, tmp_path, tiny_model):
    straight, broken = job("straight"), job("broken")
    run_here(straight, tmp_path / "scratch")
    run_here(broken, tmp_path / "scratch", stop_at=5)
    (amid,) = list(run_folder(broken).glob("checkpoint-00000005"))
    assert 3 * LAYERS < ranks_left(amid) < 6 * LAYERS
    run_here(broken, tmp_path / "scratch")
    assert curve(broken) == curve(straight)
    folders = [run_folder(one) / "adapter" for one in (straight, broken)]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    kept = sum(len(tensor) for name, tensor in one.items() if "lora_E" in name)
    assert kept == 3 * LAYERS
    pattern = json.loads((folders[0] / "adapter_config.json").read_text(encoding="utf-8"))["rank_pattern"]
    assert sum(map(sum, pattern.values())) == kept and len(set(map(sum, pattern.values()))) > 1
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(folders[0]))


def test_the_budget_is_full_before_tinit_and_final_after_tfinal(job, tmp_path):
    one = job("one")
    counts = {}
    for step in (2, 9, 11):
        run_here(one, tmp_path / "scratch", stop_at=step - max(counts, default=0))
        counts[step] = ranks_left(run_folder(one) / f"checkpoint-{step:08d}")
    assert counts == {2: 6 * LAYERS, 9: 3 * LAYERS, 11: 3 * LAYERS}


def test_loaded_into_a_fresh_one_pruned_ranks_stay_pruned(tiny_model, job, tmp_path):
    run_here(job("one"), tmp_path / "scratch")
    folder = run_folder(job("one")) / "adapter"
    adapter = Adalora(init_r=6, target_r=3).for_steps(12)
    model = adapter.attach(load_model(tiny_model, "float32").requires_grad_(False), seed=3)
    adapter.load(model, folder)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(folder))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    left = sum(int(one.count_nonzero()) for name, one in model.named_parameters() if "lora_E" in name)
    assert left == 3 * LAYERS


def test_the_penalty_is_the_mean_distance_from_orthogonal(tiny_model):
    adapter = Adalora(init_r=2, target_r=1, orth_reg_weight=2.0).for_steps(4)
    model = adapter.attach(load_model(tiny_model, "float32").requires_grad_(False), seed=0)
    distances = []
    for name, one in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            rows = one.detach() if "lora_A" in name else one.detach().T
            gram = [[float((a * b).sum()) - (i == j) for j, b in enumerate(rows)] for i, a in enumerate(rows)]
            distances.append(sum(value**2 for row in gram for value in row) ** 0.5)
    found = adapter.penalty(model)
    assert found is not None and found.item() == pytest.approx(2.0 * sum(distances) / len(distances), rel=1e-4)
    assert Adalora(orth_reg_weight=0.0).penalty(model) is None


def test_a_schedule_longer_than_the_run_is_refused_by_the_plan(job):
    with pytest.raises(ConfigError, match="leave none of 12 steps to prune in"):
        make_plan(job("one", tinit=8, tfinal=4))
    with pytest.raises(ValidationError, match="less than `init_r`"):
        Adalora(init_r=4, target_r=4)
