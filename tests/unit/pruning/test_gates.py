"""The algebra of masked layers with LoRA, and what is left once they are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from lmray.errors import ConfigError
from lmray.pruning.gates import Gates, kept_units, shrink_removed
from lmray.pruning.masks import project
from lmray.pruning.shrink import shrunk
from lmray.pruning.structure import KINDS, structure_of

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(
        **{**COMMON, "hidden_size": 48, "head_dim": 6}, attention_bias=True, mlp_bias=True
    ),
    "mistral": MistralConfig(**COMMON, sliding_window=None),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "gemma": GemmaConfig(**COMMON, head_dim=8),
}
IDS = torch.randint(1, 97, (2, 17), generator=torch.Generator().manual_seed(0))


def adapted(name: str, **changes):
    """A model with a random (not zero) LoRA on all linear layers."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = get_peft_model(base, LoraConfig(r=4, **{"target_modules": "all-linear", **changes}))
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.float()


def some_masks(structure, *, shape="padded", target=0.6):
    draw = torch.Generator().manual_seed(1)
    sizes = structure.sizes
    scores = {kind: torch.randn(sizes.layers, sizes.units(kind), generator=draw) for kind in KINDS}
    return project(scores, sizes, target, shape=shape, multiple_of=8)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_removed_is_the_model_itself(name):
    model = adapted(name)
    before = logits(model.eval())
    gates = Gates(model, structure_of(model, block=1))
    assert torch.equal(logits(model.eval()), before)
    gates.masks = some_masks(gates.structure)
    assert not torch.allclose(logits(model.eval()), before, atol=1e-2)
    with gates.off():
        assert torch.equal(logits(model.eval()), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_two_forms_differ_until_the_slices_of_removed_units_are_zero(name):
    model = adapted(name)
    gates = Gates(model, structure_of(model, block=1))
    gates.masks = some_masks(gates.structure)
    assert (logits(model.train()) - logits(model.eval())).abs().max() > 1e-3
    shrink_removed(gates, float("inf"))
    assert torch.allclose(logits(model.train()), logits(model.eval()), atol=1e-5)


def test_what_is_removed_still_gets_a_gradient_while_weights_are_tuned():
    model = adapted("llama").train()
    gates = Gates(model, structure_of(model, block=1))
    gates.masks = some_masks(gates.structure)
    model(IDS, labels=IDS).loss.backward()
    up = gates.layers[0].mlp.up_proj.lora_B["default"].weight
    removed = gates.masks["channels"][0] == 0
    assert removed.any() and (up.grad[removed].abs().sum(1) > 0).all()


def test_the_proximal_step_is_exactly_zero_in_the_end_and_leaves_the_kept_ones_alone():
    model = adapted("llama")
    gates = Gates(model, structure_of(model, block=1))
    gates.masks = some_masks(gates.structure)
    up, down = (getattr(gates.layers[1].mlp, name) for name in ("up_proj", "down_proj"))
    b, a = up.lora_B["default"].weight, down.lora_A["default"].weight
    removed = gates.masks["channels"][1] == 0
    kept_before = b[~removed].clone(), a[:, ~removed].clone()
    norms = [shrink_removed(gates, 4.0)]
    while norms[-1] > 0:
        norms.append(shrink_removed(gates, 4.0))
        assert norms[-1] < norms[-2] and len(norms) < 200
    assert (b[removed] == 0).all() and (a[:, removed] == 0).all()
    assert torch.equal(b[~removed], kept_before[0]) and torch.equal(a[:, ~removed], kept_before[1])


def test_the_proximal_step_is_that_of_the_group_lasso():
    """Against its definition, one unit at a time, in float64."""
    model = adapted("llama")
    gates = Gates(model, structure_of(model, block=4))
    gates.masks = some_masks(gates.structure)
    mlp = gates.layers[0].mlp
    removed = {kind: gates.masks[kind] == 0 for kind in KINDS}
    cost = {kind: gates.structure.sizes.costs(kind)[0] for kind in KINDS}  # of weights, of units of a kind alike
    assert cost["groups"] != cost["channels"]
    weights = sum(int(one.sum()) * cost[kind] for kind, one in removed.items())
    share = float(removed["channels"][0].sum()) * cost["channels"] / weights
    unit = int(removed["channels"][0].nonzero()[0])
    rows = slice(4 * unit, 4 * unit + 4)

    def slices():
        return [
            mlp.gate_proj.lora_B["default"].weight[rows].detach().double().clone(),
            mlp.up_proj.lora_B["default"].weight[rows].detach().double().clone(),
            mlp.down_proj.lora_A["default"].weight[:, rows].detach().double().clone(),
        ]

    before = slices()
    norm = sum(float(one.pow(2).sum()) for one in before) ** 0.5
    shrink_removed(gates, 0.5)
    for one, found in zip(before, slices(), strict=True):
        assert torch.allclose(found, one * max(0.0, 1 - 0.5 * share / norm), atol=1e-6)


@pytest.mark.parametrize("shape", ["uniform", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_cut_gives_the_logits_of_what_is_masked_and_loads_in_plain_transformers(name, shape, tmp_path: Path):
    model = adapted(name)
    gates = Gates(model, structure_of(model, block=1))
    gates.masks = some_masks(gates.structure, shape=shape)
    masked = logits(model.eval())
    kept = kept_units(gates.masks)
    with gates.off():
        merged = model.merge_and_unload()
    smaller = shrunk(merged, structure_of(merged, block=1), kept, shape)
    assert torch.allclose(logits(smaller), masked, atol=1e-4)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(again), logits(smaller), atol=1e-6)
    if shape == "uniform":
        assert again.num_parameters() < merged.num_parameters()


def test_a_llama_whose_heads_do_not_divide_its_width_is_written_as_a_mistral(tmp_path: Path):
    model = adapted("llama")
    gates = Gates(model, structure_of(model, block=1))
    kept = {"groups": [[0, 2, 3]] * 2, "channels": [list(range(40))] * 2}  # 6 heads of 4, width 32
    for kind in KINDS:
        gates.masks = dict(gates.masks)
        gates.masks[kind] = torch.zeros_like(gates.masks[kind])
        for layer, units in enumerate(kept[kind]):
            gates.masks[kind][layer, units] = 1.0
    masked = logits(model.eval())
    with gates.off():
        merged = model.merge_and_unload()
    smaller = shrunk(merged, structure_of(merged, block=1), kept, "uniform")
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again).__name__ == "MistralForCausalLM" and again.config.num_attention_heads == 6
    assert torch.allclose(logits(again), masked, atol=1e-4)


def test_a_llama_with_biases_whose_heads_do_not_divide_its_width_cannot_be_written():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON, attention_bias=True))
    kept = {"groups": [[0, 2, 3]] * 2, "channels": [list(range(40))] * 2}
    with pytest.raises(ConfigError, match="leaves 6 heads, which do not divide the hidden width 32"):
        shrunk(model, structure_of(model, block=1), kept, "uniform")


def test_a_layer_without_lora_is_refused():
    model = adapted("llama", target_modules=["q_proj", "v_proj"])
    with pytest.raises(ConfigError, match=r"layer 0: `self_attn.k_proj` has no plain LoRA") as caught:
        Gates(model, structure_of(model, block=1))
    assert "all-linear" in str(caught.value)


def test_an_architecture_that_is_not_described_says_what_to_add():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11))
    with pytest.raises(ConfigError, match=r"`gpt2` is not described for pruning: it has no self_attn") as caught:
        structure_of(model, block=1)
    assert "LAYOUTS" in str(caught.value)


def test_a_block_wider_than_the_mlp_is_refused():
    with pytest.raises(ValueError, match="blocks of 65 channels in an MLP of 64"):
        structure_of(adapted("llama"), block=65)
