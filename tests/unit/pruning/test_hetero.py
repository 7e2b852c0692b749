"""Layers of different widths on disk: read back with equal logits, and not by what would build them alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config

from lmray.errors import ArtifactError, ConfigError
from lmray.pruning.hetero import load_hetero, save_hetero
from lmray.pruning.record import Pruning
from lmray.pruning.shrink import shrunk
from lmray.pruning.structure import structure_of
from tests.unit.pruning.models import IDS, logits, make

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
}
CONFIGS = {
    "llama, tied": lambda: LlamaConfig(**COMMON, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=None),
}
KEPT = {"groups": [[0, 1, 3], [2], [0, 3]], "channels": [[0, 5], [1], [0, 1, 2, 3, 4, 5]]}  # units of 8, the last of 4
PARENT = {"source": "親", "revision": None, "digest": "d"}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_back_is_the_padded_model_without_its_zeros(name, tmp_path: Path):
    model = make(CONFIGS[name]())
    structure = structure_of(model, block=8)
    padded = shrunk(model, structure, KEPT)
    record = save_hetero(model, structure, KEPT, tmp_path, asked=0.5, parent=PARENT)
    again = load_hetero(tmp_path)
    assert torch.allclose(logits(again), logits(padded), atol=1e-5)
    assert [layer.mlp.up_proj.out_features for layer in again.model.layers] == [12, 8, 44]
    assert record.parameters.after == again.num_parameters() < padded.num_parameters()
    assert Pruning.beside(tmp_path) == record and record.shape == "hetero"
    assert again.generation_config.max_new_tokens == 17
    text = again.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(text, padded.generate(IDS[:1], max_new_tokens=8, do_sample=False))


def test_the_type_of_the_weights_is_kept(tmp_path: Path):
    model = make(CONFIGS["mistral"](), torch.bfloat16)
    save_hetero(model, structure_of(model, block=8), KEPT, tmp_path, asked=0.5, parent=PARENT)
    assert {parameter.dtype for parameter in load_hetero(tmp_path).parameters()} == {torch.bfloat16}


def test_the_config_says_every_layer_and_plain_transformers_refuses_it(tmp_path: Path):
    model = make(CONFIGS["llama, tied"]())
    save_hetero(model, structure_of(model, block=8), KEPT, tmp_path, asked=0.5, parent=PARENT)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert written["num_attention_heads"] == 6 and written["head_dim"] == 8
    assert [one["ffn"]["intermediate_size"] for one in written["block_configs"]] == [12, 8, 44]
    assert {one["attention"]["n_heads_in_group"] for one in written["block_configs"]} == {2}
    assert not any("ffn_mult" in one["ffn"] for one in written["block_configs"]), "it would be rounded to 256"
    with pytest.raises(ValueError, match="nemotron-nas"):
        AutoConfig.from_pretrained(tmp_path)


REFUSED = {
    "another architecture": lambda: Qwen2Config(**COMMON),
    "biases": lambda: LlamaConfig(**COMMON, attention_bias=True),
    "a window": lambda: MistralConfig(**COMMON, sliding_window=8),
}


@pytest.mark.parametrize("make_config", REFUSED.values(), ids=REFUSED)
def test_what_the_form_cannot_hold_is_refused(make_config, tmp_path: Path):
    model = make(make_config())
    with pytest.raises(ConfigError, match=r"method.shape: .* cannot have layers of different widths") as said:
        save_hetero(model, structure_of(model, block=8), KEPT, tmp_path / "x", asked=0.5, parent=PARENT)
    assert "`padded`" in str(said.value) and not (tmp_path / "x").exists()


def test_a_layer_that_keeps_nothing_is_refused(tmp_path: Path):
    model = make(CONFIGS["mistral"]())
    kept = {**KEPT, "groups": [[0], [], [1]]}
    with pytest.raises(ConfigError, match=r"layer 1 keeps no groups"):
        save_hetero(model, structure_of(model, block=8), kept, tmp_path, asked=0.5, parent=PARENT)


def test_folders_that_hold_no_such_model_are_named(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"holds no config.json"):
        load_hetero(tmp_path)
    model = make(CONFIGS["mistral"]())
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ArtifactError, match=r"is of type `mistral`, whose layers are alike"):
        load_hetero(tmp_path / "plain")
    save_hetero(model, structure_of(model, block=8), KEPT, tmp_path / "小", asked=0.5, parent=PARENT)
    (tmp_path / "小" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"小: is no whole model"):
        load_hetero(tmp_path / "小")
