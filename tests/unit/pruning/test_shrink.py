"""The smaller model: against one whose removed units are zero, on disk and read back by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from lmray.errors import ArtifactError, ConfigError
from lmray.pruning.record import Pruning
from lmray.pruning.shrink import shrunk
from lmray.pruning.structure import structure_of
from tests.unit.pruning.models import logits, make, save

GROUPS, PER_GROUP, HEAD_DIM, CHANNELS, BLOCK = 4, 2, 8, 44, 8
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": CHANNELS,
    "num_hidden_layers": 2,
    "num_attention_heads": GROUPS * PER_GROUP,
    "num_key_value_heads": GROUPS,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**COMMON, sliding_window=8),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, head_dim=HEAD_DIM),
    "gemma": GemmaConfig(**COMMON, head_dim=HEAD_DIM),
    "gemma2": Gemma2Config(**COMMON, head_dim=HEAD_DIM, sliding_window=8),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=HEAD_DIM, sliding_window=8),
}
UNIFORM = {"groups": [[1, 2], [0, 3]], "channels": [[0, 1, 4], [1, 2, 3]]}
PADDED = {"groups": [[1, 2], [3]], "channels": [[0, 1, 4, 5], [2]]}  # the last unit has 4 channels, not 8


@torch.no_grad()
def zero_removed(model, kept) -> None:
    """Zeroes all that goes through units that are not kept, told in the plainest terms."""
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for group in set(range(GROUPS)) - set(kept["groups"][number]):
            one = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
            heads = slice(group * PER_GROUP * HEAD_DIM, (group + 1) * PER_GROUP * HEAD_DIM)
            for linear, rows in ((attention.q_proj, heads), (attention.k_proj, one), (attention.v_proj, one)):
                linear.weight[rows] = 0
                if linear.bias is not None:
                    linear.bias[rows] = 0
            attention.o_proj.weight[:, heads] = 0
        for channel in range(CHANNELS):
            if channel // BLOCK not in kept["channels"][number]:
                for linear in (mlp.gate_proj, mlp.up_proj):
                    linear.weight[channel] = 0
                    if linear.bias is not None:
                        linear.bias[channel] = 0
                mlp.down_proj.weight[:, channel] = 0


@pytest.mark.parametrize(("shape", "kept"), [("uniform", UNIFORM), ("padded", PADDED)], ids=["uniform", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_cut_is_what_is_zeroed_and_plain_transformers_reads_it_back(name, shape, kept, tmp_path: Path):
    model = make(CONFIGS[name])
    structure = structure_of(model, block=BLOCK)
    smaller = shrunk(model, structure, kept, shape)
    record = save(model, structure, kept, tmp_path / "小", shape=shape)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "小").eval()
    untouched = logits(model)
    zero_removed(model, kept)
    assert torch.allclose(logits(smaller), logits(model), atol=1e-4)
    assert not torch.allclose(logits(smaller), untouched, atol=1e-2)
    assert torch.equal(logits(again), logits(smaller))
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert (again.config.num_key_value_heads, again.config.num_attention_heads, again.config.head_dim) == (2, 4, 8)
    assert again.config.intermediate_size == (24 if shape == "uniform" else 28)
    assert again.generation_config.max_new_tokens == 17
    assert record.parameters.after == again.num_parameters() < record.parameters.before == model.num_parameters()
    ends = again.get_input_embeddings().weight.data_ptr(), again.get_output_embeddings().weight.data_ptr()
    assert (ends[0] == ends[1]) is bool(model.config.tie_word_embeddings)


def test_the_parent_stays_as_it_was():
    model = make(CONFIGS["qwen2"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shrunk(model, structure_of(model, block=BLOCK), UNIFORM, "uniform")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_type_of_the_weights_is_kept(tmp_path: Path):
    model = make(CONFIGS["qwen3"], torch.bfloat16)
    save(model, structure_of(model, block=BLOCK), UNIFORM, tmp_path, shape="uniform")
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_a_llama_that_becomes_a_mistral_has_its_tensors_and_its_rotation(tmp_path: Path):
    """Six heads do not divide a width of 64."""
    config = LlamaConfig(**COMMON, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    kept = {"groups": [[0, 2, 3]] * 2, "channels": [[0, 1, 2]] * 2}
    save(model, structure_of(model, block=BLOCK), kept, tmp_path, shape="uniform")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again).__name__ == "MistralForCausalLM" and again.config.sliding_window is None
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["architectures"], written["model_type"]) == (["MistralForCausalLM"], "mistral")
    assert written["rope_parameters"] == config.rope_parameters and "mlp_bias" not in written
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    zero_removed(model, kept)
    assert torch.allclose(logits(again), logits(model), atol=1e-4)


def test_quantised_weights_are_refused():
    model = make(CONFIGS["llama"])
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ConfigError, match=r"model.quantization: units cannot be cut out of quantised weights") as said:
        shrunk(model, structure_of(model, block=BLOCK), UNIFORM, "uniform")
    assert "unquantised weights it was trained from" in str(said.value)


def test_layers_that_keep_different_numbers_are_not_uniform(tmp_path: Path):
    model = make(CONFIGS["llama"])
    with pytest.raises(ConfigError, match=r"`kept.groups` has 1 to 2 units a layer, which is not uniform"):
        save(model, structure_of(model, block=BLOCK), PADDED, tmp_path / "x", shape="uniform")
    assert not (tmp_path / "x").exists()


def test_the_record_says_what_was_kept_of_what(tmp_path: Path):
    model = make(CONFIGS["llama"])
    written = save(model, structure_of(model, block=BLOCK), PADDED, tmp_path, shape="padded")
    assert Pruning.beside(tmp_path) == written
    assert written.kept == PADDED and written.parent.source == "親モデル" and written.asked == 0.6
    group, channel = 2 * (PER_GROUP + 1) * HEAD_DIM * 64, 3 * 64
    assert written.prunable.before == 2 * (GROUPS * group + CHANNELS * channel)
    assert written.prunable.after == 3 * group + (8 + 8 + 8 + 4 + 8) * channel
    assert written.remaining == written.prunable.after / written.prunable.before
    assert "親モデル" in (tmp_path / "pruning.json").read_text(encoding="utf-8")


def test_a_model_that_was_not_pruned_has_no_record(tmp_path: Path):
    assert Pruning.beside(tmp_path) is None


SPOILT = {
    "no JSON": (lambda record: "{", "Invalid JSON"),
    "a field missing": (lambda record: record.pop("asked"), "asked: Field required"),
    "a field too many": (lambda record: record.update(more=1), "more: Extra inputs are not permitted"),
    "another kind of units": (lambda record: record["kept"].pop("groups"), "`kept` holds channels, and needs"),
    "a layer missing": (lambda record: record["kept"]["groups"].pop(), "`kept.groups` has 1 layers of 2"),
    "units out of order": (lambda record: record["kept"]["groups"][0].reverse(), "of layer 0 is not in order"),
    "a unit that is not there": (lambda record: record["kept"]["channels"][1].append(6), "or goes beyond 6"),
    "nothing kept": (lambda record: record["kept"].update(groups=[[], []]), "`kept.groups` is empty in every layer"),
    "other counts": (lambda record: record["prunable"].update(after=7), "`prunable` is not"),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_record_is_named(spoil, said, tmp_path: Path):
    model = make(CONFIGS["llama"])
    save(model, structure_of(model, block=BLOCK), PADDED, tmp_path, shape="padded")
    path = tmp_path / "pruning.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    spoilt = spoil(record)
    path.write_text(spoilt if isinstance(spoilt, str) else json.dumps(record), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"pruning.json: is no record of a pruning") as caught:
        Pruning.beside(tmp_path)
    assert said in str(caught.value) and "hint: copy the model again" in str(caught.value)


def test_a_padded_mlp_is_as_wide_as_kernels_like_it():
    model = make(CONFIGS["llama"])
    structure = structure_of(model, block=1)
    kept = {"groups": [[0], [1, 2]], "channels": [[3], list(range(17))]}
    exact, wider, whole = (shrunk(model, structure, kept, "padded", multiple_of=one) for one in (1, 16, 50))
    assert [one.config.intermediate_size for one in (exact, wider, whole)] == [17, 32, CHANNELS]
    assert torch.allclose(logits(wider), logits(exact), atol=1e-5)
    assert torch.allclose(logits(whole), logits(exact), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("shape", ["uniform", "padded"])
def test_a_layer_that_keeps_nothing_is_left_out(name, shape, tmp_path: Path):
    model = make(CONFIGS[name])
    kept = {"groups": [[], [0, 3]], "channels": [[], [1, 2, 3]]}
    record = save(model, structure_of(model, block=BLOCK), kept, tmp_path, shape=shape)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    zero_removed(model, kept)
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    assert again.config.num_hidden_layers == len(again.model.layers) == 1
    assert record.parameters.after == again.num_parameters() and Pruning.beside(tmp_path) == record
