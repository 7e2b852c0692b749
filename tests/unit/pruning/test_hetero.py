"""Layers of different widths on disk: read back with equal logits, and not by what would build them alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from lmray.engines.vllm import Vllm
from lmray.errors import ArtifactError, ConfigError
from lmray.models.load import load_config, load_empty_model, load_model
from lmray.models.shape import read_shape
from lmray.pruning.depth import shallower
from lmray.pruning.record import Pruning
from lmray.pruning.shrink import shrunk
from lmray.pruning.structure import structure_of
from tests.unit.pruning.models import IDS, logits, make, save

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


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_back_is_the_padded_model_without_its_zeros(name, tmp_path: Path):
    model = make(CONFIGS[name]())
    structure = structure_of(model, block=8)
    padded = shrunk(model, structure, KEPT, "padded")
    record = save(model, structure, KEPT, tmp_path, shape="hetero")
    again: Any = load_model(tmp_path, "float32")
    assert torch.allclose(logits(again), logits(padded), atol=1e-5)
    assert [layer.mlp.up_proj.out_features for layer in again.model.layers] == [12, 8, 44]
    assert record.parameters.after == again.num_parameters() < padded.num_parameters()
    assert load_empty_model(tmp_path).num_parameters() == again.num_parameters()
    assert Pruning.beside(tmp_path) == record and record.shape == "hetero"
    assert again.generation_config.max_new_tokens == 17
    text = again.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(text, padded.generate(IDS[:1], max_new_tokens=8, do_sample=False))


def test_widths_are_filled_up_to_what_kernels_like_and_change_nothing():
    model = make(CONFIGS["mistral"]())
    structure = structure_of(model, block=8)
    narrow, wide = (shrunk(model, structure, KEPT, "hetero", multiple_of=one) for one in (1, 16))
    assert [layer.mlp.up_proj.out_features for layer in wide.model.layers] == [16, 16, 44]
    assert torch.allclose(logits(wide), logits(narrow), atol=1e-5)


def test_a_layer_that_keeps_nothing_has_zeros():
    model = make(CONFIGS["mistral"]())
    kept = {"groups": [[0], [], [1]], "channels": [[0], [1], []]}
    smaller, padded = (shrunk(model, structure_of(model, block=8), kept, shape) for shape in ("hetero", "padded"))
    assert torch.allclose(logits(smaller), logits(padded), atol=1e-5)
    assert smaller.model.layers[2].mlp.up_proj.out_features == 1


def test_a_layer_that_keeps_nothing_of_either_kind_is_left_out():
    model = make(CONFIGS["mistral"]())
    kept = {"groups": [[0], [], [1, 2]], "channels": [[0], [], [1, 2]]}
    smaller, padded = (shrunk(model, structure_of(model, block=8), kept, shape) for shape in ("hetero", "padded"))
    assert torch.allclose(logits(smaller), logits(padded), atol=1e-5)
    assert [layer.mlp.up_proj.out_features for layer in smaller.model.layers] == [8, 16]


def test_the_type_of_the_weights_is_kept(tmp_path: Path):
    model = make(CONFIGS["mistral"](), torch.bfloat16)
    save(model, structure_of(model, block=8), KEPT, tmp_path, shape="hetero")
    again = load_empty_model(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


def test_the_config_says_every_layer(tmp_path: Path):
    model = make(CONFIGS["llama, tied"]())
    save(model, structure_of(model, block=8), KEPT, tmp_path, shape="hetero")
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert written["num_attention_heads"] == 6 and written["head_dim"] == 8
    assert [one["ffn"]["intermediate_size"] for one in written["block_configs"]] == [12, 8, 44]
    assert {one["attention"]["n_heads_in_group"] for one in written["block_configs"]} == {2}
    assert not any("ffn_mult" in one["ffn"] for one in written["block_configs"]), "it would be rounded to 256"


def test_plain_transformers_refuses_it(tmp_path: Path):
    model = make(CONFIGS["llama, tied"]())
    save(model, structure_of(model, block=8), KEPT, tmp_path, shape="hetero")
    code = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode != 0 and "nemotron-nas" in done.stderr


def test_it_can_be_cut_again(tmp_path: Path):
    """Of equal widths, as one layer is: in any shape, and by layers whatever the widths."""
    model = make(CONFIGS["mistral"]())
    one = {"groups": [[0, 1], [], []], "channels": [[0, 1, 2], [], []]}
    save(model, structure_of(model, block=8), one, tmp_path / "one", shape="hetero")
    alike: Any = load_model(tmp_path / "one", "float32")
    structure = structure_of(alike, block=8)
    again = {"groups": [[1]], "channels": [[0, 2]]}
    cut = [shrunk(alike, structure, again, shape) for shape in ("uniform", "padded", "hetero")]
    assert [one.config.mlp_widths for one in cut] == [[16]] * 3
    assert torch.equal(logits(cut[0]), logits(cut[2]))
    save(model, structure_of(model, block=8), KEPT, tmp_path / "all", shape="hetero")
    fewer = shallower(load_model(tmp_path / "all", "float32"), [0, 2])
    assert fewer.config.mlp_widths == [12, 44] and logits(fewer).isfinite().all()


def test_models_that_bring_their_own_code_are_left_to_it(tmp_path: Path):
    model = make(CONFIGS["mistral"]())
    save(model, structure_of(model, block=8), KEPT, tmp_path, shape="hetero")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoConfig": "code.Theirs"}}))
    (tmp_path / "code.py").write_text(
        "from transformers import PretrainedConfig\nclass Theirs(PretrainedConfig):\n    model_type = 'nemotron-nas'\n"
    )
    with pytest.raises(ArtifactError, match="needs Python code that lies beside its weights"):
        load_config(tmp_path)
    assert type(load_config(tmp_path, trust_remote_code=True)).__name__ == "Theirs"


def test_vllm_is_not_asked_for_it():
    model = make(CONFIGS["mistral"]())
    smaller = shrunk(model, structure_of(model, block=8), KEPT, "hetero")
    with pytest.raises(ConfigError, match=r"engine.name: has layers of different widths"):
        Vllm(max_length=64).check(smaller, {})


def test_memory_is_planned_by_the_mean_width(tmp_path: Path):
    model = make(CONFIGS["mistral"]())
    save(model, structure_of(model, block=8), KEPT, tmp_path, shape="hetero")
    assert read_shape(tmp_path).intermediate == -(-(12 + 8 + 44) // 3)


REFUSED = {
    "another architecture": lambda: Qwen2Config(**COMMON),
    "biases": lambda: LlamaConfig(**COMMON, attention_bias=True),
    "a window": lambda: MistralConfig(**COMMON, sliding_window=8),
}


@pytest.mark.parametrize("make_config", REFUSED.values(), ids=REFUSED)
def test_what_the_form_cannot_hold_is_refused(make_config):
    model = make(make_config())
    with pytest.raises(ConfigError, match=r"method.shape: .* cannot have layers of different widths") as said:
        shrunk(model, structure_of(model, block=8), KEPT, "hetero")
    assert "`shape: padded`" in str(said.value)


SPOILT = {
    "a layer missing": (lambda blocks: blocks.pop(), r"says 2 layers of 3"),
    "no width": (lambda blocks: blocks[1].pop("ffn"), r"layer 1 is none of MLPs"),
    "another number of heads": (lambda blocks: blocks[2]["attention"].update(n_heads_in_group=4), r"layer 2 is none"),
    "no attention": (lambda blocks: blocks[0]["attention"].update(no_op=True), r"layer 0 has no attention"),
}


def test_a_config_without_blocks_is_named(tmp_path: Path):
    model = make(CONFIGS["mistral"]())
    save(model, structure_of(model, block=8), KEPT, tmp_path, shape="hetero")
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    del written["block_configs"]
    path.write_text(json.dumps(written))
    with pytest.raises(ArtifactError, match="its config has no `block_configs`"):
        load_model(tmp_path, "float32")


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_forms_that_are_not_read_are_named(spoil, said, tmp_path: Path):
    model = make(CONFIGS["mistral"]())
    save(model, structure_of(model, block=8), KEPT, tmp_path, shape="hetero")
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    spoil(written["block_configs"])
    path.write_text(json.dumps(written))
    with pytest.raises(ArtifactError, match=said):
        load_model(tmp_path, "float32")
