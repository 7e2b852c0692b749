"""Training every weight: what is trained, in what type, what it takes, and what is kept."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmray.adapters.full import Full
from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store, run_folder
from lmray.errors import CheckpointError, ConfigError
from lmray.models.load import load_model
from lmray.models.precision import computing
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.tiny import tiny_model_folder
from lmray.train.plan import make_plan

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    def make(name="full", **changes):
        return tiny_job(tiny_model, tiny_data, tmp_path / "store", **{"name": name, "adapter": "full"} | changes)

    return make


def test_the_plan_counts_gradients_and_optimizer_of_every_weight(job, tiny_model):
    plan = make_plan(job())
    count = sum(one.numel() for one in load_model(tiny_model, "float32").parameters())
    assert plan.model["parameters"] == plan.model["trainable_parameters"] == count
    memory = plan.memory_bytes
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (4 * count, 4 * count, 8 * count)
    assert plan.kernels == "plain" and plan.reasons["kernels"] == "weights of the model itself are trained"
    with pytest.raises(ConfigError, match="weights of the model itself are trained"):
        make_plan(job(model__kernels="fused"))


def test_a_trained_weight_costs_half_as_much_time_again(job):
    lora = make_plan(job(adapter={"name": "lora", "r": 1}))
    assert 1.2 < make_plan(job()).flops["step"] / lora.flops["step"] < 1.5


@pytest.mark.parametrize(("masters", "width"), [("auto", 4), ("never", 2)])
def test_a_bfloat16_model_has_float32_masters_unless_told_otherwise(job, masters, width):
    one = job(adapter={"name": "full", "master_weights": masters}, model__dtype="bfloat16")
    plan = make_plan(one)
    count = plan.model["parameters"]
    memory = plan.memory_bytes
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (
        width * count,
        width * count,
        2 * width * count,
    )


def test_masters_are_multiplied_in_the_models_own_type(tiny_model):
    model = Full().attach(load_model(tiny_model, "bfloat16").requires_grad_(False), seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    seen = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    with computing(model):
        model(IDS).logits.float().sum().backward()
    assert seen == [torch.bfloat16]
    assert all(one.grad is not None and one.grad.dtype == torch.float32 for one in model.parameters())


def test_steps_too_small_for_bfloat16_add_up_in_the_masters(tiny_model):
    moved = {}
    for masters in ("auto", "never"):
        model = Full(master_weights=masters).attach(load_model(tiny_model, "bfloat16").requires_grad_(False), seed=0)
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data.fill_(1.0)
        for _ in range(100):
            weight.data -= 1e-4
        moved[masters] = 1.0 - weight.data.float().mean().item()
    assert moved["auto"] == pytest.approx(1e-2, rel=1e-3) and moved["never"] == 0.0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_model_is_kept_in_the_type_it_was_loaded_in(tmp_path, tied, dtype):
    folder = tiny_model_folder(tmp_path / "base", tie_word_embeddings=tied)
    model = Full().attach(load_model(folder, dtype).requires_grad_(False), seed=0)
    for parameter in model.parameters():
        parameter.data += 0.01
    Full().save(model, tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype
    tensors = load_file(tmp_path / "kept" / "model.safetensors")
    assert {one.dtype for one in tensors.values()} == {getattr(torch, dtype)}
    assert ("lm_head.weight" in tensors) is not tied
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is tied
    tolerance = 1e-5 if dtype == "float32" else 0.3
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, atol=tolerance, rtol=tolerance)
    with computing(model):
        assert model.model.layers[0].mlp(torch.ones(1, 32)).dtype == getattr(torch, dtype), "also after saving"


def test_a_bfloat16_run_resumes_exactly_from_its_masters(job, tmp_path):
    straight, broken = (job(name, model__dtype="bfloat16") for name in ("straight", "broken"))
    run_here(straight, tmp_path / "scratch")
    run_here(broken, tmp_path / "scratch", stop_at=3)
    run_here(broken, tmp_path / "scratch")
    assert curve(broken) == curve(straight)


def test_a_run_measures_the_base_from_the_base_and_keeps_a_model(job, tmp_path):
    tasks = {"tasks": ["json_match", "loss"], "max_new_tokens": 4}
    full = run_here(job(evaluate=tasks, output={"artifact": "whole"}), tmp_path / "scratch")
    lora = run_here(job("lora", adapter={"name": "lora"}, evaluate=tasks), tmp_path / "scratch")
    assert full.metrics["base.loss"] == pytest.approx(lora.metrics["base.loss"], abs=1e-5)
    assert full.metrics["eval.loss"] < full.metrics["base.loss"]
    artifact = Artifacts(open_store(job().storage)).find("whole")
    assert artifact.kind == "model" and {"model.safetensors", "config.json", "tokenizer.json"} <= set(artifact.files)
    assert full.details["model"] == str(run_folder(job()) / "model")


def test_a_folder_that_holds_no_model_is_no_checkpoint(tiny_model, tmp_path):
    model = Full().attach(load_model(tiny_model, "float32"), seed=0)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Full().load(model, tmp_path)
