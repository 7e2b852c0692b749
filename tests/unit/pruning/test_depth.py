"""Fewer layers by block influence."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen2Config

from lmray.errors import ConfigError
from lmray.pruning.depth import adding_influence, block_influence, layers_to_keep, no_influence, shallower
from lmray.testing.tiny import tiny_config

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
MORE = {"num_key_value_heads": 2, "vocab_size": 264, "pad_token_id": 0, "max_position_embeddings": 64}
CONFIGS = {
    "llama": tiny_config(num_hidden_layers=4),
    "qwen2": Qwen2Config(**SHAPE, **MORE),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        **MORE,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    ),
}
IDS = torch.randint(3, 264, (2, 11), generator=torch.Generator().manual_seed(0))


def made(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_influence_is_one_less_the_cosine_of_input_and_output_over_all_tokens():
    model = made("llama").double()
    rows = [(IDS, IDS), (IDS[:1, :5], IDS[:1, :5])]
    found = block_influence(model, rows)
    inputs, outputs = ([[] for _ in model.model.layers] for _ in range(2))
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda module, taken, number=number: inputs[number].append(taken[0]))
        layer.register_forward_hook(lambda module, taken, given, number=number: outputs[number].append(given))
    with torch.no_grad():
        for ids, _ in rows:
            model(ids)
    for number in range(4):
        one, other = (torch.cat([part.reshape(-1, 32) for part in side[number]]) for side in (inputs, outputs))
        angles = [1 - float(a @ b) / float(a.norm() * b.norm()) for a, b in zip(one, other, strict=True)]
        assert len(angles) == 27 and found[number] == pytest.approx(sum(angles) / 27, rel=1e-9)


def test_a_layer_that_does_nothing_is_the_first_to_go():
    model = made("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    before = logits(model)
    kept = layers_to_keep(block_influence(model, [(IDS, IDS)]), 0.75)
    assert kept == [0, 1, 3]
    assert torch.allclose(logits(shallower(model, kept)), before, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shallower_model_skips_the_layers_and_loads_in_plain_transformers(name, tmp_path):
    model = made(name)
    whole = logits(model)
    smaller = shallower(model, [0, 3])
    assert torch.equal(logits(model), whole), "the model it is made of is left alone"
    hooks = [
        model.model.layers[number].register_forward_hook(
            lambda module, inputs, kwargs, output: inputs[0] if inputs else kwargs["hidden_states"], with_kwargs=True
        )
        for number in (1, 2)
    ]
    skipped = logits(model)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(logits(smaller), skipped, atol=1e-5) and not torch.allclose(whole, skipped, atol=1e-2)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(again), logits(smaller), atol=1e-6)
    assert again.config.num_hidden_layers == len(again.model.layers) == 2
    if getattr(model.config, "layer_types", None):
        assert again.config.layer_types == [model.config.layer_types[layer] for layer in (0, 3)]


def test_the_budget_is_kept_and_none_left_is_refused():
    influence = [0.9, 0.1, 0.5, 0.2, 0.8, 0.7, 0.3, 0.6, 0.4, 0.95]
    assert layers_to_keep(influence, 0.6) == [0, 2, 4, 5, 7, 9]
    assert layers_to_keep(influence, 0.69) == [0, 2, 4, 5, 7, 9]
    assert layers_to_keep(influence, 1.0) == [*range(10)]
    with pytest.raises(ConfigError, match=r"0.05 of 10 layers is none of them") as caught:
        layers_to_keep(influence, 0.05)
    assert "0.100 to 1" in str(caught.value)


def test_padding_and_what_runs_again_have_no_influence():
    model, real = made("llama"), torch.ones_like(IDS, dtype=torch.bool)
    real[:, -2:] = False
    reading = [real, None]
    sums, short = (no_influence(model) for _ in range(2))
    with torch.no_grad():
        with adding_influence(model, sums, lambda: reading[0]):
            model(IDS)
            reading.pop(0)
            model(IDS)
        with adding_influence(model, short):
            model(IDS[:, :-2])
    torch.testing.assert_close(sums, short, rtol=1e-4, atol=1e-6)
