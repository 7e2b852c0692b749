"""LoRA's variants: each is trained, kept for the original base, merged, and read by plain `peft`."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmray.adapters.lora import Lora
from lmray.artifacts.store import run_folder
from lmray.data.batch import collate
from lmray.data.tokenise import Tokenised
from lmray.methods.sft import Sft
from lmray.models.load import load_model
from lmray.models.merge import write_merged
from lmray.optim.adamw_torch import AdamwTorch
from lmray.sharding.single import Single
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.tiny import tiny_model_folder
from lmray.train.learner import Learner
from lmray.train.plan import make_plan

IDS = torch.tensor([[5, 6, 7, 8, 9]])
VARIANTS = {
    "rslora": Lora(r=4, use_rslora=True),
    "dora": Lora(r=4, use_dora=True),
    "gaussian": Lora(r=4, init_lora_weights="gaussian"),
    "orthogonal": Lora(r=4, init_lora_weights="orthogonal"),
    "pissa": Lora(r=4, init_lora_weights="pissa"),
    "pissa_niter": Lora(r=4, init_lora_weights="pissa_niter_4"),
    "pissa_rslora": Lora(r=4, init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 2}),
    "olora": Lora(r=4, init_lora_weights="olora", alpha_pattern={"q_proj": 3.0}, rank_pattern={"v_proj": 2}),
    "lm_head": Lora(r=4, modules_to_save=("lm_head",)),
    "embed_tokens": Lora(r=4, modules_to_save=("embed_tokens",)),
    "layers": Lora(r=4, target_modules=("q_proj", "v_proj"), layers_to_transform=(1,)),
    "patterns": Lora(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 5.0}),
    "bias": Lora(r=4, bias="all"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with biases and tied embeddings."""
    return tiny_model_folder(tmp_path_factory.mktemp("biased") / "model", attention_bias=True)


def trained(adapter: Lora, folder, *, seed: int = 0, steps: int = 3) -> torch.nn.Module:
    model = adapter.attach(load_model(folder, "float32").requires_grad_(False), seed=seed)
    optimizer = AdamwTorch().make_optimizer(adapter.parameter_groups(model), learning_rate=0.02, weight_decay=0.0)
    for _ in range(steps):
        model(IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("adapter", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_is_kept_for_the_original_base_and_merges(adapter, folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    untouched = base(IDS).logits
    fresh = adapter.attach(load_model(folder, "float32").requires_grad_(False), seed=0)
    torch.testing.assert_close(fresh(IDS).logits, untouched, atol=1e-4, rtol=1e-4)
    model = trained(adapter, folder)
    expected = model(IDS).logits
    assert (expected - untouched).abs().max() > 0.01
    adapter.save(model, tmp_path / "kept")
    plain = PeftModel.from_pretrained(base, str(tmp_path / "kept"))
    torch.testing.assert_close(plain(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    again = adapter.attach(load_model(folder, "float32").requires_grad_(False), seed=5)
    adapter.load(again, tmp_path / "kept")
    torch.testing.assert_close(again(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    write_merged(folder, tmp_path / "kept", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_what_takes_from_the_base_is_kept_with_twice_the_rank(tiny_model, tmp_path):
    adapter = Lora(r=4, init_lora_weights="pissa")
    model = trained(adapter, tiny_model)
    adapter.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 32, True)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert load_file(tmp_path / "adapter_model.safetensors")[name].shape == (8, 32)
    assert model.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"].weight.shape == (4, 32)


def test_the_plan_counts_the_rank_that_is_trained(tiny_model, tiny_data, tmp_path):
    plans = [
        make_plan(
            tiny_job(tiny_model, tiny_data, tmp_path, adapter={"name": "lora", "r": 4, "init_lora_weights": init})
        )
        for init in (True, "pissa", "olora")
    ]
    assert len({plan.model["trainable_parameters"] for plan in plans}) == 1


@pytest.mark.parametrize("start", ["pissa_niter_4", "olora"])
def test_a_run_that_takes_from_the_base_resumes_exactly_and_measures_the_true_base(
    tiny_model, tiny_data, tmp_path, start
):
    def job(name, adapter):
        evaluate = {"tasks": ["loss"]}
        return tiny_job(tiny_model, tiny_data, tmp_path / "store", name=name, adapter=adapter, evaluate=evaluate)

    settings = {"name": "lora", "r": 4, "init_lora_weights": start}
    straight, broken = job("straight", settings), job("broken", settings)
    result = run_here(straight, tmp_path / "scratch")
    run_here(broken, tmp_path / "scratch", stop_at=3)
    run_here(broken, tmp_path / "scratch")
    assert curve(broken) == curve(straight)
    one, two = (load_file(run_folder(run) / "adapter" / "adapter_model.safetensors") for run in (straight, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)
    plain = run_here(job("plain", {"name": "lora"}), tmp_path / "scratch")
    assert result.metrics["base.loss"] == pytest.approx(plain.metrics["base.loss"], abs=1e-5)


def test_lora_plus_moves_b_by_its_ratio(tiny_model):
    ratio = 4.0
    groups = Lora(lora_plus_ratio=ratio).parameter_groups(trained(Lora(), tiny_model, steps=0))
    assert [group.get("lr_scale") for group in groups] == [None, ratio]
    assert [len(group["params"]) for group in groups] == [14, 14]
    adapter = Lora(lora_plus_ratio=ratio)
    model = trained(adapter, tiny_model, steps=0)
    groups = adapter.parameter_groups(model)
    make = AdamwTorch().make_optimizer
    placed = Single().place(model, lambda _: make(groups, learning_rate=1.0, weight_decay=0.0), "cpu")
    (objective,) = Sft().objectives()
    row = (Tokenised((5, 6, 7), (-100, 6, 7)),)
    Learner(placed, objective, max_grad_norm=1.0).step([collate([row], pad_token_id=0)], learning_rate=0.1)
    assert [group["lr"] for group in placed.optimizer.param_groups] == [0.1, 0.1 * ratio]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_dora": True}, "a variant of LoRA"),
        ({"modules_to_save": ["lm_head"]}, "weights besides LoRA's are trained"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, "LoRA on some of the linear layers only"),
        ({"init_lora_weights": "pissa", "use_rslora": True}, "the model's parts are known to the fused functions"),
    ],
)
def test_fused_steps_are_taken_where_they_can_be(tiny_model, tiny_data, tmp_path, fields, reason):
    plan = make_plan(tiny_job(tiny_model, tiny_data, tmp_path, adapter={"name": "lora", "r": 4, **fields}))
    assert plan.reasons["kernels"] == reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_to_transform": [1]}, "name the linear layers"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "make `r` even"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "goes with them"),
        ({"init_lora_weights": "pissa_niter_0"}, "pattern"),
        ({"init_lora_weights": "eva"}, "pattern"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Lora(**fields)
