"""A model whose weights come later is the one that is loaded whole, once they have come."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lmray.errors import ArtifactError
from lmray.models.deferred import Deferred, reads_whole
from lmray.models.load import load_config, load_model, make_model
from lmray.models.rope import RopeScaling
from lmray.testing.tiny import tiny_model_folder

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def folder_of(kind: str, folder, **changes):
    """A model of that architecture, saved in several files."""
    config = AutoConfig.for_model(kind, **SMALL | ARCHITECTURES[kind] | changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="20KB")
    return folder


def assert_same(one: torch.nn.Module, expected: torch.nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (one, expected))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
    assert {name for name, _ in one.named_parameters()} == {name for name, _ in expected.named_parameters()}, "ties"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_filled_it_is_the_model_that_is_loaded_whole(kind, dtype, tmp_path):
    folder = folder_of(kind, tmp_path)
    deferred = Deferred(folder, dtype)
    assert all(one.is_meta for one in deferred.model.parameters())
    assert not any(one.is_meta for one in deferred.model.buffers())
    for block in (*deferred.model.get_decoder().children(), deferred.model):
        deferred.fill(block, "cpu")
    whole = load_model(folder, dtype)
    assert_same(deferred.model, whole)
    assert not deferred.model.training and not any(one.requires_grad for one in deferred.model.parameters())
    assert deferred.model.config.to_dict() == whole.config.to_dict()
    assert deferred.model.config._attn_implementation == whole.config._attn_implementation
    assert deferred.model.name_or_path == whole.name_or_path
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(deferred.model(ids).logits, whole(ids).logits)


def test_the_jobs_attention_positions_and_ways_of_generating_are_the_models(tmp_path):
    folder = tiny_model_folder(tmp_path)
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")) | {"temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True}), encoding="utf-8")
    how: dict[str, Any] = {"attn_implementation": "eager", "rope_scaling": RopeScaling(rope_type="yarn", factor=4.0)}
    deferred = Deferred(folder, "float32", **how)
    deferred.fill(deferred.model, "cpu")
    whole = load_model(folder, "float32", **how)
    assert_same(deferred.model, whole)
    assert deferred.model.config._attn_implementation == "eager"
    assert deferred.model.generation_config.to_dict() == whole.generation_config.to_dict()
    assert deferred.model.generation_config.temperature == 0.5


def test_weights_stay_the_objects_they_are_and_learn_if_they_did(tiny_model):
    deferred = Deferred(tiny_model, "bfloat16")
    norm = deferred.model.model.norm.weight
    norm.requires_grad_(True)
    norm.data = norm.data.float()
    optimizer = torch.optim.SGD([norm], lr=1.0)
    deferred.fill(deferred.model, "cpu")
    assert deferred.model.model.norm.weight is norm and norm.requires_grad and norm.dtype == torch.float32
    assert torch.equal(norm.data, load_model(tiny_model, "bfloat16").model.norm.weight.data.float())
    assert optimizer.param_groups[0]["params"][0].device.type == "cpu"


def test_while_zeros_stand_in_nothing_of_the_weights_size_is_allocated(tiny_model):
    deferred = Deferred(tiny_model, "bfloat16")
    weights = list(deferred.model.parameters())
    with deferred.standing_in():
        assert all(one.device.type == "cpu" and one.untyped_storage().nbytes() == 2 for one in weights)
        shapes = [one.shape for one in weights]
    assert all(one.is_meta for one in weights) and [one.shape for one in weights] == shapes
    assert [id(one) for one in deferred.model.parameters()] == [id(one) for one in weights]


def why(folder, dtype="float32") -> str | None:
    with torch.device("meta"):
        return reads_whole(make_model(load_config(folder), dtype), folder)


def rewritten(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found, None),
        (lambda found: {**found, "model.rotary_emb.inv_freq": torch.ones(4)}, None),
        (lambda found: {name.removeprefix("model."): one for name, one in found.items()}, "by this name"),
        (lambda found: {**found, "lm_head.weight": found["model.embed_tokens.weight"].clone()}, "tied to"),
        (lambda found: {**found, "model.norm.weight": torch.ones(31)}, "as the model has it"),
        (lambda found: {**found, "model.norm.weight": torch.ones(32, dtype=torch.int8)}, "as the model has it"),
    ],
    ids=["as it is", "more", "other names", "a tied one", "another shape", "another type"],
)
def test_what_is_not_in_the_files_as_the_model_has_it_is_read_whole(change, said, tmp_path):
    found = why(rewritten(tiny_model_folder(tmp_path), change))
    assert found is None if said is None else said in found


def test_models_that_are_converted_as_they_are_read_are_read_whole(tmp_path):
    config = AutoConfig.for_model("mixtral", **SMALL, num_local_experts=2, num_experts_per_tok=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "converts its weights" in why(tmp_path)
    with pytest.raises(ArtifactError, match="converts its weights"):
        Deferred(tmp_path, "float32")


def test_buffers_that_are_in_the_files_are_read_whole(tiny_model):
    with torch.device("meta"):
        model = make_model(load_config(tiny_model), "float32")
    model.register_buffer("counts", torch.zeros(1))
    assert reads_whole(model, tiny_model) == "`counts` is read as well and no weight"


def test_files_that_say_nothing_of_single_weights(tmp_path):
    folder = tiny_model_folder(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    deferred = Deferred(folder, "float32")
    path.write_bytes(whole[: len(whole) // 2])
    assert "say nothing of single weights" in why(folder)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        deferred.fill(deferred.model, "cpu")
    path.unlink()
    assert "say nothing of single weights" in why(folder)
