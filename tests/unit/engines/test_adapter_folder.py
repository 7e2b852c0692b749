"""What is refused in an adapter's folder, and with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmray.engines._adapter_folder import CONFIG, MAX_RANK, WEIGHTS, read_adapter_folder
from lmray.engines._adapters import AdapterBank
from lmray.errors import ArtifactError

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def folder(adapter_folders, tmp_path) -> Path:
    return Path(shutil.copytree(adapter_folders["a"], tmp_path / "adapter"))


def set_config(folder: Path, **changes) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(fields | changes))


def set_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def refused(folder: Path, model) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_adapter_folder(folder, model)
    return str(caught.value)


def test_a_good_folder_is_read(folder, model):
    found = read_adapter_folder(folder, model)
    assert found.config.r == 4
    assert found.tensors.keys() == load_file(folder / WEIGHTS).keys()


def test_pickled_weights_are_refused_also_beside_a_config(folder, model):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "but adapter_model.bin, which may run code" in refused(folder, model)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_missing_or_broken_config_is_refused(folder, model, content):
    (folder / CONFIG).unlink()
    if content is not None:
        (folder / CONFIG).write_text(content)
    assert CONFIG in refused(folder, model)


def test_weights_that_are_no_safetensors_are_refused(folder, model):
    (folder / WEIGHTS).write_bytes(b"\x80\x04 not tensors")
    assert "is no safetensors file" in refused(folder, model)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"peft_type": "IA3"}, "`peft_type` is 'IA3'"),
        ({"use_dora": True}, "uses `use_dora`"),
        ({"modules_to_save": ["lm_head"]}, "uses `modules_to_save`"),
        ({"auto_mapping": {"base_model_class": "x"}}, "uses `auto_mapping`"),
        ({"a_new_thing": 1}, "uses `a_new_thing`"),
        ({"bias": "all"}, "`bias` is 'all'"),
        ({"init_lora_weights": "pissa_niter_16"}, "which changed the base model's weights too"),
        ({"r": 10**6}, f"allowed: 1 to {MAX_RANK}"),
        ({"r": "8"}, "`r` is '8'"),
        ({"lora_alpha": None}, "`lora_alpha`: Input should be a valid number"),
        ({"lora_alpha": float("nan")}, "`lora_alpha`: Input should be a finite number"),
        ({"rank_pattern": {"q_proj": 0}}, "`rank_pattern`: Input should be greater than or equal to 1"),
        ({"rank_pattern": {"(q_proj": 2}}, "'(q_proj' is no regular expression"),
        ({"alpha_pattern": {"q_proj": None}}, "`alpha_pattern`: Input should be a valid number"),
        ({"target_modules": "(q_proj"}, "'(q_proj' is no regular expression"),
        ({"layers_pattern": "h", "layers_to_transform": None}, "is no LoRA config"),
    ],
)
def test_settings_that_would_change_the_answer_are_refused(folder, model, changes, found):
    set_config(folder, **changes)
    assert found in refused(folder, model)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({Q_PROJ.format("A"): torch.zeros(4, 33)}, "has shape [4, 33]\n  allowed: [rank, 32]"),
        ({Q_PROJ.format("B"): torch.zeros(33, 4)}, "has shape [33, 4]\n  allowed: [32, rank]"),
        ({Q_PROJ.format("A"): torch.zeros(MAX_RANK + 1, 32)}, f"rank up to {MAX_RANK}"),
        ({Q_PROJ.format("A"): torch.zeros(4, 8, 4)}, "has shape [4, 8, 4]"),
        ({Q_PROJ.format("A").replace("layers.0", "layers.9"): torch.zeros(4, 32)}, "no linear layer `model.layers.9"),
        ({"base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(4, 32)}, "no linear layer"),
        ({"base_model.model.lm_head.weight": torch.zeros(264, 32)}, "is no LoRA weight"),
        ({Q_PROJ.format("A"): torch.full((4, 32), float("nan"))}, "holds NaN or infinity"),
    ],
)
def test_tensors_that_are_not_of_the_model_are_refused(folder, model, changes, found):
    set_tensors(folder, **changes)
    assert found in refused(folder, model)


def test_a_file_without_tensors_is_refused(folder, model):
    save_file({}, folder / WEIGHTS)
    assert "holds no weights" in refused(folder, model)


@pytest.mark.parametrize("attached_before", [False, True])
def test_weights_that_are_not_those_of_the_config_leave_no_trace(folder, adapter_folders, model, attached_before):
    set_tensors(folder, **{Q_PROJ.format("A"): None})
    bank = AdapterBank(model)
    if attached_before:
        bank.add("b", read_adapter_folder(adapter_folders["b"], bank.base))
    with pytest.raises(ArtifactError, match=r"does not fit its config, first at `.*q_proj\.lora_A\.weight` \[4, 32\]"):
        bank.add("a", read_adapter_folder(folder, bank.base))
    assert bank.handles == (("b",) if attached_before else ())
    assert (bank.peft is not None) == attached_before


def test_an_adapter_that_fails_while_it_is_filled_leaves_no_trace(folder, model, monkeypatch):
    bank, found = AdapterBank(model), read_adapter_folder(folder, model)
    with monkeypatch.context() as patched:
        patched.setattr("lmray.engines._adapters.set_peft_model_state_dict", fail)
        with pytest.raises(MemoryError):
            bank.add("a", found)
    assert bank.handles == () and bank.peft is None
    bank.add("a", found)
    assert bank.handles == ("a",)


def fail(*args, **kwargs):
    raise MemoryError("no room")


def test_a_config_that_targets_nothing_is_refused_when_attached(folder, model):
    set_config(folder, target_modules=["no_such_layer"])
    bank = AdapterBank(model)
    with pytest.raises(ArtifactError, match="cannot be attached: Target modules"):
        bank.add("a", read_adapter_folder(folder, bank.base))
